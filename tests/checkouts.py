"""A fresh checkout of this working tree, in which people's commands run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from forks import program

REPOSITORY = Path(__file__).parent.parent


def check_out(root: Path, cluster: dict[str, object], experiment: str = "micro") -> Path:
    """The tracked files of this working tree as a repository of their own, without cache or outputs."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name and (REPOSITORY / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, root / name)
    (root / "cluster.yaml").write_text(yaml.safe_dump(cluster))
    for command in (["git", "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "checkout"]):
        run(root, *command)
    run(root, sys.executable, "-m", "unifork.cli", "use", experiment)
    return root


def environment(root: Path) -> dict[str, str]:
    """Of people's commands in a checkout."""
    scripts = str(Path(sys.executable).parent)
    names = {f"GIT_{who}_{what}": "test@localhost" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    paths = {"PATH": scripts + os.pathsep + os.environ["PATH"], "PYTHONPATH": str(root)}
    return {**os.environ, **names, **paths, "UNIFORK_CLUSTER": str(root / "cluster.yaml")}


def run(root: Path, *command: str) -> str:
    """Output and errors of a command that must end well; `dvc` and the programs of its stages are forked."""
    if command[0] == "dvc":
        code, output = program(root, command, **environment(root))
        assert code == 0, output[-6000:]
        return output
    done = subprocess.run(
        command, check=False, cwd=root, env=environment(root), capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr

"""A real cluster in token mode: stages that submit themselves, every stage as a job, a second node without the disk."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray_heads import BIN, Head, head, wait_until
from stage_programs import REPOSITORY, Start
from tiny import write_experiment

__all__ = ["head"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.nodes]


def submit_by_hand(head: Head, experiment: Path, *arguments: str) -> "subprocess.Popen[str]":
    """What a user can do without any help: `ray job submit`, with the code as the working directory."""
    code = experiment / "code"
    shutil.copytree(REPOSITORY / "unifork", code / "unifork", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(experiment / "stages", code / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    variables = {"UNIFORK_ROOT": str(experiment), "UNIFORK_CLUSTER": "far.yaml"}
    command = [BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", code]
    command += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    command += ["--", sys.executable, "-m", "stages.program", *arguments]
    return subprocess.Popen(command, env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_stages_submit_themselves_to_a_cluster_in_token_mode(head: Head, start: Start, experiment: Path) -> None:
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=10)
    (experiment / "far.yaml").write_text(
        f"name: far\naddress: {head.address}\njobs: {{encode: {{workers: 2, cpus: 0.5}}}}\n"
    )
    # no mode and no address is inherited: the file in HOME is all that the stage needs
    environment = {"HOME": head.environment["HOME"], "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "http://127.0.0.1:1"}
    waits = start("far.yaml", "wait", "started", **environment)
    fails = start("far.yaml", "fail", **environment)
    works = start("far.yaml", "work", "squares.txt", **environment)

    by_hand = submit_by_hand(head, experiment, "note", "by-hand.txt")

    out, errors = fails.communicate(timeout=80)
    assert fails.returncode == 7, errors
    assert "code from " in out
    assert f"code from {REPOSITORY}" not in out  # it ran the code that was sent
    assert "exit code 7" in errors

    assert wait_until((experiment / "started").exists, 60)
    waits.send_signal(signal.SIGTERM)
    out, errors = waits.communicate(timeout=60)
    assert waits.returncode == 143, errors
    job = out.split()[1]
    assert head.get(f"/api/jobs/{job}")["status"] == "STOPPED"

    out, errors = works.communicate(timeout=80)
    assert works.returncode == 0, errors + out
    assert (experiment / "squares.txt").read_text() == "0 1 4 9"

    out, _ = by_hand.communicate(timeout=80)
    assert by_hand.returncode == 0, out
    assert (experiment / "by-hand.txt").read_text() == "far True"  # in a job, so not submitted again


# ------------------------------------------------------------------------------- every stage

CHANGES = {
    "datasets": {"shapes": {"rows": 64, "shard_rows": 32}},
    "image_tokenizer": {"training": {"steps": 12, "quantize_from_step": 6, "held_out_images": 8}},
    "benchmarks": {
        name: {"options": {"samples": count}} for name, count in (("shapes-generation", 1), ("shapes-understanding", 2))
    },
    "text_evals": ["text-0shot"],  # whose files are not here
}


def stages(root: Path) -> list[str]:
    """Every stage of `dvc.yaml`, in its order, as commands of an experiment with one data set, variant and stage."""
    params = yaml.safe_load((root / "params.yaml").read_text())
    names = ("datasets", "prepared", "variants", "runs", "benchmarks", "evaluations", "examined", "text_runs", "scored",
             "analyzed")  # fmt: skip
    loops = {f"${{{name}}}": name for name in names}
    commands = []
    for stage in yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"].values():
        entries = params[loops[stage["foreach"]]] if "foreach" in stage else {"": {}}
        for key, item in entries.items():
            command = stage.get("do", stage)["cmd"].replace("${key}", key)
            for field in re.findall(r"\$\{item\.(\w+)\}", command):
                command = command.replace(f"${{item.{field}}}", item[field])
            commands.append(command)
    return commands


EVERY = """
import os
import runpy
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pipelines
from unifork import processes
from unifork.cluster import set_ray_environment

set_ray_environment()
warnings.filterwarnings("ignore", "'.*' found in sys.modules")
for program in Path(pipelines.__path__[0]).glob("[a-z]*.py"):
    import_module(f"pipelines.{program.stem}")
assert Path(pipelines.__path__[0]).parent == Path.cwd()
assert not Path("params.yaml").exists()
for command in sys.argv[1:]:
    print("+", command, flush=True)
    if not (program := os.fork()):  # as `python -m`, which would import everything again
        processes._PARENT = os.getppid()
        sys.argv = command.split()
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    if code:
        sys.exit(code)
"""
"""Every stage in a process of its own, forked from one that has imported what they need."""


def test_every_stage_runs_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    root, code = tmp_path / "experiment", tmp_path / "code"
    root.mkdir()
    write_experiment(root, CHANGES)
    (root / "clusters" / "far.yaml").write_text(
        f"name: far\naddress: {head.address}\n"
        "jobs: {encode: {workers: 1, cpus: 0.5}, answer: {workers: 1, cpus: 0.5}}\n"
        "train: {row_tokens: 2048}\ntrain_stages: {s1-captions: {workers: 1, cpus: 0.5, row_tokens: 2048}}\n"
    )
    for package in ("unifork", "pipelines"):
        shutil.copytree(REPOSITORY / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
    (code / "every.py").write_text(EVERY)
    commands = [command.removeprefix("python -m ") for command in stages(root)]
    variables = {"UNIFORK_ROOT": str(root), "UNIFORK_CLUSTER": "clusters/far.yaml"}
    submit = [BIN / "ray", "job", "submit", "--address", head.address, "--working-dir", code]
    submit += ["--runtime-env-json", json.dumps({"env_vars": variables})]
    submit += ["--", sys.executable, "every.py", *commands]
    done = subprocess.run(submit, env=head.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert len(commands) >= 10
    assert re.findall(r"^\+ (.*)$", done.stdout, re.MULTILINE) == commands
    assert (root / "reports/tiny/index.html").stat().st_size > 100_000
    assert json.loads((root / "scores/unifork/shapes-generation/metrics.json").read_text())


# ------------------------------------------------------------------------------- two nodes

HIDE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "hide"]
"""A command with mounts of its own: an empty disk covers its first argument."""
CAN_HIDE = subprocess.run([*HIDE, "/mnt", "true"], capture_output=True, check=False).returncode == 0

DRIVER = """
import os
import sys
from pathlib import Path

from unifork.cluster import local_ray, map_shards
from unifork.config import load_cluster
from unifork.jobs import run_stage
from unifork.shards.task import ShardResult, ShardTask


class Name:
    def __call__(self, task):
        return ShardResult(task.output, problem="none")


def main():
    cluster = load_cluster()
    with local_ray(cluster):
        print("driver on the", "head" if any(Path(os.environ["HIDDEN"]).iterdir()) else "second", "node", flush=True)
        print(len(list(map_shards([ShardTask(output="a")], Name, (), cluster.jobs["encode"]))), "shards")


if __name__ == "__main__":
    run_stage(main, "stages.program", [])
"""


@pytest.fixture
def unseen(tmp_path: Path) -> Path:
    """A folder that the second node does not see."""
    return folder(tmp_path / "experiment")


def folder(path: Path) -> Path:
    (path / "stages").mkdir(parents=True)
    (path / "stages" / "__init__.py").touch()
    (path / "stages" / "program.py").write_text(DRIVER)
    return path


@pytest.fixture
def second(head: Head, unseen: Path) -> Iterator[None]:
    """A node of four CPUs, where the head has two."""
    log = unseen.with_name("second.log")
    start = [BIN / "ray", "start", "--block", f"--address={head.joins}", "--num-cpus=4", "--num-gpus=0"]
    node = subprocess.Popen(
        [*HIDE, unseen, *start, "--object-store-memory=80000000"],
        env=head.environment, cwd=head.environment["HOME"], start_new_session=True,
        stdout=log.open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        assert wait_until(lambda: "started" in log.read_text(), 60), log.read_text()
        yield
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def run(head: Head, place: Path, *command: str, **keys: object) -> "subprocess.CompletedProcess[str]":
    """A command in a folder, with a cluster file of some keys."""
    lines = [f"{name}: {value}" for name, value in {"name": "two", "address": head.address, **keys}.items()]
    (place / "two.yaml").write_text("\n".join(lines))
    variables = {"PYTHONPATH": str(REPOSITORY), "UNIFORK_CLUSTER": "two.yaml", "HOME": head.environment["HOME"]}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=place, env={**os.environ, **variables}, timeout=600,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(not CAN_HIDE, reason="a node without the shared disk needs mounts of its own")
def test_what_a_node_without_the_disk_and_a_driver_with_cpus_do(
    head: Head, second: None, unseen: Path, tmp_path: Path
) -> None:
    hidden = f"{{env_vars: {{HIDDEN: {unseen}}}}}"
    jobs = "{encode: {workers: 1, cpus: 3}}"  # on the second node
    done = run(head, unseen, "stages.program", jobs=jobs, runtime_env=hidden)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "driver on the head node" in done.stdout  # the head: nothing was asked for
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert line.startswith("error: node ")
    assert f" does not see {unseen}/runs/.ray/.shared-" in line

    done = run(head, unseen, "unifork.cli", "doctor", "--cluster", "two.yaml")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " GPUs" in line]
    assert sorted(line.split()[2] for line in lines) == ["failed", "ok"], done.stdout + done.stderr
    bad, good = sorted(lines, key=lambda line: line.split()[2])
    assert f"does not see {unseen}/.doctor-" in bad
    assert "root shared, flock holds" in good
    assert "tokens: token" in good

    both_see = folder(tmp_path / "seen")
    jobs = "{encode: {workers: 1, cpus: 1}}"
    done = run(head, both_see, "stages.program", driver="{cpus: 3}", jobs=jobs, runtime_env=hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "driver on the second node" in done.stdout
    assert "1 shards" in done.stdout

    done = run(head, both_see, "unifork.cli", "doctor", "--cluster", "two.yaml", "--bandwidth")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all-reduce of 64 MB over 2 nodes by gloo: \d+\.\d\d GB/s$", done.stdout, re.MULTILINE)

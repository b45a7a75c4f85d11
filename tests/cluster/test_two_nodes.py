"""Two nodes in token mode, on this machine: the second does not see the experiment, as without the shared disk."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_heads import BIN, Head, wait_until

REPOSITORY = Path(__file__).parents[2]
HIDE = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "hide"]
"""A command with mounts of its own: an empty disk covers its first argument."""
CAN_HIDE = subprocess.run([*HIDE, "/mnt", "true"], capture_output=True, check=False).returncode == 0

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(not CAN_HIDE, reason="a node without the shared disk needs mounts of its own"),
]

PROGRAM = """
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
        print(len(list(map_shards([ShardTask(output="a")], Name, (), cluster.jobs["work"]))), "shards")


if __name__ == "__main__":
    run_stage(main, "stages.program", [])
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A folder that the second node does not see."""
    return folder(tmp_path / "experiment")


def folder(path: Path) -> Path:
    (path / "stages").mkdir(parents=True)
    (path / "stages" / "__init__.py").touch()
    (path / "stages" / "program.py").write_text(PROGRAM)
    return path


@pytest.fixture
def second(head: Head, experiment: Path) -> Iterator[None]:
    """A node of four CPUs, where the head has two."""
    log = experiment.with_name("second.log")
    start = [BIN / "ray", "start", "--block", f"--address={head.joins}", "--num-cpus=4", "--num-gpus=0"]
    node = subprocess.Popen(
        [*HIDE, experiment, *start, "--object-store-memory=80000000"],
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


def test_what_a_node_without_the_disk_and_a_driver_with_cpus_do(
    head: Head, second: None, experiment: Path, tmp_path: Path
) -> None:
    hidden = f"{{env_vars: {{HIDDEN: {experiment}}}}}"
    jobs = "{work: {workers: 1, cpus: 3}}"  # on the second node
    done = run(head, experiment, "stages.program", jobs=jobs, runtime_env=hidden)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "driver on the head node" in done.stdout  # the head: nothing was asked for
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert line.startswith("error: node ")
    assert f" does not see {experiment}/runs/.ray/.shared-" in line

    done = run(head, experiment, "unifork.cli", "doctor", "--cluster", "two.yaml")
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " GPUs" in line]
    assert sorted(line.split()[2] for line in lines) == ["failed", "ok"], done.stdout + done.stderr
    bad, good = sorted(lines, key=lambda line: line.split()[2])
    assert f"does not see {experiment}/.doctor-" in bad
    assert "root shared, flock holds" in good
    assert "tokens: token" in good

    both_see = folder(tmp_path / "seen")
    jobs = "{work: {workers: 1, cpus: 1}}"
    done = run(head, both_see, "stages.program", driver="{cpus: 3}", jobs=jobs, runtime_env=hidden)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "driver on the second node" in done.stdout
    assert "1 shards" in done.stdout

    done = run(head, both_see, "unifork.cli", "doctor", "--cluster", "two.yaml", "--bandwidth")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^all-reduce of 64 MB over 2 nodes by gloo: \d+\.\d\d GB/s$", done.stdout, re.MULTILINE)

"""A package of programs beside a cluster file, as a checkout is; tests start them as `dvc repro` does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import sys
import time
from pathlib import Path

import unifork
from unifork.cluster import local_ray, map_shards
from unifork.config import in_job, load_cluster
from unifork.errors import DataError
from unifork.jobs import run_stage
from unifork.shards.task import ShardTask, Slice
from stages.worker import Square

OUTPUTS = [Path(name) for name in sys.argv[2:]]


def main():
    print(f"code from {Path(unifork.__file__).parent}")
    match sys.argv[1]:
        case "fail":
            sys.exit(7)
        case "mistake":
            raise DataError("shard 3: damaged")
        case "bug":
            raise ZeroDivisionError("internal mistake")
        case "wait":
            OUTPUTS[0].touch()
            time.sleep(600)
        case "note":
            OUTPUTS[0].write_text(f"{load_cluster().name} {in_job()}")
        case "work":
            cluster = load_cluster()
            encode = cluster.jobs["encode"]
            with local_ray(cluster, needed=encode.workers > 0):
                tasks = [ShardTask(piece=Slice(n, n + 1), output=str(n)) for n in range(4)]
                results = sorted(map_shards(tasks, Square, (), encode), key=lambda result: result.output)
            OUTPUTS[0].write_text(" ".join(result.problem for result in results))


if __name__ == "__main__":
    run_stage(main, "stages.program", sys.argv[1:], OUTPUTS)
"""

WORKER = """
from unifork.shards.task import ShardResult


class Square:
    def __call__(self, task):
        return ShardResult(task.output, problem=str(task.piece.start ** 2))
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """A folder with a package of programs and a cluster file, as a checkout is."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "__init__.py").touch()
    (tmp_path / "stages" / "program.py").write_text(PROGRAM)
    (tmp_path / "stages" / "worker.py").write_text(WORKER)
    (tmp_path / "local.yaml").write_text("name: local\njobs: {encode: {workers: 0}}\n")
    return tmp_path


class Start(Protocol):
    """Starts the program in the experiment's folder, as `dvc repro` does."""

    def __call__(self, cluster: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]": ...


@pytest.fixture
def start(experiment: Path) -> Iterator[Start]:
    """Programs of the experiment; none outlives the test."""
    processes = []

    def start(cluster: str, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "stages.program", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UNIFORK_CLUSTER": cluster, **environment}
        process = subprocess.Popen(
            command, cwd=experiment, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()

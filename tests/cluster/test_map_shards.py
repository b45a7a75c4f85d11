"""The same tasks give the same results in this process and in the actors of a Ray Data job."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from unifork.cluster import map_shards, run_jobs
from unifork.config import Cluster, JobResources
from unifork.errors import ConfigError, DataError, MachineError
from unifork.shards.job import ShardJob, write_shard
from unifork.shards.manifest import Shard
from unifork.shards.task import ShardResult, ShardTask, Slice

HERE = JobResources(workers=0)
ACTORS = JobResources(workers=2, cpus=0.5)


class Doubler:
    """Doubles the number of a task's slice, and misbehaves when the name of its file says so."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, task: ShardTask) -> ShardResult:
        assert task.piece is not None
        what, _, more = (task.piece.file or "").partition(" ")
        match what:
            case "reject":
                raise DataError(f"shard {task.piece.start}: not a Parquet file")
            case "end":
                raise MachineError("the disk is full")
            case "break":
                raise ZeroDivisionError("internal mistake")
            case "die":
                os._exit(3)
            case "die-once" if not Path(more).exists():
                Path(more).touch()
                os._exit(3)
            case "sleep":
                time.sleep(float(more))
        return done(task, str(self.factor * task.piece.start))


class Meeting:
    """Goes on when two of its tasks have met."""

    TASKS_AT_ONCE = 2

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def __call__(self, task: ShardTask) -> ShardResult:
        self.barrier.wait(30)
        return done(task, str(os.getpid()))


class Refuser:
    """Cannot even be made."""

    def __init__(self) -> None:
        raise DataError("tokenizer: codebook is missing")

    def __call__(self, task: ShardTask) -> ShardResult:
        return done(task, "")


class Reporter:
    """Says what its process has been given."""

    def __call__(self, task: ShardTask) -> ShardResult:
        import ray

        time.sleep(0.5)  # so that both actors get something to do
        facts = {
            "process": os.getpid(),
            "folder": os.getcwd(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpus": ray.get_gpu_ids(),
        }
        return done(task, json.dumps(facts))


def done(task: ShardTask, text: str) -> ShardResult:
    """A result that says something in the place of its shard's inputs."""
    return ShardResult(task.output, Shard(path="shard", rows=1, bytes=1, sha256="", inputs=text))


def queue(*files: str) -> list[ShardTask]:
    """Tasks with the numbers 1, 2, ..., each with a name of a file."""
    return [
        ShardTask(piece=Slice(number, number + 1, file), output=f"shard-{number}")
        for number, file in enumerate(files, 1)
    ]


def answers(*arguments: Any) -> list[str]:
    """What workers said, in the order of the tasks."""
    results = sorted(map_shards(*arguments), key=lambda result: result.output)
    return [result.shard.inputs if result.shard else f"({result.problem})" for result in results]


@pytest.fixture(scope="module")
def ray(ray_session: Cluster) -> Iterator[None]:
    """The session's Ray, whose worker processes cannot import this file: its classes travel by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(
    params=[
        pytest.param(HERE, id="here"),
        pytest.param(ACTORS, id="actors", marks=pytest.mark.slow),
    ]
)
def resources(request: pytest.FixtureRequest) -> JobResources:
    """Both ways to work."""
    if request.param.workers:
        request.getfixturevalue("ray")
    return request.param


def test_every_task_has_one_result(resources: JobResources) -> None:
    assert answers(queue(*[""] * 7), Doubler, (2,), resources) == ["2", "4", "6", "8", "10", "12", "14"]


def test_nothing_to_do(resources: JobResources) -> None:
    assert answers([], Doubler, (2,), resources) == []


def test_a_fault_of_one_shard_costs_that_shard(resources: JobResources) -> None:
    found = answers(queue("", "reject", "break", ""), Doubler, (2,), resources)
    assert found == ["2", "(shard 2: not a Parquet file)", "(ZeroDivisionError: internal mistake)", "8"]


def test_error_of_making_the_worker_arrives_as_itself(resources: JobResources) -> None:
    with pytest.raises(DataError, match=r"^tokenizer: codebook is missing$"):
        answers(queue(""), Refuser, (), resources)


def test_what_every_shard_would_meet_ends_the_job_at_once(ray: None) -> None:
    started = time.monotonic()
    with pytest.raises(MachineError, match=r"^the disk is full$"):
        answers(queue("sleep 60", "end"), Doubler, (2,), ACTORS)
    assert time.monotonic() - started < 30


def test_a_worker_that_wants_two_tasks_gets_them(ray: None) -> None:
    assert len(set(answers(queue(*[""] * 4), Meeting, (), JobResources(workers=1, cpus=0.5)))) == 1


def test_results_stream(ray: None) -> None:
    times = []
    for _ in map_shards(queue("sleep 0", "sleep 0.8", "sleep 1.6"), Doubler, (2,), JobResources(workers=1, cpus=0.5)):
        times.append(time.monotonic())
    assert times[1] - times[0] > 0.5
    assert times[2] - times[1] > 1


def test_a_worker_process_that_dies_is_replaced(ray: None, tmp_path: Path) -> None:
    assert answers(queue("", f"die-once {tmp_path / 'mark'}", ""), Doubler, (2,), ACTORS) == ["2", "4", "6"]


def test_a_task_that_always_kills_its_worker_ends_the_job(ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unifork.cluster.WORKER_RESTARTS", 1)
    with pytest.raises(RuntimeError, match=r"died more than 1 times; 1 shards unfinished: shard-1"):
        answers(queue("die"), Doubler, (2,), ACTORS)


def test_workers_get_the_gpus_threads_and_folder_asked_for(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two = JobResources(workers=2, cpus=1, gpus=1)
    with_gpus = [json.loads(answer) for answer in answers(queue(*[""] * 4), Reporter, (), two)]
    assert {(result["visible"], *result["gpus"]) for result in with_gpus} == {("0", 0), ("1", 1)}
    assert len({result["process"] for result in with_gpus}) == 2
    assert {result["folder"] for result in with_gpus} == {str(tmp_path)}
    assert {result["threads"] for result in with_gpus} == {"1"}


def test_more_than_there_is_fails_instead_of_waiting(ray: None) -> None:
    with pytest.raises(ConfigError, match="3 workers with 1 GPU each asked for, but this machine's Ray has 2 GPU"):
        answers(queue(*[""] * 4), Reporter, (), JobResources(workers=3, cpus=0.1, gpus=1))


# ----------------------------------------------------------------------------------- jobs over shards


def job(folder: Path, *files: str) -> ShardJob:
    """A job with one task for each name of a file."""
    tasks = [ShardTask(piece=Slice(number, number + 1, file)) for number, file in enumerate(files)]
    return ShardJob("numbers", "numbers", folder, {"n": "int64"}, {}, {}, tasks)


class Writer:
    """Writes a shard with one number; refuses a slice of a file that is named `bad`."""

    def __call__(self, task: ShardTask) -> ShardResult:
        assert task.piece is not None
        if task.piece.file == "bad":
            raise KeyError("row 7")
        return write_shard(task, pa.table({"n": [task.piece.start]}), {})


def test_a_job_finishes_what_it_can_and_names_the_rest(
    ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(name="tests", jobs={"encode": ACTORS})
    with pytest.raises(
        DataError, match=r"2 of 5 shards could not be made: part-00001.parquet: KeyError: 'row 7'; part-"
    ):
        run_jobs([job(tmp_path, "a", "bad", "b", "bad", "c")], Writer, cluster=cluster, step="encode")
    printed = capsys.readouterr()
    assert "3/5 shards, 2 failed" in printed.out
    assert f"{tmp_path}/part-00001.parquet: Traceback" in printed.err
    assert 'raise KeyError("row 7")' in printed.err
    assert not (tmp_path / "manifest.json").exists()
    run_jobs([job(tmp_path, "a", "ok", "b", "ok", "c")], Writer)
    assert "5/5 shards (3 kept from before), 2/2 rows" in capsys.readouterr().out


def test_a_fault_of_all_shards_ends_the_job_early(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="21 of 500 shards could not be made"):
        run_jobs([job(tmp_path, *["bad"] * 500)], Writer)

"""The same tasks give the same results in this process and in the actors of a Ray Data job."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unifork.cluster import map_shards
from unifork.config import Cluster, HopResources
from unifork.errors import ConfigError, DataError

HERE = HopResources(workers=0)
ACTORS = HopResources(workers=2, cpus=0.5)


class Doubler:
    """Doubles numbers, and misbehaves when a task says so."""

    def __init__(self, factor: int) -> None:
        self.factor, self.tasks = factor, 0

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        self.tasks += 1
        match task.get("do"):
            case "reject":
                raise DataError(f"shard {task['number']}: not a Parquet file")
            case "break":
                raise ZeroDivisionError("internal mistake")
            case "die":
                os._exit(3)
            case "die once" if not Path(task["mark"]).exists():
                Path(task["mark"]).touch()
                os._exit(3)
            case "sleep":
                time.sleep(task["seconds"])
        return {"number": self.factor * task["number"], "nested": {"maybe": [None, "text", 0.5]}, "none": None}


class Meeting:
    """Goes on when two of its tasks have met."""

    TASKS_AT_ONCE = 2

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        self.barrier.wait(30)
        return {"process": os.getpid()}


class Refuser:
    """Cannot even be made."""

    def __init__(self) -> None:
        raise DataError("tokenizer: codebook is missing")

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        return task


class Reporter:
    """Says what its process has been given."""

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        import ray

        time.sleep(0.5)  # so that both actors get something to do
        return {
            "process": os.getpid(),
            "folder": os.getcwd(),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "gpus": ray.get_gpu_ids(),
        }


@pytest.fixture(scope="module")
def ray(ray_session: Cluster) -> Iterator[None]:
    """The session's Ray, whose worker processes cannot import this file: its classes travel by value."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(params=[HERE, ACTORS], ids=["here", "actors"])
def resources(request: pytest.FixtureRequest) -> HopResources:
    """Both ways to work."""
    if request.param.workers:
        request.getfixturevalue("ray")
    return request.param


def test_results_come_in_the_order_of_tasks(resources: HopResources) -> None:
    seen: list[dict[str, Any]] = []
    tasks = [{"number": number, "maybe": None if number % 2 else {"a": [1, None]}} for number in range(7)]
    results = map_shards(tasks, Doubler, (2,), resources, seen.append)
    assert [result["number"] for result in results] == [0, 2, 4, 6, 8, 10, 12]
    assert results[0] == {"number": 0, "nested": {"maybe": [None, "text", 0.5]}, "none": None}
    assert sorted(result["number"] for result in seen) == [0, 2, 4, 6, 8, 10, 12]


def test_nothing_to_do(resources: HopResources) -> None:
    assert map_shards([], Doubler, (2,), resources) == []


def test_error_of_a_user_arrives_as_itself(resources: HopResources) -> None:
    tasks = [{"number": 1}, {"number": 2, "do": "reject"}, {"number": 3, "do": "sleep", "seconds": 0.1}]
    with pytest.raises(DataError) as caught:
        map_shards(tasks, Doubler, (2,), resources)
    assert str(caught.value) == "shard 2: not a Parquet file"


def test_error_of_making_the_worker_arrives_as_itself(resources: HopResources) -> None:
    with pytest.raises(DataError, match=r"^tokenizer: codebook is missing$"):
        map_shards([{"number": 1}], Refuser, (), resources)


def test_error_of_the_program_names_the_task(ray: None) -> None:
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError: internal mistake\nin the worker of task .*'number': 5"):
        map_shards([{"number": 5, "do": "break"}], Doubler, (2,), ACTORS)


def test_an_error_ends_the_job_at_once(ray: None) -> None:
    started = time.monotonic()
    with pytest.raises(DataError):
        map_shards([{"number": 1, "do": "sleep", "seconds": 60}, {"number": 2, "do": "reject"}], Doubler, (2,), ACTORS)
    assert time.monotonic() - started < 30


def test_a_worker_that_wants_two_tasks_gets_them(ray: None) -> None:
    one = HopResources(workers=1, cpus=0.5)
    assert len({result["process"] for result in map_shards([{}] * 4, Meeting, (), one)}) == 1


def test_results_stream(ray: None) -> None:
    times: list[float] = []
    tasks = [{"number": number, "do": "sleep", "seconds": 0.8 * number} for number in range(3)]
    one = HopResources(workers=1, cpus=0.5)
    map_shards(tasks, Doubler, (2,), one, lambda result: times.append(time.monotonic()))
    assert times[1] - times[0] > 0.5
    assert times[2] - times[1] > 1


def test_a_worker_process_that_dies_is_replaced(ray: None, tmp_path: Path) -> None:
    tasks = [{"number": 1}, {"number": 2, "do": "die once", "mark": str(tmp_path / "mark")}, {"number": 3}]
    assert [result["number"] for result in map_shards(tasks, Doubler, (2,), ACTORS)] == [2, 4, 6]


def test_a_task_that_always_kills_its_worker_ends_the_job(ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unifork.cluster.WORKER_RESTARTS", 1)
    with pytest.raises(RuntimeError, match=r"died more than 1 times; unfinished: .*'do': 'die'"):
        map_shards([{"number": 1, "do": "die"}], Doubler, (2,), ACTORS)


def test_workers_get_the_gpus_threads_and_folder_asked_for(
    ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with_gpus = map_shards([{}] * 4, Reporter, (), HopResources(workers=2, cpus=1, gpus=1))
    assert {(result["visible"], *result["gpus"]) for result in with_gpus} == {("0", 0), ("1", 1)}
    assert len({result["process"] for result in with_gpus}) == 2
    assert {result["folder"] for result in with_gpus} == {str(tmp_path)}
    assert {result["threads"] for result in with_gpus} == {"1"}


def test_more_than_there_is_fails_instead_of_waiting(ray: None) -> None:
    with pytest.raises(ConfigError, match="3 workers with 1 GPU each asked for, but this Ray has 2 GPU"):
        map_shards([{}] * 4, Reporter, (), HopResources(workers=3, cpus=0.1, gpus=1))

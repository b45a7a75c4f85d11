"""SIGTERM and SIGINT: every worker saves after the same step, the exit code is the signal's, the end is the same."""

import os
import random
import re
import signal
import threading
import time

import pytest
from distributed_testing import run_distributed
from forks import SERVER
from stage_runs import RESOURCES, assert_equal, job, weights, worker
from tiny import copy_of

from unifork.config import TrainResources
from unifork.errors import Stopped
from unifork.training import export, stage
from unifork.training.history import History, read
from unifork.training.launch import launch
from unifork.training.loop import WorkerContext
from unifork.training.requests import Requests, signals
from unifork.training.stage import StageJob, train_stage

pytestmark = pytest.mark.slow

KEY = "unifork-s2-pretrain"


def log_of(stage_job):
    return (stage_job.run_folder / "log.txt").read_text()


def latest(stage_job):
    path = stage_job.run_folder / "latest"
    return int(path.read_text().removeprefix("step-")) if path.exists() else 0


def assert_unbroken(stage_job, unbroken):
    assert_equal(weights(stage_job), unbroken[KEY][0])
    assert read(stage_job.run_folder) == unbroken[KEY][1]


def signal_at(monkeypatch, owner, name, number):
    """Have this process get a signal when it calls something."""
    original = getattr(owner, name)

    def calling(*args, **options):
        os.kill(os.getpid(), number)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, calling)


def signal_in_step(monkeypatch, step, number, times=1):
    original = History.add

    def add(self, row):
        for _ in range(times * (row["step"] == step)):
            os.kill(os.getpid(), number)
        original(self, row)

    monkeypatch.setattr(History, "add", add)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_that_is_under_way_and_the_run_ends_as_unbroken(root, monkeypatch, unbroken, number):
    stage_job = job(root, checkpoint_every=100)
    signal_in_step(monkeypatch, 2, number)  # the record of a step is written while the next one is under way
    with pytest.raises(Stopped, match=rf"{number.name}: every finished step is saved") as caught:
        launch(stage_job)
    assert caught.value.code == 128 + number
    assert latest(stage_job) == 4
    assert "stopped by a signal after step 4 of 8, which is saved" in log_of(stage_job)
    monkeypatch.undo()
    launch(stage_job)
    assert "continuing from step 4 of 8" in log_of(stage_job)
    assert_unbroken(stage_job, unbroken)


@pytest.mark.parametrize(("owner", "name"), [(stage, "TrackLoader"), (stage, "export"), (export, "write_csv")])
def test_a_signal_outside_the_steps_ends_at_once(root, monkeypatch, unbroken, owner, name):
    stage_job = job(root)
    signal_at(monkeypatch, owner, name, signal.SIGTERM)
    with pytest.raises(Stopped):
        launch(stage_job)
    assert not stage_job.model_folder.exists()
    monkeypatch.undo()
    launch(stage_job)
    assert_unbroken(stage_job, unbroken)


def test_handlers_are_as_before_when_training_ends(root):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with signals(lambda number: None):
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def _twice():
    requests = Requests()
    with signals(requests.receive), requests.defer():
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.signal == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)


def test_a_second_signal_ends_at_once():
    process = SERVER.Process(target=_twice)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGTERM


def test_the_signal_of_a_dead_parent_is_no_second_one(monkeypatch):
    received = []
    with signals(received.append):
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(os, "getppid", lambda: 1)
        os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]


def _of_two(rank, world, plain):
    """The worker of rank 1 has a signal in its third step; what both end with."""
    requests = Requests()
    original = stage.TrackRun.step

    def step(self, *args):
        if rank == 1 and args[2] == 2:
            requests.receive(signal.SIGINT)
        return original(self, *args)

    stage.TrackRun.step = step
    with pytest.raises(Stopped) as caught:
        train_stage(StageJob.model_validate(plain), WorkerContext(rank, world, requests=requests))
    return caught.value.number


def test_a_signal_of_any_worker_saves_all_after_the_same_step(root):
    """It travels with the losses of step 3, which are read when step 4 is under way: that is the one more step."""
    two = job(root, checkpoint_every=100, resources=RESOURCES.model_copy(update={"workers": 2}))
    assert run_distributed(_of_two, 2, two.model_dump(mode="json")) == [signal.SIGTERM, signal.SIGINT]
    assert latest(two) == 4
    assert len(read(two.run_folder)) == 4


def _trained(plain):
    try:
        launch(StageJob.model_validate(plain))
    except Stopped as stopped:
        os._exit(stopped.code)


def test_a_signal_at_a_random_moment(root, unbroken):
    """In a process of its own; then on to the end."""
    stage_job, stops = job(root, checkpoint_every=100), 0
    random.seed(5)
    for _ in range(3):
        process = SERVER.Process(target=_trained, args=(stage_job.model_dump(mode="json"),))
        process.start()
        before, deadline = latest(stage_job), time.monotonic() + 60
        log = stage_job.run_folder / "log.txt"
        starts = log_of(stage_job).count("parameters\n") if log.exists() else 0
        while not (log.exists() and log_of(stage_job).count("parameters\n") > starts) and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.15))
        steps = len(read(stage_job.run_folder))
        process.terminate()
        process.join()
        assert process.exitcode in (0, 128 + signal.SIGTERM)
        stops += process.exitcode != 0
        assert latest(stage_job) >= max(before, steps)
        assert len(read(stage_job.run_folder)) == latest(stage_job)
    launch(stage_job)
    assert stops
    assert_unbroken(stage_job, unbroken)


def test_checkpoint_minutes_save_between_the_steps_of_checkpoint_every(root, monkeypatch, unbroken):
    stage_job = job(root, checkpoint_every=100, checkpoint_minutes=1e-9)
    saved = []
    monkeypatch.setattr(stage.checkpoint.Saver, "save", lambda *args: saved.append(args[3].total))
    monkeypatch.setattr(stage, "export", lambda *args: None)
    train_stage(stage_job, WorkerContext())
    assert saved == [2, 4, 6, 8]  # asked for in one step, read in the next
    assert stage_job.fingerprint() == job(root).fingerprint()


@pytest.mark.parametrize("again", ["two processes", pytest.param("the same command", marks=pytest.mark.soak)])
def test_two_ray_workers_save_after_the_same_step_and_end_as_unbroken(
    ray_session, root, tiny_root, tmp_path, monkeypatch, again
):
    """No restart is spent; the run goes on and has the bytes of two workers without a signal."""
    resources = TrainResources(workers=2, cpus=0.5, threads=1, row_tokens=384, max_restarts=2)
    stage_job, alone = (
        job(place, resources=resources, checkpoint_every=1000, steps=20)
        for place in (root, copy_of(tiny_root, tmp_path / "alone"))
    )

    def send():
        while not (stage_job.run_folder / "history.jsonl").exists() or len(read(stage_job.run_folder)) < 5:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    def slowly(config):  # so that the signal comes before the end
        from unifork.training import launch
        from unifork.training.history import History

        add = History.add
        History.add = lambda self, row: (time.sleep(0.3), add(self, row))
        launch._worker(config)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Stopped, match="SIGTERM"), monkeypatch.context() as patch:
        patch.setattr("unifork.training.launch._worker", slowly)
        launch(stage_job)
    (step,) = re.findall(r"stopped by a signal after step (\d+) of 20", log_of(stage_job))
    assert latest(stage_job) == len(read(stage_job.run_folder)) == int(step)
    if again == "two processes":
        run_distributed(worker, 2, stage_job.model_dump(mode="json"))
    else:
        launch(stage_job)
    assert log_of(stage_job).count("starting, 20 steps") == 1
    assert log_of(stage_job).count(f"continuing from step {step} of 20") == 1
    run_distributed(worker, 2, alone.model_dump(mode="json"))
    assert_equal(weights(stage_job), weights(alone))
    assert read(stage_job.run_folder) == read(alone.run_folder)

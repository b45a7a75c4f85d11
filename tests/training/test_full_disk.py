"""A disk that takes nothing more, or a writer that dies: one line within seconds, and the last checkpoint stays."""

import errno
import multiprocessing
import re
import subprocess
import time

import pytest
from forks import SERVER
from small_disk import mount, needs_mounts
from stage_runs import RESOURCES, assert_equal, job, weights

from unifork.cluster import local_ray
from unifork.config import Cluster
from unifork.errors import MachineError
from unifork.training import checkpoint
from unifork.training.history import History, read
from unifork.training.launch import launch
from unifork.training.loggers import TensorBoard
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

KEY = "unifork-s2-pretrain"
STEP_BYTES = 3_200_000
SPAWN = multiprocessing.get_context("spawn")
SECONDS = 20
"""Within which a run must have ended after its last step."""


def on_a_small_disk(plain, size, pipe):
    """Train with `runs` on a disk of some bytes, then (one worker) with room for all; what was seen in between."""
    stage_job = StageJob.model_validate(plain)
    runs = stage_job.run_folder.parent
    mount(runs, size)
    with local_ray(Cluster(name="small", cpus=2, object_store_mb=80), needed=stage_job.resources.workers > 0):
        try:
            launch(stage_job)
            error = None
        except MachineError as problem:
            error = str(problem)
        history = stage_job.run_folder / "history.jsonl"
        waited = time.time() - history.stat().st_mtime if history.exists() else 0
        found = checkpoint.latest(stage_job.run_folder)
        if not stage_job.resources.workers:  # a second fit costs much and shows nothing new
            subprocess.run(["mount", "-o", "remount,size=200m", str(runs)], check=True)
            launch(stage_job)
        log = (stage_job.run_folder / "log.txt").read_text()
    pipe.send((error, waited, found and found[0].name, log, read(stage_job.run_folder)))


def outcome(stage_job, size, context):
    stage_job.run_folder.parent.mkdir(exist_ok=True)
    here, there = context.Pipe()
    process = context.Process(target=on_a_small_disk, args=(stage_job.model_dump(mode="json"), size, there))
    process.start()
    there.close()
    try:
        assert here.poll(200)
        return here.recv()
    finally:
        process.kill()
        process.join()


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("share", [0.002, 0.4, 1.3, 2.4])
def test_a_full_disk_ends_training_with_one_line_and_room_lets_it_go_on(root, unbroken, share):
    stage_job = job(root, checkpoint_every=2)
    error, waited, latest, log, history = outcome(stage_job, int(share * STEP_BYTES), SERVER)
    assert re.fullmatch(r"/[^\n]*: (the checkpoint )?cannot be written: [^\n]*", error)
    assert waited < SECONDS
    assert latest == {0.002: None, 0.4: None, 1.3: "step-2", 2.4: "step-4"}[share]
    assert ("continuing from" in log) == (latest is not None)
    assert_equal(weights(stage_job), unbroken[KEY][0])
    assert history == unbroken[KEY][1]


@needs_mounts
@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.soak
def test_a_full_disk_ends_two_workers_and_is_no_failure_to_ray(root):
    resources = RESOURCES.model_copy(update={"workers": 2, "cpus": 0.5, "max_restarts": 3})
    stage_job = job(root, checkpoint_every=2, resources=resources)
    error, waited, latest, log, history = outcome(stage_job, int(1.3 * STEP_BYTES), SPAWN)
    assert "cannot be written" in error
    assert waited < SECONDS
    assert latest == "step-2"
    assert log.count("starting, 8 steps") == 1
    assert "continuing" not in log
    assert len(history) >= 2


def fails(*args, **content):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITERS = {
    "events": (TensorBoard, "_write_event"),
    "checkpoint": (checkpoint, "fsync_tree"),
    "state": (checkpoint, "write_json"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_that_dies_ends_the_run(root, monkeypatch, writer):
    monkeypatch.setattr(*WRITERS[writer], fails)
    stage_job = job(root, checkpoint_every=3)
    with pytest.raises(MachineError, match=r"cannot be written: No space left on device\. Make room"):
        train_stage(stage_job, WorkerContext())
    assert not (stage_job.run_folder / "latest").exists()
    assert not stage_job.model_folder.exists()


def test_a_checkpoint_thread_that_dies_is_noticed_before_the_next_checkpoint(root, monkeypatch):
    def dies(*args, **options):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    original = History.add

    def add(self, row):
        if row["step"] == 3:
            time.sleep(1)  # for the thread to end
        original(self, row)

    monkeypatch.setattr(checkpoint, "save_shards", dies)
    monkeypatch.setattr(History, "add", add)
    stage_job = job(root, checkpoint_every=3)
    with pytest.raises(MachineError, match=r"step-3: the checkpoint cannot be written"):
        train_stage(stage_job, WorkerContext())
    assert len(read(stage_job.run_folder)) < 6

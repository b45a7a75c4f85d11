"""What the tests of stages share."""

import pytest
from builds import built_once
from stage_runs import job_named, weights
from tiny import copy_of

from unifork.training.history import read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage


@pytest.fixture
def root(tiny_root, tmp_path):
    return copy_of(tiny_root, tmp_path / "root")


@pytest.fixture(scope="session")
def unbroken(tiny_root, tmp_path_factory):
    """The stages run without interruption: weights and history by key."""
    keys = ("unifork-s2-pretrain", "unifork-s3", "edge")

    def train(folder):
        for key in keys:
            train_stage(job_named(copy_of(tiny_root, folder / key), key), WorkerContext())

    folder = built_once(tmp_path_factory, "unbroken", train)
    jobs = {key: job_named(folder / key, key) for key in keys}
    return {key: (weights(stage_job), read(stage_job.run_folder)) for key, stage_job in jobs.items()}

"""What the tests of stages share."""

import pytest
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
    done = {}
    for key in ("unifork-s2-pretrain", "unifork-s3", "edge"):
        stage_job = job_named(copy_of(tiny_root, tmp_path_factory.mktemp("unbroken") / "root"), key)
        train_stage(stage_job, WorkerContext())
        done[key] = weights(stage_job), read(stage_job.run_folder)
    return done

"""A stage that extends another goes on where it ended: optimizer state, order, averages."""

import json
import shutil

import pytest
import torch
from stage_runs import assert_equal, job, killed, weights
from tiny import copy_of

from unifork.config import Averaging
from unifork.errors import CheckpointError
from unifork.training.history import read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow

EMA = Averaging(decay=0.5)
CONSTANT = {"schedule": "constant", "warmup_steps": 2}


def with_schedule(stage, steps, **optimizer):
    tracks = {
        name: track.model_copy(
            update={"steps": steps, "optimizer": track.optimizer.model_copy(update=CONSTANT | optimizer)}
        )
        for name, track in stage.tracks.items()
    }
    return stage.model_copy(update={"tracks": tracks})


def jobs(root, key, *lengths, ema=EMA, **optimizer):
    """A stage and those that extend it, one after the other, of so many steps for each track."""
    first = job(root, key, ema=ema)
    run, name = first.experiment.runs[key], first.experiment.runs[key].stage
    stages, runs, previous = {}, {}, None
    for number, steps in enumerate(lengths):
        now = name if previous is None else f"{name}-{number}"
        changes = {} if previous is None else {"warmup_steps": 0, **optimizer}
        stages[now] = with_schedule(first.stage, steps, **changes).model_copy(update={"extend": previous})
        after = run.after if previous is None else f"models/{run.variant}-{previous}"
        runs[f"{run.variant}-{now}"] = run.model_copy(update={"stage": now, "after": after})
        previous = now
    experiment = first.experiment.model_copy(update={"stages": stages, "runs": runs})
    return [first.model_copy(update={"key": key, "experiment": experiment}) for key in runs]


def trained_in_turn(every):
    for stage_job in every:
        train_stage(stage_job, WorkerContext())
    return every[-1]


@pytest.fixture(scope="module")
def longer(tiny_root, tmp_path_factory):
    """Twelve steps of each track at once."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("longer") / "root")
    return trained_in_turn(jobs(root, "unifork-s3", 12))


def by_track(rows, first, stop):
    """Rows of some steps of every track; where a stage begins, turns begin anew."""
    return sorted((row for row in rows if first <= row["step"] < stop), key=lambda row: (row["track"], row["step"]))


def test_parts_make_the_longer_stage_bit_by_bit(root, longer):
    every = jobs(root, "unifork-s3", 5, 3, 4)
    end = trained_in_turn(every)
    assert_equal(weights(end), weights(longer))  # the average
    for stage_job, first, stop in zip(every, (0, 5, 8), (5, 8, 12), strict=True):
        rows = read(stage_job.run_folder)
        assert len(rows) == 2 * (stop - first)
        assert by_track(rows, first, stop) == by_track(read(longer.run_folder), first, stop)
    summaries = [json.loads((j.model_folder / "training/summary.json").read_text()) for j in (end, longer)]
    assert summaries[0]["documents"] == summaries[1]["documents"]
    assert summaries[0]["tensors"] == summaries[1]["tensors"]


def test_trained_weights_go_on_where_the_model_has_the_average(root, longer):
    """The extending stage averages nothing; its model has what the longer stage trained."""
    first, second = jobs(root, "unifork-s3", 8, 4)
    bare = {name: stage.model_copy(update={"ema": None}) for name, stage in second.experiment.stages.items()}
    bare["s3"] = first.stage
    train_stage(first, WorkerContext())
    second = second.model_copy(update={"experiment": second.experiment.model_copy(update={"stages": bare})})
    train_stage(second, WorkerContext())
    (whole,) = jobs(
        copy_of(longer.layout.root, root.parent / "whole"),
        "unifork-s3",
        12,
        ema=EMA.model_copy(update={"export": False}),
    )
    train_stage(whole, WorkerContext())
    assert_equal(weights(second), weights(whole))


@pytest.mark.parametrize(("where", "when"), [("before the update", 2), ("between latest and the metrics", 1)])
def test_killed_it_ends_the_same_without_the_run_that_it_extends(root, longer, where, when):
    first, second = jobs(root, "unifork-s3", 8, 4)
    train_stage(first, WorkerContext())
    killed(second, where, when)
    if when == 1:  # there is a checkpoint of its own, in which one track has had no step
        shutil.rmtree(first.run_folder)
    train_stage(second, WorkerContext())
    assert_equal(weights(second), weights(longer))
    assert read(second.run_folder) == read(longer.run_folder)[16:]


def test_another_rate_midway_is_that_of_the_stage(root):
    first, second = jobs(root, "unifork-s2-pretrain", 3, 4, ema=None, schedule="cosine", learning_rate=0.0002)
    train_stage(first, WorkerContext())
    train_stage(second, WorkerContext())
    rows = read(second.run_folder)
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert rows[0]["learning_rate"] == pytest.approx(0.0002 * 0.5 * (1 + 2**-0.5))
    assert rows[-1]["learning_rate"] == pytest.approx(0)


def damaged(folder, name):
    path = next(folder.glob(f"step-*/{name}"))
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE = {
    "no checkpoint there": lambda j: shutil.rmtree(j.run_folder),
    "bytes instead of": lambda j: damaged(j.run_folder, "*.distcp"),
    "not the end of the run that .*unifork-s2-pretrain was made by": lambda j: other_history(j.model_folder),
}


def other_history(model):
    path = model / "training/summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"history": "0123456789abcdef"}))


@pytest.mark.parametrize("message", DAMAGE)
def test_a_state_that_is_gone_or_another_is_refused_with_what_to_do(root, message):
    first, second = jobs(root, "unifork-s2-pretrain", 3, 2, ema=None)
    train_stage(first, WorkerContext())
    DAMAGE[message](first)
    with pytest.raises(CheckpointError, match=rf"{message}.*dvc repro --force --single-item train@unifork-s2-pretrain"):
        train_stage(second, WorkerContext())
    assert not second.model_folder.exists()
    assert torch.is_tensor(weights(first)["codebook"])

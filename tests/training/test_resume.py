"""A stage that is killed, changed, damaged or moved to other workers; what a checkpoint holds."""

import json
import shutil
import threading

import pytest
import torch
from distributed_testing import run_distributed
from stage_runs import RESOURCES, assert_equal, job, job_named, killed, train_and_die, weights
from tiny import copy_of
from torch.multiprocessing.spawn import ProcessExitedException

from unifork.config import fingerprint
from unifork.training import checkpoint, stage
from unifork.training.history import History, read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow

KILLS = [
    ("unifork-s2-pretrain", "before the update", 5),
    ("unifork-s2-pretrain", "after the update", 5),
    ("unifork-s2-pretrain", "in the middle of a checkpoint", 2),
    ("unifork-s2-pretrain", "between checkpoint and latest", 2),
    ("unifork-s2-pretrain", "between latest and the metrics", 1),
    ("unifork-s2-pretrain", "before the history", 3),
    # steps 4 to 6 of Stage III are generation, understanding, understanding
    ("unifork-s3", "after the update", 4),
    ("unifork-s3", "after the update", 6),
    ("unifork-s3", "between latest and the metrics", 2),
    # a checkpoint lies exactly where the data set's second pass begins
    ("edge", "between latest and the metrics", (2, 1)),
    ("edge", "after the update", (7, 1)),
]


@pytest.mark.parametrize(("key", "where", "when"), KILLS)
def test_killed_twice_and_resumed_ends_with_the_same_weights_and_history(root, unbroken, key, where, when):
    stage_job = job_named(root, key)
    for reached in when if isinstance(when, tuple) else (when, when):
        killed(stage_job, where, reached)
    train_stage(stage_job, WorkerContext())
    expected, history = unbroken[key]
    assert_equal(weights(stage_job), expected)
    assert read(stage_job.run_folder) == history


def in_bfloat16(root, **more):
    stage_job = job(root, "unifork-s3", **more)
    stage = stage_job.experiment.stages["s3"]
    tracks = {name: track.model_copy(update={"precision": "bfloat16"}) for name, track in stage.tracks.items()}
    stages = {"s3": stage.model_copy(update={"tracks": tracks})}
    return stage_job.model_copy(update={"experiment": stage_job.experiment.model_copy(update={"stages": stages})})


def test_bfloat16_resumes_bit_equal_and_keeps_float32_weights(root, unbroken):
    train_stage(in_bfloat16(root), WorkerContext())
    stage_job = in_bfloat16(copy_of(root, root.parent / "killed"))
    shutil.rmtree(stage_job.run_folder)
    killed(stage_job, "between latest and the metrics", 1)
    train_stage(stage_job, WorkerContext())
    assert not torch.distributed.is_initialized()
    assert "continuing from step 3 of 16" in (stage_job.run_folder / "log.txt").read_text()
    expected, history = weights(in_bfloat16(root)), read(in_bfloat16(root).run_folder)
    assert_equal(weights(stage_job), expected)
    assert read(stage_job.run_folder) == history
    plain, plain_history = unbroken["unifork-s3"]
    assert torch.equal(expected["codebook"], plain["codebook"])
    assert {tensor.dtype for tensor in expected.values()} == {torch.float32}
    assert any(not torch.equal(expected[name].bfloat16().float(), expected[name]) for name in expected)
    for ours, theirs in zip(history, plain_history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=5e-2)


def test_another_configuration_never_continues_old_weights(root, unbroken):
    stage_job = job(root)
    killed(stage_job, "after the update", 7)
    changed = job(root, seed=7)
    train_stage(changed, WorkerContext())
    aside = stage_job.run_folder.with_name(stage_job.run_folder.name + ".old-1")
    assert (aside / "latest").exists()
    assert len(read(changed.run_folder)) == 8
    assert not torch.equal(
        weights(changed)["lm_head.weight" if "lm_head.weight" in weights(changed) else "embed_tokens.weight"],
        unbroken["unifork-s2-pretrain"][0]["embed_tokens.weight"],
    )
    log = (changed.run_folder / "log.txt").read_text()
    assert "starting afresh" in log
    assert "starting, 8 steps" in log


def test_what_changes_only_the_speed_does_not_start_afresh(root):
    stage_job = job(root)
    killed(stage_job, "between latest and the metrics", 1)
    train_stage(
        job(
            root,
            checkpoint_every=2,
            sample_prompts=("a circle",),
            resources=RESOURCES.model_copy(update={"row_tokens": 512}),
        ),
        WorkerContext(),
    )
    assert "continuing from step 3 of 8" in (stage_job.run_folder / "log.txt").read_text()


VERSIONS = ("TRAIN_VERSION", "MODEL_VERSION", "DOCUMENTS_VERSION", "VOCABULARY_VERSION")


@pytest.mark.parametrize("version", VERSIONS)
def test_another_version_of_the_code_never_continues_old_weights(root, monkeypatch, version):
    stage_job = job(root)
    first = stage_job.fingerprint()
    (stage_job.run_folder / "step-1").mkdir(parents=True)
    (stage_job.run_folder / "step-1" / "history.jsonl").touch()
    state = {"format": checkpoint.FORMAT, "fingerprint": first, "files": {}, "steps": {"joint": 1}}
    state[checkpoint.HASH] = fingerprint(state)
    (stage_job.run_folder / "step-1" / "state.json").write_text(json.dumps(state))
    (stage_job.run_folder / "latest").write_text("step-1")
    stage._make_room(stage_job, first, lambda line: None)
    assert (stage_job.run_folder / "latest").exists()
    monkeypatch.setattr(stage, version, getattr(stage, version) + 1)
    assert stage_job.fingerprint() != first
    stage._make_room(stage_job, stage_job.fingerprint(), lambda line: None)
    assert not (stage_job.run_folder / "latest").exists()
    assert (stage_job.run_folder.with_name(stage_job.run_folder.name + ".old-1") / "latest").exists()


def test_a_finished_run_is_not_trained_again_by_the_same_version_but_is_by_another(root, monkeypatch):
    stage_job = job(root)
    train_stage(stage_job, WorkerContext())
    first = weights(stage_job)
    shutil.rmtree(stage_job.model_folder)
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), first)
    assert "continuing from step 8 of 8" in (stage_job.run_folder / "log.txt").read_text()
    monkeypatch.setattr(stage, "TRAIN_VERSION", 99)
    train_stage(stage_job, WorkerContext())
    assert stage_job.run_folder.with_name(stage_job.run_folder.name + ".old-1").exists()
    assert_equal(weights(stage_job), first)


def test_training_goes_on_while_a_checkpoint_is_written_and_latest_waits_for_the_disk(root, monkeypatch, unbroken):
    """The first checkpoint, after step 3, reaches the disk only when step 5 is done."""
    flush, stepped, latest = checkpoint.fsync_tree, threading.Event(), []

    def slow(folder):
        assert stepped.wait(60)
        flush(folder)

    def watched(self, row):
        latest.append((root / "runs/unifork-s2-pretrain/latest").exists())
        if row["step"] == 4:
            stepped.set()
        add(self, row)

    add = History.add
    monkeypatch.setattr(checkpoint, "fsync_tree", slow)
    monkeypatch.setattr(History, "add", watched)
    stage_job = job(root)
    train_stage(stage_job, WorkerContext())
    assert latest[:5] == [False] * 5
    assert latest[-1]  # the second checkpoint waits for the first
    assert_equal(weights(stage_job), unbroken["unifork-s2-pretrain"][0])


def test_a_checkpoint_lists_and_exports_every_tensor(root):
    stage_job = job(root, "unifork-s3", steps=2)
    train_stage(stage_job, WorkerContext())
    path, plain = checkpoint.latest(stage_job.run_folder)
    whole = checkpoint.all_tensors(checkpoint.whole_model(path, stage_job.start))
    assert {name: (list(t.shape), str(t.dtype)) for name, t in whole.items()} == {
        name: (listed["shape"], listed["dtype"]) for name, listed in plain["tensors"].items()
    }
    trained = {name for name, listed in plain["tensors"].items() if listed["trained"]}
    assert trained
    assert all("generation" in n or "understanding" in n or n.startswith("image_head.") for n in trained)
    assert_equal({name: whole[name] for name in weights(stage_job)}, weights(stage_job))


@pytest.mark.parametrize("shard", ["none", "all"])
def test_training_goes_on_with_two_workers_and_then_with_one(root, unbroken, shard):
    """Killed on one worker, then on two, finished on one: the same documents, the losses within reduction noise."""
    stage_job = job(root, checkpoint_every=2)
    killed(stage_job, "between latest and the metrics", 1)
    two = job(root, checkpoint_every=2, resources=RESOURCES.model_copy(update={"workers": 2, "shard": shard}))
    with pytest.raises(ProcessExitedException):
        run_distributed(_dying_worker, 2, two.model_dump(mode="json"))
    train_stage(stage_job, WorkerContext())
    log = (stage_job.run_folder / "log.txt").read_text()
    assert "continuing from step 2 of 8" in log
    assert "continuing from step 4 of 8" in log
    for ours, theirs in zip(read(stage_job.run_folder), unbroken["unifork-s2-pretrain"][1], strict=True):
        assert ours["documents_hash"] == theirs["documents_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, tensor in weights(stage_job).items():
        assert torch.allclose(tensor, unbroken["unifork-s2-pretrain"][0][name], atol=2e-4), name


def _dying_worker(rank, world, plain):
    train_and_die(plain, "between latest and the metrics", 1, rank, world)

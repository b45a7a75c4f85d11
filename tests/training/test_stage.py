"""A stage from start to end: killed and resumed, changed, frozen, shared among workers."""

import csv
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import copy_of

from unifork.config import Experiment, TrainResources, load
from unifork.errors import CheckpointError, UniForkError
from unifork.training import checkpoint, loop
from unifork.training.distributed_testing import run_distributed
from unifork.training.history import History, read
from unifork.training.loop import Run
from unifork.training.stage import StageJob, train_stage

RESOURCES = TrainResources(threads=1, row_tokens=384)


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


def job(root, key="unifork-s2-pretrain", resources=RESOURCES, **stage_changes):
    """A short stage that begins with the fresh model."""
    experiment = load(Experiment, root / "params.yaml")
    name = experiment.runs[key].stage
    stage = experiment.stages[name]
    changes = {"checkpoint_every": 3, "sample_prompts": (), **stage_changes}
    steps = changes.pop("steps", 8)
    tracks = {n: t.model_copy(update={"steps": steps, "batch_documents": 8}) for n, t in stage.tracks.items()}
    runs = {key: experiment.runs[key].model_copy(update={"after": "models/unifork-init"})}
    stages = {name: stage.model_copy(update={"tracks": tracks, **changes})}
    experiment = experiment.model_copy(update={"runs": runs, "stages": stages})
    return StageJob(key=key, experiment=experiment, resources=resources, root=str(root))


def weights(one):
    return load_file(one.model_folder / "model.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def root(tiny_root, tmp_path):
    return copy_of(tiny_root, tmp_path / "root")


@pytest.fixture(scope="module")
def unbroken(tiny_root, tmp_path_factory):
    """Both stages run without interruption: weights and history by key."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("unbroken") / "root")
    done = {}
    for key in ("unifork-s2-pretrain", "unifork-s3"):
        train_stage(job(root, key), Run())
        done[key] = weights(job(root, key)), read(job(root, key).run_folder)
    return done


def die_at(monkeypatch, where, when):
    """Make a named point of the run raise Killed the `when`-th time it is reached."""
    reached = [0]
    owner, name, after = {
        "before the update": (torch.optim.AdamW, "step", False),
        "after the update": (torch.optim.AdamW, "step", True),
        "in the middle of a checkpoint": (checkpoint, "write_json", False),
        "between checkpoint and latest": (checkpoint, "fsync_folder", False),
        "after a checkpoint": (checkpoint, "_prune", True),
        "before the history": (History, "add", False),
    }[where]
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        reached[0] += 1
        if reached[0] == when and not after:
            raise Killed
        result = original(*args, **kwargs)
        if reached[0] == when:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, dying)


POINTS = [
    ("before the update", 5),
    ("after the update", 5),
    ("in the middle of a checkpoint", 2),
    ("between checkpoint and latest", 2),
    ("after a checkpoint", 1),
    ("before the history", 3),
]


@pytest.mark.parametrize("key", ["unifork-s2-pretrain", "unifork-s3"])
@pytest.mark.parametrize(("where", "when"), POINTS)
def test_killed_twice_and_resumed_ends_with_the_same_weights_and_history(root, unbroken, key, where, when):
    one = job(root, key)
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            die_at(patch, where, when)
            train_stage(one, Run())
    train_stage(one, Run())
    expected, history = unbroken[key]
    assert_equal(weights(one), expected)
    assert read(one.run_folder) == history


def test_the_exported_history_has_every_step_once(unbroken, root):
    one = job(root)
    train_stage(one, Run())
    with open(one.model_folder / "training" / "history.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert all(float(row["loss"]) == pytest.approx(float(row["text_loss"]) + float(row["image_loss"])) for row in rows)
    assert all(row[f"image_loss_depth_{depth}"] for row in rows for depth in range(4))


def test_another_configuration_never_continues_old_weights(root, unbroken):
    one = job(root)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "after the update", 5)
        train_stage(one, Run())
    changed = job(root, seed=7)
    train_stage(changed, Run())
    aside = one.run_folder.with_name(one.run_folder.name + ".old-1")
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
    one = job(root)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "after the update", 5)
        train_stage(one, Run())
    train_stage(
        job(
            root,
            checkpoint_every=2,
            sample_prompts=("a circle",),
            resources=RESOURCES.model_copy(update={"row_tokens": 512}),
        ),
        Run(),
    )
    assert "continuing from step 3 of 8" in (one.run_folder / "log.txt").read_text()


def test_a_finished_run_is_not_trained_again_by_the_same_code_but_is_by_other_code(root):
    one = job(root)
    train_stage(one, Run())
    first = weights(one)
    shutil.rmtree(one.model_folder)
    train_stage(one, Run())
    assert_equal(weights(one), first)
    assert "continuing from step 8 of 8" in (one.run_folder / "log.txt").read_text()
    finished = one.run_folder / checkpoint.FINISHED
    finished.write_text(json.dumps(json.loads(finished.read_text()) | {"code": "another"}))
    train_stage(one, Run())
    assert one.run_folder.with_name(one.run_folder.name + ".old-1").exists()
    assert_equal(weights(one), first)


def test_a_damaged_checkpoint_is_an_error_and_nothing_is_loaded(root):
    one = job(root)
    train_stage(one, Run())
    shutil.rmtree(one.model_folder)
    newest = one.run_folder / (one.run_folder / "latest").read_text()
    file = newest / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.*bytes instead of"):
        train_stage(one, Run())


def test_only_what_the_pattern_names_is_trained(root, unbroken):
    start = load_file(root / "models/unifork-init/model.safetensors")
    after, _ = unbroken["unifork-s3"]
    changed = {name for name in start if not torch.equal(start[name], after[name])}
    assert changed
    for name in changed:
        assert ".generation." in name or ".understanding." in name or name.startswith("image_head."), name
    assert torch.equal(start["codebook"], after["codebook"])
    assert torch.equal(start["embed_tokens.weight"], after["embed_tokens.weight"])


def test_stage_three_branches_do_not_touch_each_other(root, unbroken):
    """Training generation alone gives the same generation branch as training both in turns."""
    one = job(root, "unifork-s3")
    stage = one.experiment.stages["s3"]
    alone = stage.model_copy(update={"tracks": {"generation": stage.tracks["generation"]}})
    one = one.model_copy(update={"experiment": one.experiment.model_copy(update={"stages": {"s3": alone}})})
    train_stage(one, Run())
    both, _ = unbroken["unifork-s3"]
    start = load_file(root / "models/unifork-init/model.safetensors")
    for name, tensor in weights(one).items():
        expected = start if ".understanding." in name else both
        assert torch.equal(tensor, expected[name]), name


def test_how_tracks_take_turns_does_not_change_the_weights(root, unbroken):
    one = job(root, "unifork-s3", interleave="sequential")
    train_stage(one, Run())
    assert_equal(weights(one), unbroken["unifork-s3"][0])


def test_a_summary_says_what_was_trained_and_seen(root, unbroken):
    one = job(root, "unifork-s3")
    train_stage(one, Run())
    summary = json.loads((one.model_folder / "training" / "summary.json").read_text())
    assert set(summary["tensors"]) == set(checkpoint.all_tensors(torch.nn.Module())) | set(weights(one))
    assert summary["tensors"]["codebook"]["trained"] is False
    seen = summary["documents"]["understanding"]
    assert sum(part["seen"] for part in seen) == 64


def test_a_loss_that_is_not_finite_stops_the_run_with_the_documents_keys(root, monkeypatch):
    one = job(root)
    monkeypatch.setattr(loop.nn.utils, "get_total_norm", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(UniForkError, match=r"step 0.*shapes-0000"):
        train_stage(one, Run())


def _worker(rank, world, plain):
    train_stage(StageJob.model_validate(plain), Run(rank=rank, workers=world))
    return rank


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_workers_give_the_weights_of_one_within_reduction_noise(root, unbroken, strategy):
    """In the stage with two tracks, which train other parameters in turns."""
    resources = RESOURCES.model_copy(update={"workers": 2, "strategy": strategy})
    one = job(root, "unifork-s3", resources=resources)
    run_distributed(_worker, 2, one.model_dump(mode="json"))
    expected, history = unbroken["unifork-s3"]
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, expected[name], atol=2e-4), name
    for ours, theirs in zip(read(one.run_folder), history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_training_goes_on_with_another_number_of_workers(root, unbroken):
    one = job(root)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        die_at(patch, "after the update", 5)
        train_stage(one, Run())
    two = job(root, resources=RESOURCES.model_copy(update={"workers": 2, "strategy": "fsdp2"}))
    run_distributed(_worker, 2, two.model_dump(mode="json"))
    history = read(one.run_folder)
    assert "continuing from step 3 of 8" in (one.run_folder / "log.txt").read_text()
    for ours, theirs in zip(history, unbroken["unifork-s2-pretrain"][1], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)

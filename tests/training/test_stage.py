"""A stage from start to end: what is trained, seen and recorded, alone and shared among workers."""

import csv
import json
import re
import shutil

import pytest
import torch
from distributed_testing import run_distributed
from safetensors.torch import load_file
from stage_runs import RESOURCES, assert_equal, job, weights, worker
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from unifork.config import LossBand
from unifork.errors import ConfigError, UniForkError
from unifork.models import losses
from unifork.training import checkpoint, loop
from unifork.training.history import read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow


def test_the_exported_history_has_every_step_once(unbroken, root):
    stage_job = job(root)
    train_stage(stage_job, WorkerContext())
    with open(stage_job.model_folder / "training" / "history.csv") as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == list(range(8))
    assert all(float(row["loss"]) == pytest.approx(float(row["text_loss"]) + float(row["image_loss"])) for row in rows)
    assert all(row[f"image_loss_depth_{depth}"] for row in rows for depth in range(4))


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
    stage_job = job(root, "unifork-s3")
    stage = stage_job.experiment.stages["s3"]
    alone = stage.model_copy(update={"tracks": {"generation": stage.tracks["generation"]}})
    experiment = stage_job.experiment.model_copy(update={"stages": {"s3": alone}})
    stage_job = stage_job.model_copy(update={"experiment": experiment})
    train_stage(stage_job, WorkerContext())
    both, _ = unbroken["unifork-s3"]
    start = load_file(root / "models/unifork-init/model.safetensors")
    for name, tensor in weights(stage_job).items():
        expected = start if ".understanding." in name else both
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("interleave", ["sequential", "concurrent"])
def test_how_tracks_take_turns_does_not_change_the_weights(root, unbroken, interleave):
    stage_job = job(root, "unifork-s3", interleave=interleave)
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), unbroken["unifork-s3"][0])


def test_a_summary_says_what_was_trained_and_seen(root, unbroken):
    stage_job = job(root, "unifork-s3")
    train_stage(stage_job, WorkerContext())
    summary = json.loads((stage_job.model_folder / "training" / "summary.json").read_text())
    assert set(summary["tensors"]) == set(checkpoint.all_tensors(torch.nn.Module())) | set(weights(stage_job))
    assert summary["tensors"]["codebook"]["trained"] is False
    seen = summary["documents"]["understanding"]
    assert sum(part["seen"] for part in seen) == 64
    rows = [row for row in read(stage_job.run_folder) if row["track"] == "understanding"]
    for dataset in {part["dataset"] for part in seen}:
        expected = sum(part["seen"] for part in seen if part["dataset"] == dataset)
        assert rows[-1][f"documents_understanding_{dataset}"] == expected
    for row in rows:
        assert sum(value for name, value in row.items() if name.startswith("documents_u")) == 8 * (row["step"] + 1)


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_documents_keys(root, monkeypatch, checkpoint_every):
    stage_job = job(root, checkpoint_every=checkpoint_every)
    monkeypatch.setattr(loop.nn.utils, "get_total_norm", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(UniForkError, match=r"step 0.*8 documents are in .*stopped\.json.*shapes-0000"):
        train_stage(stage_job, WorkerContext())
    stopped = json.loads((stage_job.run_folder / "stopped.json").read_text())
    assert len(stopped["documents"]) == 8
    assert stopped["metrics"]["step"] == 0
    assert not (stage_job.run_folder / "latest").exists()
    assert not read(stage_job.run_folder)


HOST_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero", "unique"}
"""Methods of a tensor that wait for its device."""


class Waits(TorchFunctionMode):
    """Counts what would wait for the device, asked for in Python."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in HOST_READS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class InnerWaits(TorchDispatchMode):
    """The same within torch, the backward pass and the optimizer included."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("chunk", [losses.CHUNK_LOGITS, 500], ids=["plain losses", "chunked losses"])
def test_a_step_never_waits_for_the_device(root, monkeypatch, chunk):
    """Values are read when the next step is queued, all of them before a checkpoint."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk)
    events, step, metrics = [], loop.TrackRun.step, loop.Done.metrics

    def watched(self, *args):
        found = []
        with InnerWaits(found), Waits(found):
            done = step(self, *args)
        events.append(("queued", args[2]))
        assert not found
        return done

    def reading(self):
        events.append(("read", self.host_metrics["step"]))
        with Waits(waits):
            return metrics(self)

    waits = []
    monkeypatch.setattr(loop.TrackRun, "step", watched)
    monkeypatch.setattr(loop.Done, "metrics", reading)
    train_stage(job(root, steps=4), WorkerContext())
    assert waits == ["tolist"] * 4
    order = [("queued", 0), ("queued", 1), ("read", 0), ("queued", 2), ("read", 1), ("read", 2), ("queued", 3)]
    assert events == [*order, ("read", 3)]


@pytest.mark.parametrize(
    ("band", "message"),
    [
        ({"stop": 0.9}, r"step 0: text_loss .* is above 0\.9 x 5\.991"),
        ({"warn": 1e-4}, r"warning: track joint, step 0: image_loss 4\.\d+, expected 4\.159"),
        ({"first_text": 2.5}, r"warning: track joint, step 0: text_loss .*, expected 2\.500"),
        ({}, None),
    ],
)
def test_losses_are_compared_with_what_is_expected(root, band, message):
    stage_job = job(root, steps=1, loss_band=LossBand(**band))
    if "stop" in band:
        with pytest.raises(UniForkError, match=message):
            train_stage(stage_job, WorkerContext())
        return
    train_stage(stage_job, WorkerContext())
    log = (stage_job.run_folder / "log.txt").read_text()
    assert re.search(message, log) if message else "warning" not in log


def test_rows_change_nothing_but_the_speed(root, unbroken):
    history = {}
    for row_tokens, rows in [(384, 1), (1024, 1), (512, 2)]:
        resources = RESOURCES.model_copy(update={"row_tokens": row_tokens, "rows_per_microbatch": rows})
        stage_job = job(root, resources=resources, steps=2)
        shutil.rmtree(stage_job.run_folder, ignore_errors=True)
        train_stage(stage_job, WorkerContext())
        history[row_tokens] = read(stage_job.run_folder)
    for other in (512, 1024):
        for ours, theirs in zip(history[other], history[384], strict=True):
            assert ours["documents_hash"] == theirs["documents_hash"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)


def test_recomputing_activations_changes_no_bit(root, unbroken):
    kinds = {"activation_checkpointing": ("shared", "task", "head")}
    stage_job = job(root, resources=RESOURCES.model_copy(update=kinds))
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), unbroken["unifork-s2-pretrain"][0])
    unknown = job(root, resources=RESOURCES.model_copy(update={"activation_checkpointing": ("tsk",)}))
    with pytest.raises(ConfigError, match=r"unknown kind of layer 'tsk'.*Did you mean 'task'"):
        train_stage(unknown, WorkerContext())


def test_the_trunk_of_stage_three_has_no_graph(root, monkeypatch):
    graphs = []

    def watching(self, model, wrapped, step, run):
        handles = [layer.register_forward_hook(lambda *io: graphs[-1].append(io[2].grad_fn)) for layer in model.layers]
        graphs.append([])
        metrics = original(self, model, wrapped, step, run)
        for handle in handles:
            handle.remove()
        return metrics

    original = loop.TrackRun.step
    monkeypatch.setattr(loop.TrackRun, "step", watching)
    train_stage(job(root, "unifork-s3", steps=1), WorkerContext())
    assert len(graphs) == 2
    for shared, branched in (graph[:2] for graph in graphs):
        assert shared is None
        assert branched is not None


def test_norms_of_the_parts_make_up_the_whole_and_tensorboard_has_them(root, unbroken):
    rows = unbroken["unifork-s2-pretrain"][1]
    parts = {name.removeprefix("gradient_norm_") for name in rows[0] if name.startswith("gradient_norm_")}
    assert parts == {"trunk", "understanding", "generation", "head", "connector"}
    for row in rows:
        assert sum(row[f"gradient_norm_{part}"] ** 2 for part in parts) == pytest.approx(
            row["gradient_norm"] ** 2, rel=1e-5
        )
    stage_job = job(root, steps=1)
    train_stage(stage_job, WorkerContext())
    (events,) = (stage_job.run_folder / "tensorboard").iterdir()
    assert b"joint/gradient_norm_trunk" in events.read_bytes()


@pytest.mark.parametrize("shard", ["none", "all"])
def test_two_workers_give_the_weights_of_one_within_reduction_noise(root, unbroken, shard):
    """In the stage with two tracks, which train other parameters in turns."""
    resources = RESOURCES.model_copy(update={"workers": 2, "shard": shard})
    stage_job = job(root, "unifork-s3", resources=resources)
    run_distributed(worker, 2, stage_job.model_dump(mode="json"))
    expected, history = unbroken["unifork-s3"]
    for name, tensor in weights(stage_job).items():
        assert torch.allclose(tensor, expected[name], atol=2e-4), name
    for ours, theirs in zip(read(stage_job.run_folder), history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)

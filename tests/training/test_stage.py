"""A stage from start to end: killed and resumed, changed, frozen, shared among workers."""

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file
from tiny import copy_of
from torch.multiprocessing.spawn import ProcessExitedException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from unifork.config import Experiment, LossBand, TrainResources, load
from unifork.errors import CheckpointError, UniForkError
from unifork.models import losses
from unifork.training import checkpoint, loop
from unifork.training.distributed_testing import run_distributed
from unifork.training.history import History, read
from unifork.training.loop import Run
from unifork.training.stage import StageJob, train_stage

RESOURCES = TrainResources(threads=1, row_tokens=384)


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


def edge(root):
    """One track over one data set whose first pass ends with step 6: 96 documents, 16 a step."""
    one = job(root, "unifork-s3")
    stage = one.experiment.stages["s3"]
    tracks = {"generation": stage.tracks["generation"].model_copy(update={"batch_documents": 16})}
    stages = {"s3": stage.model_copy(update={"tracks": tracks})}
    return one.model_copy(update={"experiment": one.experiment.model_copy(update={"stages": stages})})


def job_named(root, key):
    return edge(root) if key == "edge" else job(root, key)


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
    """The stages run without interruption: weights and history by key."""
    done = {}
    for key in ("unifork-s2-pretrain", "unifork-s3", "edge"):
        one = job_named(copy_of(tiny_root, tmp_path_factory.mktemp("unbroken") / "root"), key)
        train_stage(one, Run())
        done[key] = weights(one), read(one.run_folder)
    return done


POINTS = {
    "before the update": (torch.optim.AdamW, "step", False),
    "after the update": (torch.optim.AdamW, "step", True),
    "in the middle of a checkpoint": (checkpoint, "save_shards", True),
    "between checkpoint and latest": (checkpoint, "fsync_folder", False),
    "between latest and the metrics": (checkpoint, "_prune", True),
    "before the history": (History, "add", False),
}
"""Named points of a run: what is replaced, and whether the worker dies after it."""


def train_and_die(plain, where, when, rank=0, workers=1):
    """Run a stage whose process gets SIGKILL the `when`-th time it reaches a point."""
    reached = [0]
    owner, name, after = POINTS[where]
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        reached[0] += 1
        if reached[0] == when and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if reached[0] == when:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)  # in this process alone, which ends here
    train_stage(StageJob.model_validate(plain), Run(rank=rank, workers=workers))


def killed(one, where, when):
    """Train in a process of its own until SIGKILL."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=train_and_die, args=(one.model_dump(mode="json"), where, when))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


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
    one = job_named(root, key)
    for reached in when if isinstance(when, tuple) else (when, when):
        killed(one, where, reached)
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
    killed(one, "after the update", 7)
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
    killed(one, "after the update", 7)
    train_stage(
        job(
            root,
            checkpoint_every=2,
            sample_prompts=("a circle",),
            resources=RESOURCES.model_copy(update={"row_tokens": 512}),
        ),
        Run(),
    )
    assert re.search("continuing from step [36] of 8", (one.run_folder / "log.txt").read_text())


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
    one = job(root)
    train_stage(one, Run())
    assert latest[:5] == [False] * 5
    assert latest[-1]  # the second checkpoint waits for the first
    assert_equal(weights(one), unbroken["unifork-s2-pretrain"][0])


def test_a_checkpoint_that_cannot_be_written_ends_the_run(root, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "fsync_tree", full)
    one = job(root)
    with pytest.raises(OSError, match="No space left"):
        train_stage(one, Run())
    assert not (one.run_folder / "latest").exists()
    assert not one.model_folder.exists()


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


@pytest.mark.parametrize("interleave", ["sequential", "concurrent"])
def test_how_tracks_take_turns_does_not_change_the_weights(root, unbroken, interleave):
    one = job(root, "unifork-s3", interleave=interleave)
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
    rows = [row for row in read(one.run_folder) if row["track"] == "understanding"]
    for dataset in {part["dataset"] for part in seen}:
        expected = sum(part["seen"] for part in seen if part["dataset"] == dataset)
        assert rows[-1][f"documents_understanding_{dataset}"] == expected
    for row in rows:
        assert sum(value for name, value in row.items() if name.startswith("documents_u")) == 8 * (row["step"] + 1)


@pytest.mark.parametrize("checkpoint_every", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run_with_the_documents_keys(root, monkeypatch, checkpoint_every):
    one = job(root, checkpoint_every=checkpoint_every)
    monkeypatch.setattr(loop.nn.utils, "get_total_norm", lambda *args: torch.tensor(float("nan")))
    with pytest.raises(UniForkError, match=r"step 0.*8 documents are in .*stopped\.json.*shapes-0000"):
        train_stage(one, Run())
    stopped = json.loads((one.run_folder / "stopped.json").read_text())
    assert len(stopped["documents"]) == 8
    assert stopped["metrics"]["step"] == 0
    assert not (one.run_folder / "latest").exists()
    assert not read(one.run_folder)


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
        events.append(("read", self.known["step"]))
        with Waits(waits):
            return metrics(self)

    waits = []
    monkeypatch.setattr(loop.TrackRun, "step", watched)
    monkeypatch.setattr(loop.Done, "metrics", reading)
    train_stage(job(root, steps=4), Run())
    assert waits == ["tolist"] * 4
    order = [("queued", 0), ("queued", 1), ("read", 0), ("queued", 2), ("read", 1), ("read", 2), ("queued", 3)]
    assert events == [*order, ("read", 3)]


@pytest.mark.parametrize(
    ("band", "said"),
    [
        ({"stop": 0.9}, r"step 0: text_loss .* is above 0\.9 x 5\.991"),
        ({"warn": 1e-4}, r"warning: track joint, step 0: image_loss 4\.\d+, expected 4\.159"),
        ({"first_text": 2.5}, r"warning: track joint, step 0: text_loss .*, expected 2\.500"),
        ({}, None),
    ],
)
def test_losses_are_compared_with_what_is_expected(root, band, said):
    one = job(root, steps=1, loss_band=LossBand(**band))
    if "stop" in band:
        with pytest.raises(UniForkError, match=said):
            train_stage(one, Run())
        return
    train_stage(one, Run())
    log = (one.run_folder / "log.txt").read_text()
    assert re.search(said, log) if said else "warning" not in log


def test_rows_change_nothing_but_the_speed(root, unbroken):
    history = {}
    for row_tokens, rows in [(384, 1), (1024, 1), (512, 2)]:
        resources = RESOURCES.model_copy(update={"row_tokens": row_tokens, "rows_per_microbatch": rows})
        one = job(root, resources=resources, steps=2)
        shutil.rmtree(one.run_folder, ignore_errors=True)
        train_stage(one, Run())
        history[row_tokens] = read(one.run_folder)
    for other in (512, 1024):
        for ours, theirs in zip(history[other], history[384], strict=True):
            assert ours["documents_hash"] == theirs["documents_hash"]
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
            assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-5)


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
    train_stage(job(root, "unifork-s3", steps=1), Run())
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
    one = job(root, steps=1)
    train_stage(one, Run())
    (events,) = (one.run_folder / "tensorboard").iterdir()
    assert b"joint/gradient_norm_trunk" in events.read_bytes()


def test_a_checkpoint_lists_and_exports_every_tensor(root):
    one = job(root, "unifork-s3", steps=2)
    train_stage(one, Run())
    path, plain = checkpoint.latest(one.run_folder)
    whole = checkpoint.all_tensors(checkpoint.whole_model(path, one.start))
    assert {name: (list(t.shape), str(t.dtype)) for name, t in whole.items()} == {
        name: (listed["shape"], listed["dtype"]) for name, listed in plain["tensors"].items()
    }
    trained = {name for name, listed in plain["tensors"].items() if listed["trained"]}
    assert trained
    assert all("generation" in n or "understanding" in n or n.startswith("image_head.") for n in trained)
    assert_equal({name: whole[name] for name in weights(one)}, weights(one))


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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_training_goes_on_with_two_workers_and_then_with_one(root, unbroken, strategy):
    """Killed on one worker, then on two, finished on one: the same documents, the losses within reduction noise."""
    one = job(root, checkpoint_every=2)
    killed(one, "between latest and the metrics", 1)
    two = job(root, checkpoint_every=2, resources=RESOURCES.model_copy(update={"workers": 2, "strategy": strategy}))
    with pytest.raises(ProcessExitedException):
        run_distributed(_dying_worker, 2, two.model_dump(mode="json"))
    train_stage(one, Run())
    log = (one.run_folder / "log.txt").read_text()
    assert "continuing from step 2 of 8" in log
    assert "continuing from step 4 of 8" in log
    for ours, theirs in zip(read(one.run_folder), unbroken["unifork-s2-pretrain"][1], strict=True):
        assert ours["documents_hash"] == theirs["documents_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    for name, tensor in weights(one).items():
        assert torch.allclose(tensor, unbroken["unifork-s2-pretrain"][0][name], atol=2e-4), name


def _dying_worker(rank, world, plain):
    train_and_die(plain, "between latest and the metrics", 1, rank, world)

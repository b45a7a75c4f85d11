"""DeepSpeed's ZeRO stages: the same step, checkpoints and models as without."""

import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from distributed_testing import run_distributed
from stage_runs import RESOURCES, assert_equal, job, weights
from tiny import copy_of

from unifork import errors
from unifork.batch import pack
from unifork.config import OptimizerConfig
from unifork.errors import ConfigError
from unifork.training import checkpoint, launch
from unifork.training.history import read
from unifork.training.loop import TrackRun, WorkerContext
from unifork.training.optimizer import freeze_all_but, make_optimizer
from unifork.training.stage import StageJob, train_stage
from unifork.training.strategies import strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from model_samples import DEPTH, generation, noisy_model, understanding

pytestmark = pytest.mark.slow

STAGES = [1, 2, 3]
CLIP = 0.5
UNDERSTANDING = [understanding(n, answer=3 + n) for n in range(3)]
GENERATION = [generation(n, 2 + n) for n in range(3)]
MICROBATCHES = {1: [*UNDERSTANDING, *GENERATION], 2: [UNDERSTANDING, GENERATION]}
TRACKS = {"one": ("generation", "image_head"), "other": (".understanding.",)}


class Loader:
    """One document a microbatch; of two workers each has one task."""

    identity = SimpleNamespace(depth=DEPTH)

    def batches(self, plan, rank):
        for document in MICROBATCHES[2][rank] if plan.workers == 2 else MICROBATCHES[1]:
            yield pack([[document]], 48, DEPTH)


def steps(rank, workers, name):
    """Norms and shared weights after three turns of two tracks, with updates that are linear in the gradient."""
    model = noisy_model("shared*2 task*2 norm:task").train()
    names = {
        track: {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
        for track, parts in TRACKS.items()
    }
    freeze_all_but(model, set().union(*names.values()))
    sharing = strategy(name, workers)
    wrapped = sharing.wrap(model)
    pairs = {}
    for track, group in names.items():
        parameters = {n: p for n, p in model.named_parameters() if n in group}
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0), parameters.values()
        )
        for param_group in optimizer.param_groups:
            param_group["eps"] = 1.0
        pairs[track] = optimizer, parameters
    sharing.start(pairs)
    plan = SimpleNamespace(
        workers=workers,
        text_targets=sum(int(document.loss_mask_T.sum()) for document in UNDERSTANDING),
        image_targets=sum(len(document.codes_ND) for document in GENERATION),
    )
    norms = []
    for track in ("one", "other", "one"):
        run = SimpleNamespace(loader=Loader(), strategy=sharing, track=SimpleNamespace(precision="float32"))
        sharing.turn(track)
        TrackRun._accumulate(run, wrapped, plan, list(Loader().batches(plan, rank)), WorkerContext(rank, workers))
        norms.append(float(sharing.update({"all": list(pairs[track][1].values())}, CLIP)["gradient_norm"]))
        model.zero_grad()
    if workers > 1:  # a gradient that is not finite changes nothing
        plan.text_targets = float("nan")
        sharing.turn("other")
        TrackRun._accumulate(run, wrapped, plan, list(Loader().batches(plan, rank)), WorkerContext(rank, workers))
        norms.append(float(sharing.update({}, CLIP)["gradient_norm"]))
    return norms, {n: t.detach().clone() for n, t in sharing.weights(checkpoint.all_tensors(model)).items()}


class Interrupted(Exception):
    """A worker that ends in the middle of a stage."""


def train(plain, rank=0, workers=1, until=None):
    """Train a stage, at most until so many steps are in its checkpoint."""

    def report(metrics):
        if metrics["finished_steps"] == until:
            raise Interrupted

    try:
        train_stage(StageJob.model_validate(plain), WorkerContext(rank=rank, workers=workers, report=report))
    except Interrupted:
        return


def plain_job(root, shard="none", every=1):
    resources = RESOURCES.model_copy(update={"workers": 2, "shard": shard})
    return job(root, "unifork-s3", resources, steps=3, checkpoint_every=every).model_dump(mode="json")


def _rank(rank, workers, folder):
    """Everything that needs two workers, in one process group."""
    found = {stage: steps(rank, workers, f"deepspeed-{stage}") for stage in STAGES}
    for stage in STAGES:
        train(plain_job(folder / f"unbroken-{stage}", f"deepspeed-{stage}", every=6), rank, workers)
        for until in (4, None):
            train(plain_job(folder / f"resumed-{stage}", f"deepspeed-{stage}", every=4), rank, workers, until)
        train(plain_job(folder / "handed-on", f"deepspeed-{stage}"), rank, workers, until=stage + 1)
    return found


@pytest.fixture(scope="module")
def folder(tiny_root, tmp_path_factory):
    """Roots of all runs. `handed-on` is begun by one worker, which also ends it."""
    folder = tmp_path_factory.mktemp("zero")
    names = [f"{name}-{stage}" for name in ("unbroken", "resumed") for stage in STAGES]
    for name in (*names, "plain", "handed-on"):
        copy_of(tiny_root, folder / name)
    train(plain_job(folder / "plain", every=6))
    train(plain_job(folder / "handed-on"), until=1)
    return folder


@pytest.fixture(scope="module")
def shared(folder):
    return run_distributed(_rank, 2, folder)


def done(folder, name):
    return job(folder / name, "unifork-s3")


@pytest.mark.parametrize("stage", STAGES)
def test_steps_equal_those_of_one_worker_with_one_task_per_worker(shared, stage):
    norms, expected = steps(0, 1, "none")
    kept = {name: tensor for found in shared for name, tensor in found[stage][1].items()}
    assert kept.keys() == expected.keys()
    assert min(norms) > CLIP
    for found in shared:
        assert found[stage][0] == pytest.approx([*norms, math.nan], rel=1e-5, nan_ok=True)
    for name, tensor in expected.items():
        assert torch.allclose(kept[name], tensor, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_is_bit_equal_and_near_that_of_one_worker(folder, shared, stage):
    unbroken, resumed, plain = (done(folder, name) for name in (f"unbroken-{stage}", f"resumed-{stage}", "plain"))
    assert "continuing from step 4 of 6" in (resumed.run_folder / "log.txt").read_text()
    assert_equal(weights(resumed), weights(unbroken))
    assert read(resumed.run_folder) == read(unbroken.run_folder)
    for name, tensor in weights(unbroken).items():
        assert torch.allclose(tensor, weights(plain)[name], atol=2e-4), name
    states = [checkpoint.latest(stage_job.run_folder)[1]["tensors"] for stage_job in (unbroken, plain)]
    assert states[0] == states[1]
    assert {listed["trained"] for listed in states[0].values()} == {True, False}


def test_a_run_goes_on_with_other_workers_and_stages(folder, shared):
    """One worker, then two with ZeRO-1, ZeRO-2 and ZeRO-3, then one again."""
    train(plain_job(folder / "handed-on"))
    log = (done(folder, "handed-on").run_folder / "log.txt").read_text()
    assert all(f"continuing from step {number} of 6" in log for number in (1, 2, 3, 4))
    pairs = zip(read(done(folder, "handed-on").run_folder), read(done(folder, "plain").run_folder), strict=True)
    for ours, theirs in pairs:
        assert ours["documents_hash"] == theirs["documents_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_inside_ray_train_with_bfloat16_products(ray_session, tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path / "root")
    resources = RESOURCES.model_copy(update={"workers": 2, "cpus": 0.5, "shard": "deepspeed-3"})
    stage_job = job(root, "unifork-s3", resources, steps=1)
    stage = stage_job.experiment.stages["s3"]
    tracks = {name: track.model_copy(update={"precision": "bfloat16"}) for name, track in stage.tracks.items()}
    stages = {"s3": stage.model_copy(update={"tracks": tracks})}
    stage_job = stage_job.model_copy(update={"experiment": stage_job.experiment.model_copy(update={"stages": stages})})
    launch.launch(stage_job)
    shared = read(stage_job.run_folder)
    exported = weights(stage_job)
    shutil.rmtree(stage_job.run_folder)
    train_stage(stage_job, WorkerContext())
    for ours, theirs in zip(shared, read(stage_job.run_folder), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=2e-2)
    alone = weights(stage_job)
    assert {name: (t.shape, t.dtype) for name, t in exported.items()} == {
        name: (t.shape, t.dtype) for name, t in alone.items()
    }


def test_tracks_must_not_share_a_parameter():
    sharing = strategy("deepspeed-2", 2)
    model = torch.nn.Linear(2, 2)
    sharing.wrap(model)
    pair = torch.optim.AdamW(model.parameters()), dict(model.named_parameters())
    with pytest.raises(ConfigError, match=r"shard: deepspeed-2: the tracks one and other both train weight"):
        sharing.start({"one": pair, "other": pair})


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"shard: deepspeed-3: needs deepspeed.*unifork\[deepspeed\]"):
        strategy("deepspeed-3", 2)
    assert strategy("deepspeed-3", 1).wrap(torch.nn.Linear(1, 1))

"""Short stages on the tiny experiment, whole or killed on the way."""

import os
import signal

import torch
from forks import SERVER
from safetensors.torch import load_file

from unifork.config import Experiment, TrainResources, load
from unifork.training import checkpoint
from unifork.training.history import History
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

RESOURCES = TrainResources(threads=1, row_tokens=384)


def job(root, key="unifork-s2-pretrain", resources=RESOURCES, seed=None, **stage_changes):
    """A short stage that begins with the fresh model."""
    experiment = load(Experiment, root / "params.yaml")
    name = experiment.runs[key].stage
    stage = experiment.stages[name]
    changes = {"checkpoint_every": 3, "sample_prompts": (), **stage_changes}
    steps = changes.pop("steps", 8)
    tracks = {n: t.model_copy(update={"steps": steps, "batch_documents": 8}) for n, t in stage.tracks.items()}
    variant = experiment.runs[key].variant
    runs = {key: experiment.runs[key].model_copy(update={"after": f"models/{variant}-init"})}
    stages = {name: stage.model_copy(update={"tracks": tracks, **changes})}
    seeds = {} if seed is None else {"seed": seed}
    variants = {variant: experiment.variants[variant].model_copy(update=seeds)}
    experiment = experiment.model_copy(update={"runs": runs, "stages": stages, "variants": variants})
    return StageJob(key=key, experiment=experiment, resources=resources, root=str(root))


def edge(root):
    """One track over one data set whose first pass ends with step 6: 96 documents, 16 a step."""
    stage_job = job(root, "unifork-s3")
    stage = stage_job.experiment.stages["s3"]
    tracks = {"generation": stage.tracks["generation"].model_copy(update={"batch_documents": 16})}
    stages = {"s3": stage.model_copy(update={"tracks": tracks})}
    return stage_job.model_copy(update={"experiment": stage_job.experiment.model_copy(update={"stages": stages})})


def job_named(root, key):
    return edge(root) if key == "edge" else job(root, key)


def weights(stage_job):
    return load_file(stage_job.model_folder / "model.safetensors")


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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
    train_stage(StageJob.model_validate(plain), WorkerContext(rank=rank, workers=workers))


def killed(stage_job, where, when):
    """Train in a process of its own until SIGKILL."""
    process = SERVER.Process(target=train_and_die, args=(stage_job.model_dump(mode="json"), where, when))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def worker(rank, world, plain):
    train_stage(StageJob.model_validate(plain), WorkerContext(rank=rank, workers=world))
    return rank

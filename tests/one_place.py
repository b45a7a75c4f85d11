"""What a stage of several workers comes to in one place: the expectation of those on several machines."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from distributed_testing import run_distributed
from safetensors.torch import load_file

from unifork.config import Experiment, TrainResources, load
from unifork.training.history import read
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage


def train_in_one_place(root: Path, key: str, resources: dict[str, Any], node_workers: int = 1) -> None:
    """A stage as `workers` of the resources train it, as many on a node, without Ray and without interruption."""
    found = TrainResources.model_validate(resources)
    job = StageJob(key=key, experiment=load(Experiment, root / "params.yaml"), resources=found, root=str(root))
    run_distributed(_train, found.fewest, job.model_dump(mode="json"), node_workers)


def _train(rank: int, workers: int, job: dict[str, Any], node_workers: int) -> None:
    train_stage(StageJob.model_validate(job), WorkerContext(rank=rank, workers=workers, node_workers=node_workers))


def copies(root: Path, target: Path, *names: str) -> Path:
    """A root with some folders of another, hard links, and the same experiment."""
    for name in names:
        shutil.copytree(root / name, target / name, copy_function=os.link)
    shutil.copy(root / "params.yaml", target)
    return target


def assert_same_weights(root: Path, other: Path, key: str) -> None:
    """Bit-equal weights, and steps over the same documents, each once."""
    found, expected = (load_file(place / "models" / key / "model.safetensors") for place in (root, other))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    steps, others = (
        [(row["track"], row["step"], row["documents_hash"]) for row in read(place / "runs" / key)]
        for place in (root, other)
    )
    assert steps == others

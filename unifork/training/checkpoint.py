"""Checkpoints are ours alone: `step-N` folders and a `latest` that is renamed into place.

A checkpoint holds every tensor, trained or frozen, the optimizer state of every track by parameter
name, the counters of every track, the fingerprint of what it belongs to and a list of its tensors.
Every worker writes and reads its own shards (torch.distributed.checkpoint): no worker ever holds the
whole of a sharded model, and training can go on with another number of workers or another strategy.
"""

import json
import pickle
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from unifork.errors import CheckpointError
from unifork.manifest import fsync_folder, fsync_tree, write_atomically, write_json
from unifork.models.modeling import UniForkModel, load_model
from unifork.training.strategies import barrier

LATEST = "latest"
STATE = "state.json"
FINISHED = "finished.json"
FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    steps: dict[str, int]
    """Finished steps of each track."""

    @property
    def total(self) -> int:
        """Finished steps of all tracks."""
        return sum(self.steps.values())


def folder_of(run: Path, state: State) -> Path:
    """Where the checkpoint of a state lies in a run folder."""
    return run / f"step-{state.total}"


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter (tied ones once) and every persistent buffer, by name."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def save(
    folder: Path,
    model: nn.Module,
    optimizers: Mapping[str, tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]],
    state: State,
    fingerprint: str,
    keep: int,
    lead: bool,
) -> None:
    """Write a checkpoint; every worker calls this and writes its shards, the lead makes it count.

    optimizers: for each track its optimizer and its parameters by name.
    """
    final = folder_of(folder, state)
    temporary = folder / f".{final.name}.tmp"
    tensors = {f"model/{name}": tensor.detach() for name, tensor in all_tensors(model).items()}
    for track, (optimizer, parameters) in optimizers.items():
        for name, parameter in parameters.items():
            for moment in MOMENTS if parameter in optimizer.state else ():
                tensors[f"optimizer/{track}/{name}/{moment}"] = optimizer.state[parameter][moment]
    if lead:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    alone = not (dist.is_available() and dist.is_initialized())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves alone
        save_shards(tensors, storage_writer=FileSystemWriter(temporary), no_dist=alone)
    barrier()
    if lead:
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        trained = {name for _, parameters in optimizers.values() for name in parameters}
        listed = tensor_list(model, trained)
        plain = {
            "format": FORMAT, "fingerprint": fingerprint, "steps": state.steps, "files": sizes, "tensors": listed
        }  # fmt: skip
        write_json(temporary / STATE, plain)
        fsync_tree(temporary)
        if final.exists():  # the same step of an earlier attempt; the content is the same
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(folder)
        write_atomically(folder / LATEST, lambda path: path.write_text(final.name))
        _prune(folder, keep)
    barrier()


def tensor_list(model: nn.Module, trained: set[str]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and trained-or-frozen of every tensor of a checkpoint."""
    return {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "trained": name in trained}
        for name, tensor in all_tensors(model).items()
    }


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint and its state; None when there is none.

    Raises CheckpointError when `latest` names a checkpoint that is missing or incomplete.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    if not (path / STATE).exists():
        raise CheckpointError(f"{pointer} names {path.name}, which has no {STATE}; delete {folder} to start afresh")
    plain = json.loads((path / STATE).read_text())
    for name, size in plain["files"].items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            raise CheckpointError(f"{path / name}: {found} bytes instead of {size}; the checkpoint is damaged")
    return path, plain


def restore(
    path: Path,
    plain: dict[str, Any],
    model: nn.Module,
    optimizers: Mapping[str, tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]],
) -> State:
    """Load a checkpoint into a model and its optimizers, strictly; a worker reads only its shards.

    Raises CheckpointError when names, shapes or dtypes differ.
    """
    _read(path, "model", all_tensors(model))
    for track, (optimizer, parameters) in optimizers.items():
        if not plain["steps"][track]:
            continue
        moments = {
            name: {m: torch.tensor(0.0) if m == "step" else torch.zeros_like(parameter.detach()) for m in MOMENTS}
            for name, parameter in parameters.items()
        }
        flat = {f"{name}/{moment}": value for name, state in moments.items() for moment, value in state.items()}
        _read(path, f"optimizer/{track}", flat)
        for name, parameter in parameters.items():
            optimizer.state[parameter].update(moments[name])
    return State(dict(plain["steps"]))


def whole_model(path: Path, start: Path) -> UniForkModel:
    """The model of a checkpoint in one piece on the CPU, whatever strategy wrote it.

    start: model directory the run began with, which has the configuration. Raises CheckpointError.
    """
    model = load_model(start)
    _read(path, "model", all_tensors(model))
    return model


def set_aside(folder: Path) -> Path:
    """Move a run that belongs to another configuration out of the way; nothing is deleted."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def _read(path: Path, part: str, targets: dict[str, Tensor]) -> None:
    """Fill `targets` with the tensors below `part`. Raises CheckpointError."""
    reader = FileSystemReader(path)
    wanted = {f"{part}/{name}": tensor.detach() for name, tensor in targets.items()}
    try:
        stored = {
            name: meta for name, meta in reader.read_metadata().state_dict_metadata.items()
            if name.startswith(f"{part}/")
        }  # fmt: skip
        missing, surplus = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        if missing or surplus:
            raise CheckpointError(f"{path}: missing {missing[:5]}, not expected {surplus[:5]}")
        for name, tensor in wanted.items():
            found = stored[name].size, stored[name].properties.dtype  # type: ignore[union-attr]
            if found != (tensor.shape, tensor.dtype):
                raise CheckpointError(
                    f"{path}: {name} is {tuple(found[0])} {found[1]}, not {tuple(tensor.shape)} {tensor.dtype}"
                )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no process group is used: none is needed
            load_shards(wanted, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _prune(folder: Path, keep: int) -> None:
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for path in steps[:-keep]:
        shutil.rmtree(path)

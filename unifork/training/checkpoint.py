"""Checkpoints are ours alone: `step-N` folders and a `latest` that is renamed into place.

A checkpoint holds every tensor, trained or frozen, the optimizer state of every track by parameter
name, the counters of every track, and the fingerprint of what it belongs to. It knows nothing of
workers, so training can go on with another number of them.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unifork.errors import CheckpointError
from unifork.manifest import fsync_folder, write_atomically, write_json
from unifork.training.strategies import barrier, like, put, whole

LATEST = "latest"
STATE = "state.json"
FINISHED = "finished.json"
FORMAT = 1


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    steps: dict[str, int]
    """Finished steps of each track."""

    @property
    def total(self) -> int:
        """Finished steps of all tracks."""
        return sum(self.steps.values())


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
    writes: bool,
) -> Path:
    """Write a checkpoint; every worker calls this, the one that `writes` touches the disk.

    optimizers: for each track its optimizer and its parameters by name.
    """
    tensors = {name: whole(tensor).contiguous() for name, tensor in all_tensors(model).items()}
    moments = {track: _optimizer_tensors(*pair) for track, pair in optimizers.items()}
    final = folder / f"step-{state.total}"
    if writes:
        temporary = folder / f".{final.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {"model.safetensors": tensors} | {f"optimizer-{t}.safetensors": m for t, m in moments.items()}
        for name, content in files.items():
            write_atomically(temporary / name, lambda path, content=content: save_file(content, path))  # type: ignore[misc]
        sizes = {name: (temporary / name).stat().st_size for name in files}
        plain = {"format": FORMAT, "fingerprint": fingerprint, "steps": state.steps, "files": sizes}
        write_json(temporary / STATE, plain)
        if final.exists():  # the same step of an earlier attempt; the content is the same
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(folder)
        write_atomically(folder / LATEST, lambda path: path.write_text(final.name))
        _prune(folder, keep)
    barrier()
    return final


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
    """Load a checkpoint into a model and its optimizers, strictly.

    Raises CheckpointError when names or shapes differ.
    """
    fill(all_tensors(model), _load(path / "model.safetensors"), path / "model.safetensors")
    for track, (optimizer, parameters) in optimizers.items():
        if plain["steps"][track]:
            file = path / f"optimizer-{track}.safetensors"
            _restore_optimizer(optimizer, parameters, _load(file), file)
    return State(dict(plain["steps"]))


def set_aside(folder: Path) -> Path:
    """Move a run that belongs to another configuration out of the way; nothing is deleted."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(target)
    return target


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def fill(targets: dict[str, Tensor], values: dict[str, Tensor], path: Path) -> None:
    """Copy `values` into `targets` by name. Raises CheckpointError when names or shapes differ."""
    missing, surplus = sorted(targets.keys() - values.keys()), sorted(values.keys() - targets.keys())
    if missing or surplus:
        raise CheckpointError(f"{path}: missing {missing[:5]}, not expected {surplus[:5]}")
    for name, target in targets.items():
        if target.shape != values[name].shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(values[name].shape)}, not {tuple(target.shape)}")
        put(target, values[name])


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def _optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{name}|{moment}": whole(optimizer.state[parameter][moment]).contiguous()
        for name, parameter in parameters.items()
        if parameter in optimizer.state
        for moment in MOMENTS
    }


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], values: dict[str, Tensor], path: Path
) -> None:
    expected = {f"{name}|{moment}" for name in parameters for moment in MOMENTS}
    if expected != values.keys():
        raise CheckpointError(f"{path}: optimizer state of other parameters: {sorted(expected ^ values.keys())[:5]}")
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            value = values[f"{name}|{moment}"]
            optimizer.state[parameter][moment] = value.clone() if moment == "step" else like(parameter, value)


def _prune(folder: Path, keep: int) -> None:
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for path in steps[:-keep]:
        shutil.rmtree(path)

"""Checkpoints are ours alone: `step-N` folders and a `latest` that is renamed into place.

A checkpoint holds every tensor, trained or frozen, the optimizer state of every track by parameter
name, the counters of every track, the fingerprint of what it belongs to and a list of its tensors.
Every worker writes and reads its own shards (torch.distributed.checkpoint): no worker ever holds the
whole of a sharded model, and training can go on with another number of workers or another strategy.
"""

import pickle
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from unifork.errors import CheckpointError
from unifork.models.modeling import UniForkModel, load_model
from unifork.shards.manifest import fsync_folder, fsync_tree, write_atomically, write_json
from unifork.training.optimizer import Optimizers
from unifork.training.strategies import Strategy
from unifork.weights import check_fit, read_json

LATEST = "latest"
STATE = "state.json"
FINISHED = "finished.json"
FORMAT = 2


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


class Saver:
    """Writes checkpoints behind training's back: copies first, then files in a thread, one at a time.

    Every worker has one and calls `save` with the same states; each writes its shards, the lead makes
    a checkpoint count. The threads of the workers agree over a process group of their own, so a
    checkpoint is `latest` only when all files of all workers are on the disk. What fails in a thread
    is raised by the next `save` or at the end of the `with` block, which waits for what is unfinished.
    """

    def __init__(self, folder: Path, trained: set[str], fingerprint: str, keep: int, lead: bool) -> None:
        """trained: names of the parameters that any track trains. keep: how many checkpoints stay."""
        self.folder, self.trained, self.fingerprint, self.keep, self.lead = folder, trained, fingerprint, keep, lead
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.unfinished: Future[None] | None = None
        # of a worker that is alone; catching it in the thread would change the filters of all threads
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()
        self.stager.close()
        if kind is None:
            self.wait()

    def save(self, model: nn.Module, strategy: Strategy, state: State) -> None:
        """Copy everything to the CPU and begin to write it. Raises what went wrong with the one before."""
        self.wait()
        tensors = {f"model/{name}": tensor.detach() for name, tensor in strategy.weights(all_tensors(model)).items()}
        for track in (name for name, steps in state.steps.items() if steps):
            tensors |= {f"optimizer/{track}/{name}": moment for name, moment in strategy.moments(track).items()}
        copies = cast(dict[str, Tensor], self.stager.stage(tensors))
        self.unfinished = self.thread.submit(self._write, copies, state)

    def wait(self) -> None:
        """Until what was saved last is `latest`. Raises what went wrong."""
        if self.unfinished is not None:
            self.unfinished.result()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def _write(self, tensors: dict[str, Tensor], state: State) -> None:
        """The files of this worker; then, by the lead, what makes them a checkpoint."""
        final = folder_of(self.folder, state)
        temporary = self.folder / f".{final.name}.tmp"
        if self.lead:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._barrier()
        alone = self.group is None
        save_shards(tensors, storage_writer=FileSystemWriter(temporary), process_group=self.group, no_dist=alone)
        self._barrier()
        if self.lead:
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            plain = {
                "format": FORMAT, "fingerprint": self.fingerprint, "steps": state.steps, "files": sizes,
                "tensors": _tensor_list(temporary, self.trained),
            }  # fmt: skip
            write_json(temporary / STATE, plain)
            fsync_tree(temporary)
            if final.exists():  # the same step of an earlier attempt; the content is the same
                shutil.rmtree(final)
            temporary.rename(final)
            fsync_folder(self.folder)
            write_atomically(self.folder / LATEST, lambda path: path.write_text(final.name))
            _prune(self.folder, self.keep)
        self._barrier()


def _tensor_list(path: Path, trained: set[str]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and trained-or-frozen of every tensor of the model that was written."""
    return {
        name: {"shape": list(found.size), "dtype": str(found.properties.dtype), "trained": name in trained}
        for name, found in _stored(FileSystemReader(path), "model").items()
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
    plain = state_of(path)
    for name, size in plain["files"].items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            raise CheckpointError(f"{path / name}: {found} bytes instead of {size}; the checkpoint is damaged")
    return path, plain


def state_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return read_json(path / STATE)


def start(
    found: tuple[Path, dict[str, Any]] | None, model: nn.Module, optimizers: Optimizers, strategy: Strategy
) -> State:
    """Begin where a checkpoint ends, if there is one; it is loaded strictly, a worker reads what it needs.

    Raises CheckpointError when names, shapes or dtypes differ, ConfigError as `Strategy.start`.
    """
    if found is None:
        strategy.start(optimizers)
        return State(dict.fromkeys(optimizers, 0))
    path, plain = found
    _read(path, "model", all_tensors(model))
    strategy.start(optimizers)
    for track in (name for name in optimizers if plain["steps"][name]):
        strategy.read_moments(track, partial(_read, path))
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
    try:
        stored = _stored(reader, part)
        check_fit(
            f"{path}: {part}",
            {name: (*found.size, found.properties.dtype) for name, found in stored.items()},
            {name: (*tensor.shape, tensor.dtype) for name, tensor in targets.items()},
        )
        wanted = {f"{part}/{name}": tensor.detach() for name, tensor in targets.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that no process group is used: none is needed
            load_shards(wanted, storage_reader=reader, no_dist=True)
    except (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _stored(reader: FileSystemReader, part: str) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of the stored tensors below `part`."""
    every: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return {name.removeprefix(f"{part}/"): meta for name, meta in every.items() if name.startswith(f"{part}/")}


def _prune(folder: Path, keep: int) -> None:
    steps = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    for path in steps[:-keep]:
        shutil.rmtree(path)

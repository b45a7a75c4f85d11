"""Checkpoints are ours alone: `step-N` folders and a `latest` that is renamed into place.

A checkpoint holds every tensor, trained or frozen, the averages of the trained ones where the stage has
them, the optimizer state of every track by parameter name, the counters of every track, the fingerprint
of what it belongs to, a list of its tensors, the history up to it, and a hash of every file. Which one
training goes on from is decided in `recovery`.
Every worker writes and reads its own shards (torch.distributed.checkpoint): no worker ever holds the
whole of a sharded model, and training can go on with another number of workers or another strategy.
"""

import hashlib
import pickle
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
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
from typing_extensions import TypedDict

from unifork.config import Lora, fingerprint
from unifork.errors import CheckpointError, MachineError, refusing, writing
from unifork.models.modeling import UniForkModel, load_model
from unifork.shards.manifest import fsync_folder, fsync_tree, write_atomically, write_json
from unifork.training.history import FILE
from unifork.training.optimizer import Average, Optimizers, add_adapters
from unifork.training.strategies import Strategy, gathered
from unifork.weights import check_fit, read_json

LATEST = "latest"
STATE = "state.json"
FORMAT = 3
UNREADABLE = (CheckpointException, OSError, EOFError, RuntimeError, pickle.UnpicklingError)
HASH = "blake2b"
"""In `state.json`: of a file, and of everything else that it says."""


FINISHED = "finished.json"


class Finished(TypedDict):
    """A run that is done: the file `finished.json`."""

    fingerprint: str
    seconds: float
    """Of the attempt that ended it."""


@dataclass(frozen=True)
class State:
    """Where a run stands."""

    steps: dict[str, int]
    """Finished steps of each track."""
    extends: bool = False
    """Whether the optimizers go on from another run."""

    @property
    def begun(self) -> list[str]:
        """The tracks that have optimizer state."""
        return [name for name, steps in self.steps.items() if steps or self.extends]

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
    is raised by `check`, by the next `save` or at the end of the `with` block, which waits for what is unfinished.
    """

    def __init__(self, folder: Path, trained: set[str], fingerprint: str, keep: int, lead: bool) -> None:
        """trained: names of the parameters that any track trains. keep: how many checkpoints stay."""
        self.folder, self.trained, self.fingerprint, self.keep, self.lead = folder, trained, fingerprint, keep, lead
        self.group = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.unfinished = Future[None]()
        self.unfinished.set_result(None)
        # of a worker that is alone; catching it in the thread would change the filters of all threads
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.thread.shutdown()
        self.stager.close()
        if kind is None:
            self.wait()

    def save(self, model: nn.Module, strategy: Strategy, state: State, average: Average | None = None) -> None:
        """Copy everything to the CPU and begin to write it. Raises what went wrong with the one before."""
        self.wait()
        tensors = {f"model/{name}": tensor.detach() for name, tensor in strategy.weights(all_tensors(model)).items()}
        if average:
            tensors |= {f"ema/{name}": value for name, value in average.values.items()}
        for track in state.begun:
            tensors |= {f"optimizer/{track}/{name}": moment for name, moment in strategy.moments(track).items()}
        copies = cast(dict[str, Tensor], self.stager.stage(tensors))
        history = self.folder / FILE
        recorded = history.stat().st_size if self.lead and history.exists() else 0  # steps up to this one
        self.unfinished = self.thread.submit(self._write, copies, state, recorded)

    def check(self) -> None:
        """Raise what went wrong with a checkpoint, if its thread has ended; waits for nothing."""
        if self.unfinished.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved last is `latest`. Raises what went wrong."""
        self.unfinished.result()

    def _barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def _write(self, tensors: dict[str, Tensor], state: State, recorded: int) -> None:
        """The files of a checkpoint. Raises MachineError where they cannot be written."""
        final = folder_of(self.folder, state)
        try:
            with writing(final):
                self._write_files(tensors, state, recorded, final)
        except (CheckpointException, RuntimeError) as error:  # of torch, which hides what the disk said in a traceback
            reason = str(error).strip().splitlines()[-1]
            raise MachineError(f"{final}: the checkpoint cannot be written: {reason}") from None

    def _write_files(self, tensors: dict[str, Tensor], state: State, recorded: int, final: Path) -> None:
        """The files of this worker with their hashes; then, by the lead, what makes them a checkpoint."""
        temporary = self.folder / f".{final.name}.tmp"
        if self.lead:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            with open(self.folder / FILE, "rb") if recorded else BytesIO() as history:
                (temporary / FILE).write_bytes(history.read(recorded))
        self._barrier()
        alone = self.group is None
        save_shards(tensors, storage_writer=FileSystemWriter(temporary), process_group=self.group, no_dist=alone)
        own = f"__{0 if alone else dist.get_rank()}_*"
        every = gathered({path.name: written_file(path) for path in temporary.glob(own)}, self.group)
        if self.lead:
            written = {name: file for files in every for name, file in files.items()}
            written |= {path.name: written_file(path) for path in temporary.iterdir() if path.name not in written}
            plain = {
                "format": FORMAT, "fingerprint": self.fingerprint, "steps": state.steps, "files": written,
                "tensors": _tensor_list(temporary, self.trained),
            }  # fmt: skip
            write_json(temporary / STATE, {**plain, HASH: fingerprint(plain)})
            fsync_tree(temporary)
            temporary.rename(final)
            fsync_folder(self.folder)
            write_atomically(self.folder / LATEST, lambda path: path.write_text(final.name))
            _prune(self.folder, self.keep)
        self._barrier()


def written_file(path: Path) -> dict[str, Any] | None:
    """Size and hash of a file; None where there is none."""
    try:
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16))
            return {"bytes": handle.tell(), HASH: digest.hexdigest()}
    except FileNotFoundError:
        return None


def _tensor_list(path: Path, trained: set[str]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and trained-or-frozen of every tensor of the model that was written."""
    return {
        name: {"shape": list(found.size), "dtype": str(found.properties.dtype), "trained": name in trained}
        for name, found in _stored(FileSystemReader(path), "model").items()
    }


def latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its state; None when there is none. Files are checked by `recovery.settle`.

    Raises CheckpointError when `latest` names a checkpoint that is missing.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text().strip()
    return path, read_state(path)


def read_state(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, which may be damaged. Raises CheckpointError where it is no JSON object."""
    return read_json(path / STATE)


def is_intact(plain: dict[str, Any]) -> bool:
    """Whether a state is as it was written."""
    return plain.get(HASH) == fingerprint({key: value for key, value in plain.items() if key != HASH})


def step_folders(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, whole or not, oldest first."""
    named = [path for path in folder.glob("step-*") if path.name[5:].isdecimal()]
    return sorted(named, key=lambda path: int(path.name[5:]))


def start(
    found: tuple[Path, dict[str, Any]] | None, model: nn.Module, optimizers: Optimizers, strategy: Strategy,
    average: Average | None = None, extended: Path | None = None,
) -> State:  # fmt: skip
    """Begin where a checkpoint ends, if there is one; it is loaded strictly, a worker reads what it needs.

    extended: the run folder that a run without a checkpoint goes on from. Raises CheckpointError when names, shapes or
    dtypes differ, ConfigError as `Strategy.start` and `Average.start`.
    """
    begun = found or (latest(extended) if extended else None)
    if begun:
        _read(begun[0], "model", all_tensors(model))
    strategy.start(optimizers)
    if average:
        average.start()
    state = State(dict(found[1]["steps"]) if found else dict.fromkeys(optimizers, 0), extends=extended is not None)
    if begun:
        path, _ = begun
        for track in state.begun:
            strategy.read_moments(track, partial(_read, path))
        if average and _stored(FileSystemReader(path), "ema"):
            _read(path, "ema", average.values)
    return state


def whole_model(path: Path, start: Path, averaged: bool = False, lora: Lora | None = None) -> UniForkModel:
    """The model of a checkpoint in one piece on the CPU, whatever strategy wrote it.

    start: model directory the run began with, which has the configuration. averaged: with the average of what was
    trained. lora: adapters of the checkpoint, which are added to the weights. Raises CheckpointError.
    """
    model = load_model(start)
    adapters = add_adapters(model, lora, seed=0)
    tensors = all_tensors(model)
    _read(path, "model", tensors)
    if averaged:
        _read(path, "ema", {name: tensors[name] for name in _stored(FileSystemReader(path), "ema")})
    return cast(UniForkModel, adapters.merge_and_unload()) if adapters else model


def _read(path: Path, part: str, targets: dict[str, Tensor]) -> None:
    """Fill `targets` with the tensors below `part`. Raises CheckpointError."""
    reader = FileSystemReader(path)
    with refusing(CheckpointError, f"{path}: cannot be read", *UNREADABLE):
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


def _stored(reader: FileSystemReader, part: str) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of the stored tensors below `part`."""
    every: dict[str, Any] = reader.read_metadata().state_dict_metadata
    return {name.removeprefix(f"{part}/"): meta for name, meta in every.items() if name.startswith(f"{part}/")}


def _prune(folder: Path, keep: int) -> None:
    named = (folder / LATEST).read_text()
    for path in step_folders(folder)[:-keep]:
        if path.name != named:
            shutil.rmtree(path)

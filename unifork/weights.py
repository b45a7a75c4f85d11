"""Checkpoint folders that others wrote: where they lie, and the tensors in them.

In: a local folder or the name of one on the Hugging Face Hub. Out: a local folder, the names of its
tensors, and the tensors that are asked for. Safetensors whole or in shards; pickles only where the
caller allows them, because loading one can run code. Names and shapes are known before anything is
read, so that a checkpoint of a billion parameters is refused or picked from without loading it.

Nothing here asks the network while the folder is there, and torch is not imported before a tensor is read.
"""

import json
import pickle
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from unifork.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLED = (".bin", ".pt", ".pth")
HUB_NAME = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?P<inside>(/[\w-][\w.-]*)*)(@(?P<revision>[\w./-]+))?")
"""`owner/name`, a folder inside it, and a revision: `owner/name/vision_tower@main`."""
TOWER = "model.vision_tower.vision_tower."
"""Prefix of the image tokenizer's tensors in an official checkpoint."""
LISTED = 10
"""Names of an error message."""
Shapes = dict[str, tuple[Any, ...]]
"""Of tensors by name."""
_DAMAGED = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError)


def translated(name: str, starts: Mapping[str, str]) -> str:
    """A name with another start; empty where it begins with none of those."""
    return next((new + name.removeprefix(old) for old, new in starts.items() if name.startswith(old)), "")


def local_folder(
    name: Path | str, beside: Sequence[Path] = (Path(),), files: Sequence[str] = ("*.json", "*.safetensors")
) -> Path:
    """The folder of that name below one of the folders `beside`, else from the Hub.

    files: patterns of what is downloaded; local folders are taken as they are. Raises
    CheckpointError that says where it was looked for and what the Hub answered.
    """
    found = next((folder for folder in (base / name for base in beside) if folder.is_dir()), None)
    if found:
        return found
    looked = f"{name}: no such folder ({', '.join(str((base / name).absolute()) for base in beside)})"
    match = HUB_NAME.fullmatch(str(name))
    if not match:
        raise CheckpointError(f"{looked}, and no name on the Hub (OWNER/NAME[/FOLDER][@REVISION])")
    from huggingface_hub import snapshot_download  # noqa: PLC0415  most uses need no network
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    repository, inside = match["id"], match["inside"].removeprefix("/")
    patterns = [f"{inside}/{pattern}" if inside else pattern for pattern in files]
    try:
        folder = Path(str(snapshot_download(repository, revision=match["revision"], allow_patterns=patterns)), inside)
    except (OSError, HFValidationError) as error:
        raise CheckpointError(f"{looked}; the Hub did not give {repository}: {_line(error)}") from None
    if not folder.is_dir():
        raise CheckpointError(f"{looked}; {repository} on the Hub has no folder {inside}")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError when the file is missing, damaged or something else."""
    try:
        plain = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(plain).__name__}")
    return plain


class StoredWeights:
    """The tensors of a checkpoint folder, not yet read: `file_of` and `shapes` by name.

    Raises CheckpointError when there are none, when a file is damaged or missing, when an index
    disagrees with its files, and for pickles without `allow_pickle`.
    """

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        self.folder = folder
        listed = _weight_file(folder, allow_pickle)
        placed = _weight_map(listed) if listed.suffix == ".json" else {}
        held = {path: _open(path)[0] for path in sorted(set(placed.values())) or [listed]}
        self.file_of = placed or dict.fromkeys(held[listed], listed)
        lost = [f"{name} in {path.name}" for name, path in self.file_of.items() if name not in held[path]]
        refuse_tensors(listed, {"are not where it says": lost})
        self.shapes = {name: held[path][name] for name, path in self.file_of.items()}

    def read(self, names: Collection[str]) -> dict[str, "Tensor"]:
        """The named tensors, on the CPU, in the dtype they are stored in."""
        tensors: dict[str, Tensor] = {}
        for path in sorted({self.file_of[name] for name in names}):
            tensors |= read_tensors(path, [name for name in names if self.file_of[name] == path])
        return tensors


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, "Tensor"]:
    """The named tensors of one file, all by default. Raises CheckpointError when it is missing or damaged."""
    held, read = _open(path)
    try:
        return {name: read(name) for name in (held if names is None else names)}
    except _DAMAGED as error:
        raise CheckpointError(f"{path}: damaged: {_line(error)}") from None


def refuse_tensors(place: Path | str, faults: Mapping[str, Iterable[str]]) -> None:
    """Raise CheckpointError where tensors are at fault; `faults` names them by what is wrong with them."""
    found = {what: sorted(names) for what, names in faults.items()}
    problems = [
        f"{len(names)} tensors {what}: {', '.join(names[:LISTED])}{', ...' * (len(names) > LISTED)}"
        for what, names in found.items()
        if names
    ]
    if problems:
        raise CheckpointError(f"{place}: {'; '.join(problems)}")


def check_fit(place: Path | str, found: Shapes, wanted: Shapes) -> None:
    """Raise CheckpointError where tensors are missing, unexpected or of another shape than those wanted."""
    both = found.keys() & wanted.keys()
    faults = {
        "missing": wanted.keys() - both,
        "unexpected": found.keys() - both,
        "of another shape": [
            f"{name} {found[name]}, wanted {wanted[name]}" for name in both if found[name] != wanted[name]
        ],
    }
    refuse_tensors(place, faults)


def shapes_of(tensors: Mapping[str, "Tensor"]) -> Shapes:
    """The shape of every tensor."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _weight_file(folder: Path, allow_pickle: bool) -> Path:
    usual = [folder / name for name in (WHOLE, INDEX, *PICKLES) if (folder / name).exists()]
    found = usual[:1] or sorted(path for path in folder.iterdir() if path.suffix in PICKLED)
    if not found:
        raise CheckpointError(f"{folder}: no weights; expected {WHOLE} or {INDEX}")
    if found[0].name not in (WHOLE, INDEX) and not allow_pickle:
        raise CheckpointError(
            f"{found[0]}: pickled weights can run code when they are loaded; convert them to safetensors, "
            "or allow them where the command has --allow-pickle (plain tensors only, even then)"
        )
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several pickled checkpoints: {', '.join(path.name for path in found)}")
    return found[0]


def _weight_map(index: Path) -> dict[str, Path]:
    """The file of each tensor, as an index says it."""
    named = read_json(index).get("weight_map")
    if not named or not isinstance(named, dict) or any(Path(str(file)).name != file for file in named.values()):
        raise CheckpointError(f"{index}: expected a weight_map from tensors to files beside it")
    return {name: index.parent / file for name, file in named.items()}


def _open(path: Path) -> tuple[Shapes, Callable[[str], "Tensor"]]:
    """The tensors of one file by shape, and how to read one of them."""
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, "pt")
            names = list(file.keys())  # type: ignore[no-untyped-call]
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}, file.get_tensor  # type: ignore[no-untyped-call]
        import torch  # noqa: PLC0415  safetensors imports it by itself

        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except _DAMAGED as error:
        raise CheckpointError(f"{path}: damaged: {_line(error)}") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected tensors by name, found {type(state).__name__}")
    return shapes_of(state), state.__getitem__


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

"""All comparisons over a fixture folder: a table of verdicts, and the tensors this project computed.

In: a folder of reference numbers of the official code (its README says what each tensor is). Out:
one `Verdict` per tensor; a module whose comparisons raise is a verdict too, and the others go on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.parity import model, preprocessing, text, tokenizer
from benchmarks.parity.comparison import Comparison
from unifork.errors import DataError

AREAS: tuple[ModuleType, ...] = (preprocessing, tokenizer, text, model)
"""Modules with `comparisons(folder) -> Iterator[Comparison]`, in the order of the table."""


@dataclass(frozen=True, eq=False)
class Verdict:
    """One line of the table: a tensor that was compared, or what kept a module from comparing."""

    item: str
    tensor: str
    comparison: Comparison | None
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether the tensors were compared and agree."""
        return self.comparison is not None and self.comparison.agrees

    def __str__(self) -> str:
        if (found := self.comparison) is None:
            return f"{self.item}: {self.tensor}: {self.error}"
        return f"{self.item} {self.tensor}: differs by {found.difference}, allowed {found.allowed}"


def verdicts(folder: Path, areas: Iterable[ModuleType] = AREAS) -> Iterator[Verdict]:
    """Every comparison of every module, in order. Raises DataError where there is no such folder."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected one with reference numbers (01_tokenizer.safetensors, ...)"
        )
    for area in areas:
        name, last = area.__name__.rpartition(".")[2], "at the start"
        try:
            for comparison in area.comparisons(folder):
                last = f"after {comparison.item} {comparison.tensor}"
                yield Verdict(comparison.item, comparison.tensor, comparison)
        except Exception as error:  # whatever is wrong with one part, the others are still compared
            yield Verdict(name, last, None, f"{type(error).__name__}: {error}")


def write(compared: Iterable[Comparison], fixtures: Path, folder: Path) -> list[Path]:
    """The computed tensors, in files and under names like those of the fixtures; returns the files."""
    items: dict[str, dict[str, Tensor]] = {}
    for comparison in compared:
        items.setdefault(comparison.item, {})[comparison.tensor] = comparison.actual.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for item, tensors in items.items():
        if (fixtures / f"{item}.npz").exists():
            path = folder / f"{item}.npz"
            np.savez_compressed(path, allow_pickle=False, **{name: tensor.numpy() for name, tensor in tensors.items()})
        else:
            path = folder / f"{item}.safetensors"
            save_file(tensors, path)
        written.append(path)
    return written

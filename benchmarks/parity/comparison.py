"""One compared tensor: what the original gave, what this project gives, and how far apart they may be."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Comparison:
    """`expected` and `actual` of one tensor of a fixture folder.

    The two agree when their shapes are equal and every |expected - actual| is at most
    `absolute + relative * |expected|`. A tolerance of zero asks for equal values.
    """

    item: str
    """Fixture file the tensor belongs to, for example `01_tokenizer`."""
    tensor: str
    """Name of the tensor in that file."""
    expected: Tensor
    actual: Tensor
    absolute: float = 0.0
    relative: float = 0.0

    @property
    def agrees(self) -> bool:
        """Whether the tensors agree within the tolerance."""
        if self.expected.shape != self.actual.shape:
            return False
        expected, actual = self.expected.double(), self.actual.double()
        return bool(torch.isclose(actual, expected, rtol=self.relative, atol=self.absolute).all())

    @property
    def difference(self) -> str:
        """The largest absolute difference in words; infinite where a value is not finite in one only."""
        if self.expected.shape != self.actual.shape:
            return f"shape {tuple(self.actual.shape)} instead of {tuple(self.expected.shape)}"
        gap = (self.expected.double() - self.actual.double()).abs().nan_to_num(nan=float("inf"))
        return f"{float(gap.max()) if gap.numel() else 0.0:.3g}"

    @property
    def allowed(self) -> str:
        """The tolerance in words."""
        parts = [f"{self.absolute:.2g}"] if self.absolute or not self.relative else []
        return " + ".join([*parts, *([f"{self.relative:.2g} x value"] if self.relative else [])])


class Reference:
    """The tensors of one fixture file, and comparisons with them. Raises FileNotFoundError where there is none."""

    def __init__(self, folder: Path, item: str) -> None:
        self.item, self.tensors = item, load_file(folder / f"{item}.safetensors")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def compare(
        self, computed: Mapping[str, Tensor], absolute: float = 0.0, relative: float = 0.0
    ) -> Iterator[Comparison]:
        """One comparison for every tensor that was computed, in the dtype of the stored one of its name."""
        for name, actual in computed.items():
            expected = self.tensors[name]
            yield Comparison(self.item, name, expected, actual.detach().to(expected.dtype), absolute, relative)

    def matching(self, pattern: str) -> Iterator[tuple[Any, ...]]:
        """The groups of every name that a pattern matches."""
        return (match.groups() for name in sorted(self.tensors) if (match := re.fullmatch(pattern, name)))

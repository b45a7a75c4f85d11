"""One compared tensor: what the original gave, what this project gives, and how far apart they may be."""

from dataclasses import dataclass

import torch
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
    def difference(self) -> float:
        """Largest absolute difference; infinite where shapes differ or a value is not finite in one only."""
        if self.expected.shape != self.actual.shape:
            return float("inf")
        gap = (self.expected.double() - self.actual.double()).abs()
        return float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0

    @property
    def agrees(self) -> bool:
        """Whether the tensors agree within the tolerance."""
        if self.expected.shape != self.actual.shape:
            return False
        expected, actual = self.expected.double(), self.actual.double()
        return bool(torch.isclose(actual, expected, rtol=self.relative, atol=self.absolute).all())

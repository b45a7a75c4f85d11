"""The residual quantiser: a feature vector becomes D row numbers of one shared codebook.

In: features (..., C). Out: codes (..., D), each the nearest row to what the rows before it left
over; back again: the sum of the rows. Nothing here learns: the codebook is a frozen table, and
`codebook_training` is the only code that writes to it. (The official quantiser updates its moving
averages whenever the module is in training mode, so its codebook drifts while the language model
is trained.)

Shape suffixes: M vectors, K codebook rows, C channels, D depth.
"""

import torch
from torch import Tensor, nn

from unifork.errors import DataError

ROWS_AT_ONCE = 16384
"""Vectors compared with the codebook in one product; bounds the memory at real size to 1 GiB."""


class ResidualQuantizer(nn.Module):
    """A codebook of K rows and how often it is looked into per position."""

    codebook: Tensor

    def __init__(self, codebook_size: int, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.register_buffer("codebook", torch.zeros(codebook_size, width))

    def quantise(self, features: Tensor) -> Tensor:
        """Codes (..., D), int64, of features (..., C)."""
        codes_MD, _ = residual_codes(features.reshape(-1, features.shape[-1]), self.codebook, self.depth)
        return codes_MD.view(*features.shape[:-1], self.depth)

    def lookup(self, codes: Tensor) -> Tensor:
        """The sum of the code rows, (..., C), of codes (..., D). Raises DataError for codes out of range."""
        rows = self.codebook.shape[0]
        if codes.shape[-1] != self.depth or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < rows):
            raise DataError(
                f"codes of shape {tuple(codes.shape)} with values {int(codes.min())} to {int(codes.max())}: "
                f"allowed are {self.depth} codes per position, each from 0 to {rows - 1}"
            )
        return self.codebook[codes].sum(-2)


@torch.no_grad()
def residual_codes(features_MC: Tensor, codebook_KC: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Codes (M, D) and the residuals each of them was chosen for (M, D, C).

    Computed in float32 whatever the dtype of the features: a distance in bfloat16 cannot tell
    neighbouring rows apart.
    """
    rest_MC = features_MC.to(torch.float32)
    codebook_KC = codebook_KC.to(torch.float32)
    codes, residuals = [], []
    for _ in range(depth):
        chosen_M = nearest_rows(rest_MC, codebook_KC)
        codes.append(chosen_M)
        residuals.append(rest_MC)
        rest_MC = rest_MC - codebook_KC[chosen_M]
    return torch.stack(codes, dim=1), torch.stack(residuals, dim=1)


def commitment_loss(features_MC: Tensor, partial_MDC: Tensor) -> Tensor:
    """The official one: the mean over depths of the mean squared distance between features and partial sums of rows."""
    return (features_MC[:, None] - partial_MDC).square().mean()


@torch.no_grad()
def nearest_rows(vectors_MC: Tensor, codebook_KC: Tensor) -> Tensor:
    """The nearest codebook row of each vector by squared distance, (M,), int64."""
    square_K = codebook_KC.square().sum(1)
    parts = []
    for part_MC in torch.split(vectors_MC, ROWS_AT_ONCE):
        square_M1 = part_MC.square().sum(1, keepdim=True)
        distance_MK = torch.addmm(square_M1 + square_K, part_MC, codebook_KC.t(), alpha=-2.0)
        parts.append(distance_MK.argmin(1))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=vectors_MC.device)

"""How a codebook learns: residual k-means to start, moving averages to follow the encoder.

In: encoder features. Out: the rows of a `ResidualQuantizer`. Kept apart from the quantizer, so that
no mode of any module can change a codebook; only who makes a `CodebookAverages` can.

Shape suffixes: M vectors, K codebook rows, C channels, D depth, R replaced rows.
"""

import torch
from torch import Tensor

from unifork.errors import DataError
from unifork.image_tokenizer.model import ResidualQuantizer, nearest_rows, residual_codes

KMEANS_ROUNDS = 15
DEAD_SHARE = 0.02
"""A row used less than this share of the average row's use is moved to where the error is large."""


@torch.no_grad()
def residual_kmeans(features_MC: Tensor, codebook_size: int, depth: int, generator: torch.Generator) -> Tensor:
    """A first codebook (K, C): the rows shared out over the depths, each share fitted to what is left.

    Share d is the result of k-means on the residuals after quantizing with all rows found before,
    d times. The rows serve all depths afterwards, but start with a place of their own. Raises
    DataError when there are fewer features than rows.
    """
    if features_MC.shape[0] < codebook_size:
        raise DataError(f"k-means of {codebook_size} rows needs as many vectors, got {features_MC.shape[0]}")
    rest_MC = features_MC.to(torch.float32)
    found: list[Tensor] = []
    shares = [codebook_size // depth + (d < codebook_size % depth) for d in range(depth)]
    for share in shares:
        found.append(kmeans(rest_MC, share, generator))
        rows_KC = torch.cat(found)
        rest_MC = rest_MC - rows_KC[nearest_rows(rest_MC, rows_KC)]
    return torch.cat(found)


@torch.no_grad()
def kmeans(vectors_MC: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Centers (rows, C) by Lloyd's rounds; empty centers move to the vectors that lie farthest off."""
    first = torch.randperm(vectors_MC.shape[0], generator=generator)[:rows]
    centers_KC = vectors_MC[first].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest_M = nearest_rows(vectors_MC, centers_KC)
        counts_K, sums_KC = count_and_sum(nearest_M, vectors_MC, rows)
        centers_KC = torch.where(counts_K[:, None] > 0, sums_KC / counts_K.clamp(min=1)[:, None], centers_KC)
        empty = (counts_K == 0).nonzero()[:, 0]
        if empty.numel():
            error_M = (vectors_MC - centers_KC[nearest_M]).square().sum(1)
            centers_KC[empty] = vectors_MC[_draw(error_M, empty.numel(), generator)]
    return centers_KC


@torch.no_grad()
def count_and_sum(codes_M: Tensor, vectors_MC: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """How many vectors chose each row, (K,), and their sum, (K, C)."""
    counts_K = torch.bincount(codes_M, minlength=rows).to(vectors_MC.dtype)
    sums_KC = torch.zeros(rows, vectors_MC.shape[1], dtype=vectors_MC.dtype, device=vectors_MC.device)
    return counts_K, sums_KC.index_add_(0, codes_M, vectors_MC)


class CodebookAverages:
    """Moving averages of who chooses each row; the only thing that writes to a codebook.

    Vectors of all depths count together, since the depths share the rows.
    """

    def __init__(
        self, quantizer: ResidualQuantizer, features_MC: Tensor, decay: float, generator: torch.Generator
    ) -> None:
        """Start the codebook by residual k-means, and the averages from the features it was found on."""
        self.quantizer, self.decay, self.generator = quantizer, decay, generator
        rows = quantizer.codebook.shape[0]
        quantizer.codebook.copy_(residual_kmeans(features_MC, rows, quantizer.depth, generator))
        codes_MD, _ = residual_codes(features_MC, quantizer.codebook, quantizer.depth)
        counts_K = torch.bincount(codes_MD.flatten(), minlength=rows).to(features_MC.dtype)
        self.count_K = counts_K * (rows / codes_MD.numel())
        self.sum_KC = quantizer.codebook * self.count_K[:, None]

    @torch.no_grad()
    def update(self, codes_MD: Tensor, residuals_MDC: Tensor, *, refill: bool) -> int:
        """Follow one batch; returns how many unused rows were moved to badly served vectors."""
        rows = self.quantizer.codebook.shape[0]
        counts_K, sums_KC = count_and_sum(codes_MD.reshape(-1), residuals_MDC.flatten(0, 1), rows)
        scale = rows / codes_MD.numel()  # the average row then counts 1, whatever the batch
        self.count_K.mul_(self.decay).add_(counts_K * scale, alpha=1 - self.decay)
        self.sum_KC.mul_(self.decay).add_(sums_KC * scale, alpha=1 - self.decay)
        moved = 0
        if refill:
            dead = (self.count_K < DEAD_SHARE).nonzero()[:, 0]
            last_MC = residuals_MDC[:, -1]
            error_M = (last_MC - self.quantizer.codebook[codes_MD[:, -1]]).square().sum(1)
            moved = min(dead.numel(), int((error_M > 0).sum()))
            if moved:
                dead = dead[:moved]
                depths = torch.randint(codes_MD.shape[1], (moved,), generator=self.generator)
                self.sum_KC[dead] = residuals_MDC[_draw(error_M, moved, self.generator), depths]
                self.count_K[dead] = 1.0
        used = self.count_K > 1e-6
        self.quantizer.codebook[used] = self.sum_KC[used] / self.count_K[used, None]
        return moved


def _draw(error_M: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` vectors, those with a large error more often; all alike where there is no error. Drawn on the CPU."""
    weights_M = error_M.cpu() + 1e-12
    return torch.multinomial(weights_M, count, replacement=count > weights_M.numel(), generator=generator)

"""Cross entropy of a linear classifier without its logits ever being whole.

In: hidden states, the classifier and the targets. Out: the loss of every row. At the real sizes
(151,936 words, 16,384 codes at 4 depths) the logits of a packed row, their copy in float32 and
their gradient are by far the largest tensors of a step. Here logits live a chunk at a time: the
forward pass keeps only the logarithm of each row's normalizer, the backward pass computes the chunk
again. Computing gradients already in the forward pass (as torch's own `linear_cross_entropy` of
2.13 does) saves that fourth product but allows a single scalar result; the losses here are weighted
and reported by depth. On a CUDA device what happens between the products is compiled, so that the logits of a chunk
are read as they come out of a product and nothing as large is written but their gradient.

Sums and gradients of weights are accumulated in float32 (float64 for float64). Weights are used
where the caller sees them, so they must be whole: call it inside the root module's forward.

Shape suffixes: R rows, H hidden size, V classes, c a chunk of rows.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in float32, 220 rows of 151,936 words, 2,048 of 16,384 codes.
Smaller chunks read the classifier and write its gradient more often; larger ones cost memory. A
batch with fewer logits than that takes torch's plain cross entropy, which is then the faster one."""

COMPILED_ON = {"cuda"}
"""Types of devices on which chunks are compiled."""


def linear_cross_entropy(hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_R: Tensor) -> Tensor:
    """Cross entropy (R) of `target_R` under the logits `hidden @ weight.T + bias`, at least float32.

    Zero rows are legal and give every argument a zero gradient.
    """
    if hidden_RH.shape[0] * weight_VH.shape[0] <= CHUNK_LOGITS:
        return F.cross_entropy(_wide(F.linear(hidden_RH, weight_VH, bias_V)), target_R, reduction="none")
    device = hidden_RH.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_RH, weight_VH = hidden_RH.to(dtype), weight_VH.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    loss_R: Tensor = _Chunked.apply(hidden_RH, weight_VH, bias_V, target_R)  # type: ignore[no-untyped-call]
    return loss_R


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _chunks(rows: int, classes: int) -> Iterator[slice]:
    size = max(1, CHUNK_LOGITS // classes)
    return (slice(start, start + size) for start in range(0, rows, size))


def _loss(logits_cV: Tensor, target_c: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the normalizer, and loss, of each row of a chunk."""
    wide_cV = _wide(logits_cV)
    normalizer_c = wide_cV.logsumexp(1)
    return normalizer_c, normalizer_c - wide_cV.gather(1, target_c[:, None])[:, 0]


Slope = tuple[Tensor, Tensor | None]
"""Gradient of a chunk's logits (c, V) in their own type, and of the bias (V) where that is wanted."""


def _slope(logits_cV: Tensor, normalizer_c: Tensor, target_c: Tensor, grad_c: Tensor, wants_bias: bool) -> Slope:
    """For a compiler: nothing but the results is written."""
    chosen_cV = torch.arange(logits_cV.shape[1], device=logits_cV.device) == target_c[:, None]
    slope_cV = ((_wide(logits_cV) - normalizer_c[:, None]).exp() - chosen_cV) * grad_c[:, None]
    return slope_cV.to(logits_cV.dtype), slope_cV.sum(0) if wants_bias else None


def _slope_in_place(
    logits_cV: Tensor, normalizer_c: Tensor, target_c: Tensor, grad_c: Tensor, wants_bias: bool
) -> Slope:
    """Each line reads and writes all logits: widened where they are subtracted from, narrowed where weighted."""
    in_place = logits_cV if logits_cV.dtype == normalizer_c.dtype else None
    slope_cV = torch.sub(logits_cV, normalizer_c[:, None], out=in_place).exp_()
    slope_cV.scatter_add_(1, target_c[:, None], -torch.ones_like(grad_c[:, None]))
    bias_grad_V = grad_c @ slope_cV if wants_bias else None
    return torch.mul(slope_cV, grad_c[:, None], out=logits_cV), bias_grad_V


@cache
def _on(device: str, function: Any, eager: Any = None) -> Any:
    """A function of a chunk as a type of device calls it: compiled for any number of rows, or as it is written."""
    return torch.compile(function, dynamic=True) if device in COMPILED_ON else eager or function


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_R: Tensor) -> Tensor:
        normalizer_R = _wide(hidden_RH.new_empty(0)).new_empty(len(hidden_RH))
        loss_R = torch.empty_like(normalizer_R)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for c in _chunks(len(hidden_RH), len(weight_VH)):
                logits_cV = F.linear(hidden_RH[c], weight_VH, bias_V)
                normalizer_R[c], loss_R[c] = _on(logits_cV.device.type, _loss)(logits_cV, target_R[c])
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, target_R, normalizer_R)
        return loss_R

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden_RH, weight_VH, bias_V, target_R, normalizer_R = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        hidden_grad_RH = torch.empty_like(hidden_RH) if wants_hidden else None
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=normalizer_R.dtype) if wants_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=normalizer_R.dtype) if wants_bias else None
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for c in _chunks(len(hidden_RH), len(weight_VH)):
                logits_cV = F.linear(hidden_RH[c], weight_VH, bias_V)
                slope = _on(logits_cV.device.type, _slope, _slope_in_place)
                narrow_cV, chunk_grad_V = slope(logits_cV, normalizer_R[c], target_R[c], grad_R[c], wants_bias)
                if bias_grad_V is not None:
                    bias_grad_V += chunk_grad_V
                if hidden_grad_RH is not None:
                    hidden_grad_RH[c] = narrow_cV @ weight_VH
                if weight_grad_VH is not None:
                    _add_product(weight_grad_VH, narrow_cV.T, hidden_RH[c])
        weight_grad_VH = None if weight_grad_VH is None else weight_grad_VH.to(weight_VH.dtype)
        bias_grad_V = None if bias_grad_V is None else bias_grad_V.to(bias_V.dtype)
        return hidden_grad_RH, weight_grad_VH, bias_grad_V, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)

"""Cross entropy of a linear classifier without its logits ever being whole.

In: hidden states, the classifier and the targets. Out: the loss of every row. At the real sizes
(151,936 words, 16,384 codes at 4 depths) the logits of a packed row, their copy in float32 and
their gradient are by far the largest tensors of a step. Here logits live a chunk at a time: the
forward pass keeps only the logarithm of each row's normalizer, the backward pass computes the chunk
again. Computing gradients already in the forward pass (as torch's own `linear_cross_entropy` of
2.13 does) saves that fourth product but allows a single scalar result; the losses here are weighted
and reported by depth.

Sums and gradients of weights are accumulated in float32 (float64 for float64). Weights are used
where the caller sees them, so they must be whole: call it inside the root module's forward.

Shape suffixes: R rows, H hidden size, V classes, c a chunk of rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = 2**25
"""Logits that exist at a time: 128 MiB in float32, 220 rows of 151,936 words, 2,048 of 16,384 codes.
Smaller chunks read the classifier and write its gradient more often; larger ones cost memory. A
batch with fewer logits than that takes torch's plain cross entropy, which is then the faster one."""


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


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_R: Tensor) -> Tensor:
        normalizer_R = _wide(hidden_RH.new_empty(0)).new_empty(len(hidden_RH))
        loss_R = torch.empty_like(normalizer_R)
        with torch.autocast(hidden_RH.device.type, enabled=False):
            for c in _chunks(len(hidden_RH), len(weight_VH)):
                logits_cV = _wide(F.linear(hidden_RH[c], weight_VH, bias_V))
                chosen_c = logits_cV.gather(1, target_R[c, None])[:, 0]
                normalizer_R[c] = logits_cV.logsumexp(1)
                loss_R[c] = normalizer_R[c] - chosen_c
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
                # each line reads and writes all logits of a chunk: widened where they are subtracted from, narrowed
                # where they are weighted
                logits_cV = F.linear(hidden_RH[c], weight_VH, bias_V)
                in_place = logits_cV if logits_cV.dtype == normalizer_R.dtype else None
                slope_cV = torch.sub(logits_cV, normalizer_R[c, None], out=in_place).exp_()
                slope_cV.scatter_add_(1, target_R[c, None], -torch.ones_like(grad_R[c, None]))
                if bias_grad_V is not None:
                    bias_grad_V += grad_R[c] @ slope_cV
                narrow_cV = torch.mul(slope_cV, grad_R[c, None], out=logits_cV)
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

"""Who sees whom, stated explicitly, in the form that each attention implementation wants.

In: the document number of every token (NO_DOCUMENT is padding) and, for isolated layers, its branch.
Out: a mask, or for `varlen` sequences of their own. A token sees itself and earlier tokens of its own
document, in isolated layers only those of its own branch. transformers would infer borders between
documents from jumps in the positions, and only when no cache is made; nothing is left to inference here.

The queries are the last T of S tokens, so the same rule serves packed rows (T = S) and decoding with
a cache, with padding on either side: padding is a document of its own, always sees itself, and is
seen by nobody else.

`varlen` is an implementation for transformers' interface that needs no mask: `Sequences` holds the
order that brings the tokens of a sequence together, and their lengths. Where nothing is isolated the
documents already follow each other and nothing is sorted; for isolated layers tokens are sorted by
document and branch. Causal attention within each sequence is then exactly what the masks say. On a
CUDA device in half precision this is a variable-length kernel (flash-attn's or torch's), else one call per
sequence, which is the reference that kernels are tested against.

Shape suffixes: B rows, T queries (all tokens of a packed row), S keys, X = B*T, E head size, A attention
heads, G key heads, Q1 sequences and one more, L tokens of a sequence.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from itertools import accumulate, chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from unifork.batch import NO_DOCUMENT
from unifork.errors import one_of

VARLEN, EAGER = "varlen", "eager"
"""Names of attention implementations, the first one ours."""

Counts = tuple[tuple[int, ...], ...]
"""Tokens of each document of packed rows by branch (`Batch.document_counts`)."""

KERNEL = "flash-attn" if find_spec("flash_attn") else "torch"
"""Whose variable-length kernel is used: that of the extra `flash`, where it is installed."""
Places = tuple[Tensor, Tensor] | None
_KERNEL_DTYPES = (torch.float16, torch.bfloat16)
_TORCH_SHARES_HEADS = "enable_gqa" in signature(varlen_attn).parameters
"""Not in every release that has the kernel."""


@dataclass(frozen=True, eq=False)
class Sequences:
    """Which tokens attend to each other, causally: `lengths` consecutive ones of the ordered tokens."""

    lengths: tuple[int, ...]
    starts_Q1: Tensor
    """Where each sequence starts, and the number of tokens at the end; int32, on the tokens' device."""
    order_X: Tensor | None = None
    """Sorts tokens by sequence; None where they already are. inverse_X puts them back."""
    inverse_X: Tensor | None = None

    def gather(self, heads_BATE: Tensor) -> Tensor:
        """What attention computes on (B, A, T, E) as ordered tokens (X, A, E)."""
        tokens_XAE = heads_BATE.transpose(1, 2).flatten(0, 1)
        return tokens_XAE if self.order_X is None else tokens_XAE.index_select(0, self.order_X)

    def scatter(self, tokens_XAE: Tensor) -> Tensor:
        """Ordered tokens in the order of the rows."""
        return tokens_XAE if self.inverse_X is None else tokens_XAE.index_select(0, self.inverse_X)


def sequences(documents_BT: Tensor, branches_BT: Tensor | None, counts: Counts, places: Places = None) -> Sequences:
    """The sequences of packed rows. `counts` come from the batch, so the device is never waited for.

    places: of tokens that were sorted by branch, where each stood in the rows, and the inverse.
    """
    runs = counts if places is None else zip(*counts, strict=True)
    lengths = tuple(map(sum, counts)) if branches_BT is None else tuple(filter(None, chain.from_iterable(runs)))
    starts_Q1 = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    starts_Q1 = starts_Q1.to(documents_BT.device, non_blocking=True)
    if branches_BT is None and places is not None:
        return Sequences(lengths, starts_Q1, *reversed(places))
    if branches_BT is None or places is not None:
        return Sequences(lengths, starts_Q1)
    B, T = documents_BT.shape
    last_BT = torch.where(documents_BT == NO_DOCUMENT, T, documents_BT)
    rows_B1 = torch.arange(B, device=documents_BT.device)[:, None]
    order_X = torch.argsort((((T + 1) * rows_B1 + last_BT) * 2 + branches_BT).flatten(), stable=True)
    return Sequences(lengths, starts_Q1, order_X, torch.argsort(order_X))


Mask = Tensor | Sequences


def visible_BTS(documents_BS: Tensor, branches_BS: Tensor | None, queries: int) -> Tensor:
    """True where one of the last `queries` tokens of a row sees a token of it."""
    S = documents_BS.shape[1]
    slots_S = torch.arange(S, device=documents_BS.device)
    seen = slots_S[None, :] <= slots_S[S - queries :, None]
    seen = seen & (documents_BS[:, S - queries :, None] == documents_BS[:, None, :])
    if branches_BS is not None:
        seen = seen & (branches_BS[:, S - queries :, None] == branches_BS[:, None, :])
    return seen


MASKS = ("sdpa", EAGER, VARLEN)
"""The attention implementations there is a mask for, by the names they have in transformers."""


def attention_mask(
    implementation: str,
    documents_BS: Tensor,
    branches_BS: Tensor | None,
    queries: int,
    dtype: torch.dtype,
    counts: Counts = (),
    places: Places = None,
) -> Mask:
    """The mask of the last `queries` tokens for an attention implementation. Raises ConfigError if unknown.

    For sdpa (B, 1, T, S), True where a key is seen; for eager attention the same with 0 where a key is seen, else
    the lowest number of the dtype. counts: of packed rows, which `varlen` takes as sequences (places as there);
    without them, in a step of decoding, it takes sdpa's mask.
    """
    one_of("attention implementation", implementation, MASKS, "attn_implementation")
    if implementation == VARLEN and counts:
        return sequences(documents_BS, branches_BS, counts, places)
    seen = visible_BTS(documents_BS, branches_BS, queries)[:, None]
    if implementation == EAGER:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    return seen


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Mask, **options: Any
) -> tuple[Tensor, None]:
    """Attention of (B, A, T, E) queries for transformers' interface: (B, T, A, E) and no weights.

    With a cache the queries are fewer than the keys and the mask is a tensor: that is sdpa.
    """
    if isinstance(attention_mask, Tensor):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    B, A, T, E = query.shape
    query_XAE, key_XGE, value_XGE = map(attention_mask.gather, (query, key, value))
    kernel = by_kernel if query.is_cuda and query.dtype in _KERNEL_DTYPES else one_by_one
    attended_XAE = kernel(query_XAE, key_XGE, value_XGE, attention_mask, options.get("scaling"))
    return attention_mask.scatter(attended_XAE).reshape(B, T, A, E), None


def by_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Sequences, scaling: float | None) -> Tensor:
    """Causal attention (X, A, E) within each sequence, in one call: of flash-attn where it is installed, else torch's.

    Heads of keys and values (G) are shared by A/G query heads each.
    """
    starts_Q1, longest = mask.starts_Q1, max(mask.lengths)
    bounds = (starts_Q1, starts_Q1, longest, longest)
    if KERNEL == "flash-attn":
        flash = import_module("flash_attn").flash_attn_varlen_func
        return cast(Tensor, flash(query, key, value, *bounds, softmax_scale=scaling, causal=True))
    shared: dict[str, Any] = {"enable_gqa": True} if _TORCH_SHARES_HEADS else {}
    if not shared:
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
    return cast(Tensor, varlen_attn(query, key, value, *bounds, scale=scaling, window_size=(-1, 0), **shared))


def one_by_one(query: Tensor, key: Tensor, value: Tensor, mask: Sequences, scaling: float | None) -> Tensor:
    """The same with one call per sequence, on any device.

    In four dimensions: with three, sdpa takes the path without a fused kernel, which is half as fast.
    """
    parts_1ALE = (torch.split(heads.transpose(0, 1)[None], list(mask.lengths), 2) for heads in (query, key, value))
    attended_1ALE = [
        F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
        for queries, keys, values in zip(*parts_1ALE, strict=True)
    ]
    return torch.cat(attended_1ALE, 2)[0].transpose(0, 1)


AttentionInterface.register(VARLEN, attend)

"""Who sees whom, stated explicitly.

In: the document number of every token (NO_DOCUMENT is padding) and, for isolated layers, its branch.
Out: a mask in the form the attention implementation wants. A token sees itself and earlier tokens
of its own document, in isolated layers only those of its own branch. transformers would infer
borders between documents from jumps in the positions, and only when no cache is made; nothing is
left to inference here.

The queries are the last T of S tokens, so the same rule serves packed rows (T = S) and decoding with
a cache, with padding on either side: padding is a document of its own, always sees itself, and is
seen by nobody else.

Shape suffixes: B rows, T queries, S keys.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from unifork.errors import unknown
from unifork.models.sequences import VARLEN, Counts, Sequences, sequences

Mask = Tensor | BlockMask | Sequences


def visible_BTS(documents_BS: Tensor, branches_BS: Tensor | None, queries: int) -> Tensor:
    """True where one of the last `queries` tokens of a row sees a token of it."""
    S = documents_BS.shape[1]
    slots_S = torch.arange(S, device=documents_BS.device)
    seen = slots_S[None, :] <= slots_S[S - queries :, None]
    seen = seen & (documents_BS[:, S - queries :, None] == documents_BS[:, None, :])
    if branches_BS is not None:
        seen = seen & (branches_BS[:, S - queries :, None] == branches_BS[:, None, :])
    return seen


def boolean_mask(
    documents_BS: Tensor, branches_BS: Tensor | None, queries: int, _dtype: torch.dtype, _counts: Counts = ()
) -> Tensor:
    """For sdpa: (B, 1, T, S), True where a key is seen."""
    return visible_BTS(documents_BS, branches_BS, queries)[:, None]


def additive_mask(
    documents_BS: Tensor, branches_BS: Tensor | None, queries: int, dtype: torch.dtype, _counts: Counts = ()
) -> Tensor:
    """For eager attention: (B, 1, T, S), 0 where a key is seen, else the lowest number of the dtype."""
    seen = visible_BTS(documents_BS, branches_BS, queries)[:, None]
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def block_mask(
    documents_BS: Tensor, branches_BS: Tensor | None, queries: int, _dtype: torch.dtype, _counts: Counts = ()
) -> BlockMask:
    """For flex attention: blocks nobody sees are skipped. Flex has no backward on a CPU."""
    B, S = documents_BS.shape
    offset = S - queries
    branches = documents_BS if branches_BS is None else branches_BS

    def seen(b: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_document = documents_BS[b, q + offset] == documents_BS[b, k]
        return (k <= q + offset) & same_document & (branches[b, q + offset] == branches[b, k])

    return create_block_mask(seen, B, None, queries, S, device=str(documents_BS.device))


def sequence_mask(
    documents_BS: Tensor, branches_BS: Tensor | None, queries: int, dtype: torch.dtype, counts: Counts = ()
) -> Mask:
    """For variable-length kernels: no mask but sequences; the boolean one in steps of decoding."""
    if not counts:
        return boolean_mask(documents_BS, branches_BS, queries, dtype)
    return sequences(documents_BS, branches_BS, counts)


MASKS: dict[str, Callable[[Tensor, Tensor | None, int, torch.dtype, Counts], Mask]] = {
    "sdpa": boolean_mask,
    "eager": additive_mask,
    "flex_attention": block_mask,
    VARLEN: sequence_mask,
}
"""The attention implementations there is a mask for, by the names they have in transformers."""


def attention_mask(
    implementation: str,
    documents_BS: Tensor,
    branches_BS: Tensor | None,
    queries: int,
    dtype: torch.dtype,
    counts: Counts = (),
) -> Mask:
    """The mask of the last `queries` tokens for an attention implementation. Raises ConfigError if unknown."""
    if implementation not in MASKS:
        raise unknown("attention implementation", implementation, MASKS, "attn_implementation")
    return MASKS[implementation](documents_BS, branches_BS, queries, dtype, counts)

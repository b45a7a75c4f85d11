"""Names for tables of numbers: which codebook codes belong to, and which encoder made them.

In: tensors. Out: sixteen hex digits of a SHA-256. The same numbers give the same name on every
machine: values are hashed as little-endian bytes, never as memory of an unknown order. A model and
its shards carry both names and must agree, because a code without its codebook means nothing.

Shape suffixes: K codebook rows, C channels.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def codebook_identity(codebook_KC: Tensor, depth: int, grid: int) -> str:
    """The name of a codebook as it is used: its rows as float32, codes per position, positions per side."""
    digest = hashlib.sha256(_little_endian(codebook_KC.to(torch.float32)))
    digest.update(f"|{tuple(codebook_KC.shape)}|depth {depth}|grid {grid}".encode())
    return digest.hexdigest()[:16]


def weights_identity(state: Mapping[str, Tensor]) -> str:
    """The name of a set of weights: names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"|{name} {tensor.dtype} {tuple(tensor.shape)}|".encode())
        digest.update(_little_endian(tensor))
    return digest.hexdigest()[:16]


def _little_endian(tensor: Tensor) -> bytes:
    """The bytes of a tensor in row-major order, little-endian; any dtype, bfloat16 included."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    words = plain.view(_WORDS[plain.element_size()]).numpy()
    return words.astype(words.dtype.newbyteorder("<"), copy=False).tobytes()

"""Random numbers that depend on the names of what they decide, and on nothing that was drawn before."""

import hashlib

import numpy as np


def keyed(*keys: object) -> np.random.Generator:
    """A random generator that depends on the keys alone."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniform(*keys: object) -> float:
    """One number in [0, 1) that depends on the keys alone."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64

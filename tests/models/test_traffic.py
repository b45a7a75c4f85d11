"""A microbatch in bfloat16 dispatches no more kernels, and moves no more bytes beside products, than it was made to."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from training_bytes import SIZES, microbatch

BEFORE = 1946, 2.43e9
"""With autocast over float32 weights and an RMSNorm in six kernels."""


@pytest.fixture(scope="module")
def counts():
    return {way: microbatch(SIZES["small"], 6, 4096, way) for way in ("autocast", "parameters")}


def test_a_microbatch_with_bfloat16_parameters_moves_half_of_what_autocast_did(counts):
    kernels, moved = counts["parameters"].kernels.total(), counts["parameters"].bytes.total()
    assert kernels <= 0.51 * BEFORE[0]
    assert moved <= 0.48 * BEFORE[1]
    assert counts["autocast"].bytes.total() > 1.5 * moved


def test_the_codebook_and_the_losses_alone_are_cast(counts):
    casts = {way: count.kernels["_to_copy"] for way, count in counts.items()}
    assert casts["parameters"] <= 11 < casts["autocast"]

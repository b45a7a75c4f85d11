"""Candidates in float16 give the codes of the plain product in float32, however near the rows are."""

import pytest
import torch

from unifork.image_tokenizer import model
from unifork.image_tokenizer.model import PRODUCTS, candidates_first, half_product, nearest_rows, plain_argmin

M, K, C = 1500, 300, 96


def rounded(unit_MC, codebook_KC):
    """What `half_product` is on a GPU: inputs rounded to float16, sums in float32."""
    scale = codebook_KC.abs().amax().clamp_min(model.TINY)
    return unit_MC.half().float() @ (codebook_KC / scale).half().float().t() * scale


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def middles(rows_KC, seed):
    """Vectors in the middle between two rows each, moved by about a last bit."""
    first, second = torch.randint(0, len(rows_KC), (2, M), generator=torch.Generator().manual_seed(seed))
    return (rows_KC[first] + rows_KC[second]) / 2 * (1 + 2**-23 * drawn(seed, M, 1))


def repeated():
    """Every row four times: of equal distances the first row is the code."""
    rows_KC = drawn(1, K // 4, C).repeat(4, 1)
    near_MC = rows_KC[torch.randint(0, K, (M,), generator=torch.Generator().manual_seed(2))] + 0.2 * drawn(3, M, C)
    return near_MC, rows_KC


def crowded():
    """All rows within a few last bits of each other, far from zero."""
    rows_KC = drawn(4, 1, C) * (1 + 2**-22 * drawn(5, K, C))
    return rows_KC[:1] + 1e-3 * drawn(6, M, C), rows_KC


def of_all_sizes():
    """Norms from 1e-6 to 1e6, in rows and vectors, and zeros of both."""
    sizes_K1, sizes_M1 = 10 ** (12 * torch.rand(K, 1) - 6), 10 ** (12 * torch.rand(M, 1) - 6)
    rows_KC, vectors_MC = sizes_K1 * drawn(7, K, C), sizes_M1 * drawn(8, M, C)
    rows_KC[5] = vectors_MC[7] = 0
    return vectors_MC, rows_KC


CASES = {
    "far apart": lambda: (drawn(9, M, C), drawn(10, K, C)),
    "middles": lambda: (middles(drawn(11, K, C), 12), drawn(11, K, C)),
    "repeated": repeated,
    "crowded": crowded,
    "of all sizes": of_all_sizes,
    "one row": lambda: (drawn(13, M, C), drawn(14, 1, C)),
    "whole numbers": lambda: (drawn(15, M, 4).round(), drawn(16, K, 4).round()),
}


@pytest.mark.parametrize("case", CASES)
def test_the_codes_are_those_of_float32(case):
    torch.manual_seed(0)
    vectors_MC, rows_KC = CASES[case]()
    square_K = rows_KC.square().sum(1)
    expected_M = plain_argmin(vectors_MC, rows_KC, square_K)
    assert (candidates_first(vectors_MC, rows_KC, square_K, rounded) == expected_M).all()


def test_float16_alone_takes_other_rows():
    """So the cases are near enough to need the bounds."""
    vectors_MC, rows_KC = CASES["middles"]()
    square_K = rows_KC.square().sum(1)
    plain_M = plain_argmin(vectors_MC, rows_KC, square_K)
    cheap_M = (square_K - 2 * (vectors_MC.half().float() @ rows_KC.half().float().t())).argmin(1)
    assert (cheap_M != plain_M).float().mean() > 0.05


def test_few_vectors_need_float32(monkeypatch):
    """Where rows are apart; otherwise nothing would be won."""
    rows_KC, again = drawn(17, K, C), []
    vectors_MC = rows_KC[torch.arange(M) % K] + 0.5 * drawn(18, M, C)
    monkeypatch.setitem(PRODUCTS, "cpu", rounded)

    def counted(part_MC, *rest):
        again.append(len(part_MC))
        return plain_argmin(part_MC, *rest)

    monkeypatch.setattr(model, "plain_argmin", counted)
    assert (nearest_rows(vectors_MC, rows_KC) == torch.arange(M) % K).all()
    assert again == []
    vectors_MC[3] = (rows_KC[0] + rows_KC[1]) / 2
    nearest_rows(vectors_MC, rows_KC)
    assert again == [model.BLOCK], "in a product of one shape"


def test_a_cpu_takes_the_plain_product(monkeypatch):
    monkeypatch.setattr(model, "candidates_first", None)
    assert nearest_rows(drawn(19, 5, C), drawn(20, K, C)).shape == (5,)
    assert PRODUCTS.keys() == {"cuda"}


def test_the_product_of_a_gpu_sums_in_float32():
    """Shapes and number type alone: a CPU has no such product."""
    product = half_product(torch.empty(3, C, device="meta"), torch.empty(K, C, device="meta"))
    assert (product.shape, product.dtype) == ((3, K), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", CASES)
def test_the_codes_are_those_of_float32_on_a_gpu(case):
    torch.manual_seed(0)
    vectors_MC, rows_KC = (tensor.cuda() for tensor in CASES[case]())
    blocks = torch.split(vectors_MC, model.BLOCK)
    square_K = rows_KC.square().sum(1)
    padded = [torch.nn.functional.pad(block, (0, 0, 0, model.BLOCK - len(block))) for block in blocks]
    expected_M = torch.cat([plain_argmin(block, rows_KC, square_K) for block in padded])[:M]
    assert (nearest_rows(vectors_MC, rows_KC) == expected_M).all()

"""Nearest rows of the codebook: the plain product in float32 against candidates in float16, and their codes.

    python benchmarks/quantizer.py [--device cuda] [--vectors 36864]

Vectors and rows are of width C; their clouds differ in how many directions they fill, which decides how many vectors
have more than one candidate and go through the plain product after all. A CPU has no product of `PRODUCTS`; there the
same in float16 shows why it takes the plain one.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from timing import alternate, interval, machine, ratio, table
from torch import Tensor

from unifork.image_tokenizer import model


def half_on_cpu(unit_MC: Tensor, codebook_KC: Tensor) -> Tensor:
    """`half_product` with a result in float16, which is what a CPU has."""
    scale = codebook_KC.abs().amax()
    return (unit_MC.half() @ (codebook_KC / scale).half().t()).float() * scale


def cloud(count: int, width: int, directions: int, device: str, seed: int) -> Tensor:
    """Vectors (count, width) that fill a number of directions, with a little noise in all of them."""
    random = torch.Generator().manual_seed(0)
    basis_DC = torch.randn(directions, width, generator=random)
    random.manual_seed(seed)
    inside_MC = torch.randn(count, directions, generator=random) @ basis_DC / directions**0.5
    return (inside_MC + 0.1 * torch.randn(count, width, generator=random)).to(device)


def codes(way: Callable[..., Tensor], vectors_MC: Tensor, rows_KC: Tensor) -> Tensor:
    """The nearest rows, part by part as in `nearest_rows`."""
    square_K = rows_KC.square().sum(1)
    return torch.cat([way(part_MC, rows_KC, square_K) for part_MC in torch.split(vectors_MC, model.ROWS_AT_ONCE)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--vectors", type=int, default=36_864, help="64 images of 576 positions")
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    given = parser.parse_args()
    product = model.PRODUCTS.get(given.device, half_on_cpu)
    lines = []
    for directions in (8, 64, given.width):
        vectors_MC = cloud(given.vectors, given.width, directions, given.device, 1)
        rows_KC = cloud(given.rows, given.width, directions, given.device, 2)
        ways = {
            "plain": partial(codes, model.plain_argmin, vectors_MC, rows_KC),
            "candidates": partial(codes, partial(model.candidates_first, product=product), vectors_MC, rows_KC),
        }
        seconds = alternate(ways, given.pairs, given.device)
        unlike = int((ways["plain"]() != ways["candidates"]()).sum())
        milliseconds = [interval([1000 * each for each in seconds[way]]) for way in ways]
        lines.append([directions, *milliseconds, ratio(seconds["plain"], seconds["candidates"]), unlike])
    print(f"{machine(given.device)}; {given.vectors:,} vectors, {given.rows:,} rows of width {given.width}\n")
    print(table(["directions", "plain ms", "candidates ms", "times faster", "codes unlike plain"], lines))


if __name__ == "__main__":
    main()

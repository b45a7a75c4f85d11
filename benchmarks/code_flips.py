"""Which share of codes changes with the shape of the batch and the dtype: the reason why both are fixed.

    python benchmarks/code_flips.py [--device cuda] [--tokenizer tokenizers/image] [--images folder/*.jpg]

Every way to encode is compared with float32 in batches of 8, for each depth. A code that differs changes what is
left over for the next depth, so the share grows with it. Without a tokenizer one of random weights is used, whose
codebook is made of its own features; without images those of the world `shapes`.
"""

import argparse
import copy
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from samples import jpegs, untrained
from timing import machine, table
from torch import Tensor

from unifork.image_tokenizer.model import ImageTokenizer, to_tensor
from unifork.images import crop_view

BATCHES = (1, 8, 32)
DTYPES = ("float32", "bfloat16", "float16")
REFERENCE = ("float32", 8)


def batches(pixels_PCSS: Tensor, count: int) -> Iterator[Tensor]:
    """Batches of `count` images, the last filled up with black."""
    for part_BCSS in pixels_PCSS.split(count):
        full_BCSS = torch.full((count, *part_BCSS.shape[1:]), -1.0)
        full_BCSS[: len(part_BCSS)] = part_BCSS
        yield full_BCSS


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokenizer", type=Path, help="directory; without it random weights")
    parser.add_argument("--size", type=int, default=96, help="side in pixels of the tokenizer of random weights")
    parser.add_argument("--images", type=Path, nargs="*", help="files; without them images of the world shapes")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = given.tokenizer or untrained(Path(folder), given.size)
        tokenizer = ImageTokenizer.load(directory, given.device)
    files = [path.read_bytes() for path in given.images] if given.images else jpegs(256)
    size, codebook_KC = tokenizer.architecture.image_size, tokenizer.quantizer.codebook
    views = [crop_view(Image.open(io.BytesIO(file)), size, None) for file in files]
    pixels_PCSS = to_tensor(np.stack(views))
    codes = {}
    for name in DTYPES:
        cast = copy.deepcopy(tokenizer).to(dtype=getattr(torch, name))
        cast.quantizer.codebook = codebook_KC  # stays float32, as in a tokenizer that is loaded so
        for count in BATCHES:
            parts = [cast.encode(batch_BCSS).cpu() for batch_BCSS in batches(pixels_PCSS, count)]
            codes[name, count] = torch.cat(parts)[: len(files)]
    reference_PND = codes[REFERENCE]
    lines = []
    for (name, count), codes_PND in codes.items():
        share_D = (codes_PND != reference_PND).double().mean((0, 1)).tolist()
        lines.append([name, count, *(f"{share:.4%}" for share in share_D)])
    print(f"{machine(given.device)}; {given.tokenizer or 'random weights'}, {size} px; {len(files)} images, "
          f"{reference_PND[..., 0].numel():,} positions, {len(codebook_KC)} rows of the codebook; "
          f"share of codes unlike {REFERENCE[0]} in batches of {REFERENCE[1]}\n")  # fmt: skip
    print(table(["dtype", "images in a batch", *(f"depth {d + 1}" for d in range(len(share_D)))], lines))


if __name__ == "__main__":
    main()

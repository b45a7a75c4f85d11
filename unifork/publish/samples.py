"""Images that a publication shows: codes go in, one strip of decoded images as PNG comes out.

Shape suffixes: B images, N positions, D code depth.
"""

import io
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from unifork.image_tokenizer.architecture import CONFIG_FILE
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.vocabulary import CODE_DTYPE

SHOWN, SIDE = 8, 128
"""Images of a strip, and the longest side of each in pixels."""


def strip(codes_BND: np.ndarray, tokenizer: Path) -> bytes:
    """Decoded images beside each other, as PNG. codes: (B, N, D) or (B, N * D) of the tokenizer."""
    images = CodeEncoder(tokenizer, "crop", None, batch_images=1).decode_codes(codes_BND)
    for image in images:
        image.thumbnail((SIDE, SIDE))
    whole = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        whole.paste(image, (number * image.width, 0))
    stream = io.BytesIO()
    whole.save(stream, "png", optimize=True)
    return stream.getvalue()


def first_codes(shard: Path) -> np.ndarray:
    """Codes (B, N * D) of the first images of a published shard; it may have none."""

    batches = pq.ParquetFile(shard).iter_batches(64, columns=["codes"])
    images = (image for batch in batches for row in batch["codes"].to_pylist() for image in row)
    return np.array([*islice(images, SHOWN)], CODE_DTYPE)


def codebook_of(tokenizer: Path) -> str | None:
    """The `codebook_id` of a tokenizer's directory, None where there is none."""
    path = tokenizer / CONFIG_FILE
    return str(json.loads(path.read_text())["codebook_id"]) if path.exists() else None

"""The image tokenizer as a report needs it: codes to pixels, and pixels through codes to pixels.

In: a tokenizer directory. Out: a `Codec`. The way to load one is handed to the report, so that a page can be built,
and tested, without a tokenizer.

Shape suffixes: B images, S side in pixels, C channels (RGB), N positions, D code depth.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from unifork.errors import DataError
from unifork.image_tokenizer.architecture import CONFIG_FILE
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.image_tokenizer.training import decode_all, encode_all
from unifork.shards.manifest import file_sha256


class Codec:
    """What turns codes into images: a trained image tokenizer; its canaries are checked when it is loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tokenizer = ImageTokenizer.load(directory)

    def decode(self, codes_BND: np.ndarray) -> np.ndarray:
        """Bytes (B, S, S, C). Raises DataError where the codes are of another shape or outside the codebook."""
        allowed = (self.tokenizer.architecture.grid**2, self.tokenizer.architecture.depth)
        if codes_BND.shape[1:] != allowed:
            raise DataError(f"{self.directory}: codes of shape {codes_BND.shape}; allowed are (images, {allowed})")
        return decode_all(self.tokenizer, codes_BND.astype(np.int64))

    def reconstruct(self, pixels_BSSC: np.ndarray) -> np.ndarray:
        """Bytes of the same shape, by way of codes."""
        return decode_all(self.tokenizer, encode_all(self.tokenizer, pixels_BSSC))


LoadCodec = Callable[[Path], Codec]


def load_codec(directory: Path) -> Codec:
    """The tokenizer of a directory; every model carries a copy of the same one, which is loaded once."""
    config = directory / CONFIG_FILE
    if not config.exists():
        raise DataError(f"{directory}: no {CONFIG_FILE}; the image tokenizer that travels with a model is not there")
    identity = file_sha256(config)
    if identity not in _loaded:
        _loaded[identity] = Codec(directory)
    return _loaded[identity]


_loaded: dict[str, Codec] = {}
"""By the hash of `config.json`, which names the weights."""

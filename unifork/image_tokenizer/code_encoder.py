"""Images to codes and back, as a plain class that holds the heavy state once per worker.

In: Pillow images, encoded bytes or files. Out: uint16 codes (n, N * D), position by position, and back to
images. Every call of the encoder sees a batch of the same shape, the last one filled up: in low
precision (and in rare last bits always) the codes of an image depend on the shape of its batch.
What else they depend on is in `encoding`, which goes into the manifest of every shard.

Shape suffixes: V views, B images of a batch, S side in pixels, C channels (RGB), N positions, D code depth.
"""

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from unifork.errors import DataError, Rejected, one_of
from unifork.image_tokenizer.model import ImageTokenizer, to_bytes
from unifork.images import RGB, VARIANTS, declared, decoding, open_image, to_rgb
from unifork.vocabulary import CODE_DTYPE

ImageInput = Image.Image | bytes | Path
"""An image, or an encoded one, or the file of one."""

BATCHES_AHEAD = 2
"""Batches of a view that are made while the network is busy; what bounds the memory of the threads."""


class CodeEncoder:
    """A loaded tokenizer with one view, one matte and one batch shape.

    directory: tokenizer directory; its canaries are re-encoded here. matte: color behind transparent
    pixels, None drops the alpha channel as the official code does. batch_images: images per call.
    threads: they decode images and make views while the network encodes earlier ones. Several threads may
    call one encoder; its network does one batch at a time.
    """

    def __init__(
        self,
        directory: Path | str,
        view: str,
        matte: RGB | None,
        batch_images: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        threads: int = 1,
    ) -> None:
        self.view = one_of("view", view, VARIANTS, "CodeEncoder")
        self.matte, self.batch_images = matte, batch_images
        self.tokenizer = ImageTokenizer.load(directory, device, dtype)
        self._pool, self._network = ThreadPoolExecutor(threads), Lock()

    def seeing(self, view: str) -> Self:
        """The same encoder with another view; network and threads are shared."""
        other = copy.copy(self)
        other.view = view
        return other

    @property
    def encoding(self) -> dict[str, Any]:
        """StrictModel data: everything beside the tokenizer's identities that a code depends on."""
        size = self.tokenizer.architecture.image_size
        here, flips = self.tokenizer.environment, self.tokenizer.canary_flips
        declares = declared(self.view, self.matte, self.batch_images, size, here["dtype"])
        return {**declares, **here, **({"canary_flips": flips} if flips else {})}

    def encode_images(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Codes (n, N * D), uint16, of images in order. Raises DataError naming an unreadable image or its file."""
        return self.encode_views(images, [self.view])[0]

    def encode_views(self, images: Sequence[ImageInput], views: Sequence[str]) -> list[np.ndarray]:
        """The same of each view; an image is decoded once for all."""
        architecture = self.tokenizer.architecture
        width = architecture.grid**2 * architecture.depth
        codes = [np.zeros((len(images), width), dtype=CODE_DTYPE) for _ in views]
        for number, batch_VBSSC in enumerate(self._batches(images, views)):
            rows = slice(number * self.batch_images, (number + 1) * self.batch_images)
            for codes_of_view, batch_BSSC in zip(codes, batch_VBSSC, strict=True):
                with self._network:
                    codes_BND = self.tokenizer.encode_bytes(batch_BSSC).numpy()
                codes_of_view[rows] = codes_BND[: len(images[rows])].reshape(-1, width)
        return codes

    def problem_of(self, image: ImageInput) -> str | None:
        """Why no view can be made of an image, None when it can."""
        try:
            self._look(image, 0, [self.view])
        except DataError as error:
            return str(error)
        return None

    def decode_codes(self, codes: np.ndarray) -> list[Image.Image]:
        """The images that codes (n, N * D) or (n, N, D) stand for. Raises DataError where they do not fit."""
        architecture = self.tokenizer.architecture
        positions, depth = architecture.grid**2, architecture.depth
        if codes.ndim not in (2, 3) or codes[0:1].size not in (0, positions * depth):
            raise DataError(
                f"codes of shape {codes.shape}: allowed are {positions} positions with {depth} codes per image"
            )
        codes_nND = codes.reshape(len(codes), positions, depth).astype(np.int64)
        decoded: list[Image.Image] = []
        for start in range(0, len(codes_nND), self.batch_images):
            part_BND = torch.from_numpy(codes_nND[start : start + self.batch_images])
            decoded += [Image.fromarray(pixels_SSC) for pixels_SSC in to_bytes(self.tokenizer.decode(part_BND))]
        return decoded

    def _batches(self, images: Sequence[ImageInput], views: Sequence[str]) -> Iterator[np.ndarray]:
        """Batches (V, B, S, S, C) of bytes in order, the last filled up with black; threads make a few ahead."""
        size, batch = self.tokenizer.architecture.image_size, self.batch_images
        most = max(1, BATCHES_AHEAD // len(views))
        ahead: deque[tuple[np.ndarray, list[Future[None]]]] = deque()
        try:
            for start in range(0, len(images) + most * batch, batch):
                batch_VBSSC = np.zeros((len(views), batch, size, size, 3), np.uint8)
                part = enumerate(images[start : start + batch])
                filling = [
                    self._pool.submit(self._fill, batch_VBSSC[:, row], image, start + row, views) for row, image in part
                ]
                ahead.append((batch_VBSSC, filling))
                if len(ahead) > most:
                    for filled in ahead[0][1]:
                        filled.result()
                    yield ahead.popleft()[0]
        finally:
            for _, filling in ahead:  # left over behind an image that cannot be read
                for future in filling:
                    future.cancel()

    def _fill(self, rows_VSSC: np.ndarray, source: ImageInput, index: int, views: Sequence[str]) -> None:
        rows_VSSC[:] = self._look(source, index, views)

    def _look(self, source: ImageInput, index: int, views: Sequence[str]) -> list[np.ndarray]:
        """Views of one image, which may be encoded bytes or a file."""
        size = self.tokenizer.architecture.image_size
        name = str(source) if isinstance(source, Path) else f"image {index}"
        try:
            data = source.read_bytes() if isinstance(source, Path) else source
            image = open_image(data) if isinstance(data, bytes) else data
            with decoding(image.width * image.height):
                opaque = to_rgb(image, self.matte)
                opaque.load()
                opaque.info.pop("transparency", None)  # of a chunk behind the pixels: a first view knows nothing of it
                return [VARIANTS[view](opaque, size, self.matte) for view in views]
        except Rejected as error:
            raise DataError(f"{name} cannot be read: {error}") from None
        except DataError as error:
            raise DataError(f"{name}: {error}") from None
        except Exception as error:  # any decoder may raise anything on hostile bytes
            raise DataError(f"{name} cannot be read: {type(error).__name__}: {error}") from None

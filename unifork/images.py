"""Images as strangers send them: opened by a list of formats, measured once, decoded within bounds.

In: the bytes of an image as received. Out: a Pillow image, or what it measures; or `ImageError` with a reason for
people to count by. Everything here that reads bytes of others goes by `open_image`, so that none of Pillow's forty
decoders runs that is not in FORMATS: one of them (EPS) starts a program.
"""

import io
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from unifork.errors import DataError

Image.init()
FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "AVIF") if name in Image.OPEN
)
"""Formats that are opened, as far as this Pillow has them."""
MAX_PIXELS = 64_000_000
"""Largest image that is decoded; the header is read first, so a bomb costs nothing."""
MAX_SCANS = 100
"""Most scans of a JPEG: a progressive one has about ten; each costs a pass over all pixels."""
MAX_ASPECT = 200
"""Largest ratio of the sides. A thinner image cannot be cropped: up to views of 640 pixels, resizing it stays below
Pillow's own limit (`image_tokenizer.views`)."""
PIXELS_AT_ONCE = MAX_PIXELS
"""Pixels that all threads of a process decode at the same time; a larger image waits until it is alone."""


_ADDRESS = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")


class ImageError(DataError):
    """Bytes that are no image to be used. `reason` names the class; the message is the detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Measured(NamedTuple):
    """What the bytes of an image say, all of them having been decoded."""

    width: int
    height: int
    scans: int
    """Passes over the pixels of a JPEG; 1 in every other format."""
    frames: int
    """More than one in an animation, of which only the first is ever used."""
    phash: int | None
    """Difference hash, 64 bits, by which near duplicates are found; None for an image without structure."""


def open_image(data: bytes) -> Image.Image:
    """The image in some bytes, its pixels not yet decoded.

    Raises ImageError: `empty`, `not_an_image`, `undecodable` for a header that no decoder takes.
    """
    if not data:
        raise ImageError("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise ImageError("not_an_image", f"no image of a known format: it begins with {data[:24]!r}") from None
    except Image.DecompressionBombError as error:
        raise ImageError("too_many_pixels", str(error)) from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise _undecodable(error) from None


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG, which loses nothing."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> Measured:
    """Decode an image whole and say what it measures.

    Raises ImageError: those of `open_image`, `too_many_pixels` and `too_many_scans` before anything is decoded,
    `too_thin` for what no view can be made of, `undecodable` with what the decoder said.
    """
    with open_image(data) as image:
        width, height = image.size
        scans = jpeg_scans(data) if image.format in ("JPEG", "MPO") else 1
        if width * height > max_pixels:
            raise ImageError("too_many_pixels", f"{width}x{height}, at most {max_pixels} are decoded")
        if scans > MAX_SCANS:
            raise ImageError("too_many_scans", f"{scans} scans, at most {MAX_SCANS} are decoded")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise ImageError("too_thin", f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
        try:
            with decoding(width * height):
                image.draft("L", (32, 32))  # a JPEG is decoded at an eighth of its sides: all bytes, few pixels
                phash = dhash(image)
            frames = getattr(image, "n_frames", 1)
        except Exception as error:
            raise _undecodable(error) from None
    return Measured(width, height, scans, frames, phash)


def _undecodable(error: Exception) -> ImageError:
    detail = _ADDRESS.sub("the bytes", str(error))  # which differs from run to run
    return ImageError("undecodable", f"{type(error).__name__}: {detail}"[:300])


def dhash(image: Image.Image) -> int | None:
    """64 bits, one for each step to the right in a 9x8 gray image that gets brighter; None for a flat image.

    The difference hash: it stays when an image is resized, recompressed or made darker as a whole.
    """
    gray = np.asarray(_opaque(image, (255, 255, 255)).convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)
    bits = np.packbits(gray[:, 1:] > gray[:, :-1])
    value = int.from_bytes(bits.tobytes(), "big")
    return value if 4 <= value.bit_count() <= 60 else None  # plain grounds all look alike


def _opaque(image: Image.Image, matte: tuple[int, int, int]) -> Image.Image:
    """An image in RGB, laid over a color where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", whole.size, (*matte, 255)), whole).convert("RGB")


def shrink(data: bytes, matte: tuple[int, int, int], *, longest_side: int, format: str, quality: int) -> bytes:
    """An image whose longest side is at most that, re-encoded where it was longer and else as it is.

    Nothing but colors is kept: views use no rotation and no color profile either (`image_tokenizer.views`).
    Raises ImageError, for a longer image also those of `measure`.
    """
    with open_image(data) as image:
        if max(image.size) <= longest_side:
            return data
        measure(data)
        try:
            with decoding(image.width * image.height):
                keeps_alpha = format != "jpeg" and image.has_transparency_data
                pixels = image.convert("RGBA") if keeps_alpha else _opaque(image, matte)
            scale, out = longest_side / max(image.size), io.BytesIO()
            width, height = (max(1, round(side * scale)) for side in image.size)
            resized = pixels.resize((width, height), Image.Resampling.BICUBIC)
            resized.info.clear()
            resized.save(out, format, quality=quality)
        except Exception as error:
            raise _undecodable(error) from None
    return out.getvalue()


def jpeg_scans(data: bytes) -> int:
    """The scans of a JPEG: `SOS` markers outside of its segments, such as the thumbnail in an APP1."""
    scans, place = 0, 2
    while (place := data.find(b"\xff", place)) >= 0 and place + 4 <= len(data):
        marker = data[place + 1]
        if marker == 0xDA:
            scans += 1
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD9:  # stuffing, fill, and markers without a segment
            place += 1 if marker == 0xFF else 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return scans


_pixels_left = PIXELS_AT_ONCE
_pixels_changed = threading.Condition()


@contextmanager
def decoding(pixels: int) -> Iterator[None]:
    """Hold a share of the pixels that this process may have in decoders at once; waits until there is one."""
    global _pixels_left  # noqa: PLW0603  one budget for all threads of the process
    share = min(pixels, PIXELS_AT_ONCE)
    with _pixels_changed:
        _pixels_changed.wait_for(lambda: _pixels_left >= share)
        _pixels_left -= share
    try:
        yield
    finally:
        with _pixels_changed:
            _pixels_left += share
            _pixels_changed.notify_all()

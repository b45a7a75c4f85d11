"""Images as strangers send them: opened by a list of formats, measured once, decoded within bounds, seen as squares.

In: the bytes of an image as received. Out: a Pillow image, or what it measures; or `Rejected` with a reason for
people to count by. Everything here that reads bytes of others goes by `open_image`, so that none of Pillow's forty
decoders runs that is not in FORMATS: one of them (EPS) starts a program.

A view is what a task sees of an image. In: a Pillow image in any mode, the side S in pixels, and a matte (the color put
behind transparent pixels; None drops the alpha channel as the official code does). Out: uint8 pixels of shape
(S, S, 3). Bytes equal the official preprocessing's (tliby/UniFork: Pillow's bicubic filter, sizes truncated after the
same order of float operations), because codes of any other bytes are other codes. For the same reason an EXIF rotation
is not applied: the official code converts to RGB and no more.

Shape suffixes: H height, W width, S side of the view, C channels (RGB).
"""

import io
import re
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile

from unifork.errors import DataError, Rejected
from unifork.vocabulary import View

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
Pillow's own limit."""
PIXELS_AT_ONCE = MAX_PIXELS
"""Pixels that all threads of a process decode at the same time; a larger image waits until it is alone."""
BANDS = {"L": 1, "RGB": 3, "RGBA": 4}
"""Modes of 8 bits a band, without a palette, and how many bands they have: none fails to become another."""

RGB = tuple[int, int, int]
MATTE = (255, 255, 255)
"""Behind transparent pixels of images that no card describes."""
Look = Callable[[Image.Image, int, RGB | None], np.ndarray]

PREPROCESSING_VERSION = "official-bicubic-1"
"""Change with any change of a view's bytes; it is recorded with every shard of codes."""

PAD_COLOR: RGB = (127, 127, 127)
"""The official background: int(0.5 * 255)."""

SMALLEST_SIDE = 14
"""The official `min_size`: a very thin image is widened to this many pixels."""

LARGEST_RESIZED_PIXELS = 89_478_485
"""Pillow's own limit for one image; a crop of a hair-thin image would be resized beyond it."""

SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd9\xff]")
"""The marker of a JPEG's segment: not stuffing, fill or a marker without a segment."""
_ADDRESS = re.compile(r"<_io\.BytesIO object at 0x[0-9a-f]+>")


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

    Raises Rejected: `empty`, `not_an_image`, `undecodable` for a header that no decoder takes.
    """
    if not data:
        raise Rejected("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise Rejected("not_an_image", f"no image of a known format: it begins with {data[:24]!r}") from None
    except Image.DecompressionBombError as error:
        raise Rejected("too_many_pixels", str(error)) from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise _undecodable(error) from None


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG, which loses nothing."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def measure(data: bytes, max_pixels: int = MAX_PIXELS) -> Measured:
    """Decode an image whole and say what it measures.

    Raises Rejected: those of `open_image`, `too_many_pixels` and `too_many_scans` before anything is decoded,
    `too_thin` for what no view can be made of, `undecodable` with what the decoder said.
    """
    with open_image(data) as image:
        if image.width * image.height > max_pixels:
            raise Rejected("too_many_pixels", f"{image.width}x{image.height}, at most {max_pixels} are decoded")
        return decoded(image, data, dhash)


def decoded(image: Image.Image, data: bytes, look: Callable[[Image.Image], int | None]) -> Measured:
    """What an image just opened measures; `look` decodes it and says the hash.

    Raises Rejected: `too_many_scans`, `too_thin`, `undecodable`.
    """
    width, height = image.size
    scans = jpeg_scans(data) if image.format in ("JPEG", "MPO") else 1
    if scans > MAX_SCANS:
        raise Rejected("too_many_scans", f"{scans} scans, at most {MAX_SCANS} are decoded")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Rejected("too_thin", f"{width}x{height}: one side is more than {MAX_ASPECT} times the other")
    try:
        with decoding(width * height):
            image.draft("L", (32, 32))  # a JPEG is decoded at an eighth of its sides: all bytes, few pixels
            phash = look(image)
        return Measured(width, height, scans, getattr(image, "n_frames", 1), phash)
    except Exception as error:
        raise _undecodable(error) from None


def decode(image: Image.Image, data: bytes) -> None:
    """Decode all bytes of an image just opened, for their faults alone. Raises what the decoder and `dhash` would.

    Of a PNG whose rows are found whole, for a third of the cost, no pixels are made.
    """
    if isinstance(image, PngImageFile) and _is_whole(image, data):
        return
    image.load()
    if image.mode not in BANDS or "transparency" in image.info:
        dhash(image)


def _is_whole(image: PngImageFile, data: bytes) -> bool:
    """Whether a PNG of 8 bits holds exactly its rows, inflated at once; False also where that takes a decoder."""
    start, mode = next(((tile.offset, tile.args) for tile in image.tile), (0, None))
    if mode not in BANDS or not image.info.keys().isdisjoint(("interlace", "transparency")):
        return False
    stride, place, parts = 1 + image.width * BANDS[mode], start - 8, []
    while data[place + 4 : place + 8] == b"IDAT":
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        parts.append(data[place + 8 : end])
        place = end + 4  # Pillow does not compare the sums of these chunks, but that of the rows
    size, inflate = image.height * stride, zlib.decompressobj()
    with suppress(zlib.error):  # a row begins with the number of its filter, 0 to 4
        rows = inflate.decompress(b"".join(parts), size + 1)
        exact = len(rows) == size and inflate.eof and not inflate.unused_data
        return exact and not rows[::stride].strip(bytes(range(5))) and data[place + 4 : place + 8] == b"IEND"
    return False


def _undecodable(error: Exception) -> Rejected:
    detail = _ADDRESS.sub("the bytes", str(error))  # which differs from run to run
    return Rejected("undecodable", f"{type(error).__name__}: {detail}"[:300])


def dhash(image: Image.Image) -> int | None:
    """64 bits, one for each step to the right in a 9x8 gray image that gets brighter; None for a flat image.

    The difference hash: it stays when an image is resized, recompressed or made darker as a whole.
    """
    gray = np.asarray(_opaque(image, (255, 255, 255)).convert("L").resize((9, 8), Image.Resampling.BILINEAR), np.int16)
    bits = np.packbits(gray[:, 1:] > gray[:, :-1])
    value = int.from_bytes(bits.tobytes(), "big")
    return value if 4 <= value.bit_count() <= 60 else None  # plain grounds all look alike


def _opaque(image: Image.Image, matte: RGB | None) -> Image.Image:
    """An image in RGB, laid over a color where it is transparent; None drops the alpha channel."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    whole = image.convert("RGBA")
    if matte is None:
        return whole.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", whole.size, (*matte, 255)), whole).convert("RGB")


def shrink(data: bytes, matte: RGB, *, longest_side: int, format: str, quality: int) -> bytes:
    """An image whose longest side is at most that, re-encoded where it was longer and else as it is.

    Nothing but colors is kept: views use no rotation and no color profile either.
    Raises Rejected, for a longer image also those of `measure`.
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
    while (found := SEGMENT.search(data, place)) and found.end() + 2 <= len(data):
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        scans += found[0] == b"\xff\xda"
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


# --------------------------------------------------------------------------------------- views


def to_rgb(image: Image.Image, matte: RGB | None) -> Image.Image:
    """Any Pillow image as RGB.

    Transparent pixels are laid over `matte`; None drops the alpha channel, which shows whatever
    color hides below it. An image without a transparent pixel comes out the same for any matte.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image  # whose pixels are perhaps not decoded yet
    try:
        return _opaque(image, matte)
    except (ValueError, OSError) as error:
        raise DataError(f"an image of mode {image.mode!r} and size {image.size} cannot become RGB: {error}") from None


def crop_view(image: Image.Image, size: int, matte: RGB | None) -> np.ndarray:
    """The shorter side resized to `size`, the center cut out: what generation learns to draw."""
    opaque = to_rgb(image, matte)
    scale = size / min(opaque.size)
    width, height = (max(int(side * scale), size) for side in opaque.size)
    resized = _resize(opaque, width, height)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def pad_view(image: Image.Image, size: int, matte: RGB | None) -> np.ndarray:
    """The longer side resized to `size`, the rest filled with gray: what understanding reads.

    This is the official training variant: resize, then pad.
    """
    opaque = to_rgb(image, matte)
    longer = max(opaque.size)
    width, height = (max(int(side / longer * size), SMALLEST_SIDE) for side in opaque.size)
    return np.asarray(_on_gray_square(_resize(opaque, width, height)))


def pad_first_view(image: Image.Image, size: int, matte: RGB | None) -> np.ndarray:
    """The official inference variant, which pads to a square first and resizes after; other bytes."""
    square = _on_gray_square(to_rgb(image, matte))
    return np.asarray(_resize(square, size, size))


VIEWS: dict[View, Look] = {"crop": crop_view, "pad": pad_view}
"""The views codes are made of; `unifork.vocabulary.VIEW_OF_TASK` says which task reads which."""

VARIANTS: dict[str, Look] = {"crop": crop_view, "pad": pad_view, "pad-first": pad_first_view}
"""All ways to see an image; what is not in VIEWS serves evaluation alone, no data set may ask for it."""


def declared(view: str, matte: RGB | None, batch_images: int, size: int, dtype: str) -> dict[str, Any]:
    """StrictModel data: all that decides the codes of an image beside the tokenizer and the machine."""
    return {
        "view": view,
        "matte": None if matte is None else list(matte),
        "preprocessing": PREPROCESSING_VERSION,
        "batch_shape": [batch_images, 3, size, size],
        "dtype": dtype,
    }


def _resize(image: Image.Image, width: int, height: int) -> Image.Image:
    if width * height > LARGEST_RESIZED_PIXELS:
        raise DataError(
            f"an image of size {image.size} would be resized to {width}x{height}; "
            f"allowed are {LARGEST_RESIZED_PIXELS} pixels: it is too thin to be cropped"
        )
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _on_gray_square(image: Image.Image) -> Image.Image:
    """An image in the middle of a gray square of its longer side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square

"""Whether bytes are a picture: header, size and a decode, in this order. The bytes themselves are kept as they are."""

import io
import warnings

from PIL import Image, UnidentifiedImageError

from unifork.sources.web.client import Refused

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF") if name in Image.OPEN)
"""Formats that are opened, as far as this Pillow has them; of its forty others one starts a program (EPS)."""


def inspect(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) of a picture that can be decoded.

    Raises Refused: `empty`, `not_an_image`, `too_many_pixels` (nothing was decoded), `undecodable`.
    """
    if not data:
        raise Refused("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise Refused("too_many_pixels", f"{width}x{height}, at most {max_pixels} are decoded")
                picture.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth of its sides: all bytes, few pixels
                picture.load()
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Refused("not_an_image", f"begins with {data[:24]!r}") from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise Refused("undecodable", f"{type(error).__name__}: {error}"[:300]) from None
    return width, height

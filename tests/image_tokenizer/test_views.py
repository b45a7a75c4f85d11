"""Views: byte-equal to the official preprocessing, transparent and odd images included."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifork import images
from unifork.errors import DataError
from unifork.image_tokenizer.model import to_bytes, to_tensor

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official_tiny"
SHA256 = json.loads((OFFICIAL / "04_preprocess.sha256.json").read_text())
VARIANTS = {"gen": images.crop_view, "und": images.pad_view, "und_infer_pad": images.pad_first_view}


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize("name", [name for name in SHA256 if name.endswith("uint8")])
def test_bytes_equal_the_official_ones(name):
    """Hashes of the official (3, 384, 384) bytes; sizes wide, tall and thin, modes RGB, P, L, RGBA."""
    image, variant, _ = name.split(".")
    pixels = VARIANTS[variant](Image.open(OFFICIAL / "images" / f"{image}.png"), 384, None)
    assert digest(pixels.transpose(2, 0, 1)) == SHA256[name]


def test_values_of_bytes_equal_the_official_ones():
    values = to_tensor(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1))
    assert digest(values.numpy().reshape(-1)) == SHA256["lut"]
    assert (to_bytes(values).reshape(-1) == np.arange(256)).all()


def wide() -> Image.Image:
    pixels = np.zeros((20, 60, 3), dtype=np.uint8)
    pixels[:, :20, 0] = 255
    pixels[:, 40:, 2] = 255
    return Image.fromarray(pixels)


def test_crop_cuts_and_pad_keeps():
    crop, pad = images.crop_view(wide(), 24, None), images.pad_view(wide(), 24, None)
    assert crop.shape == pad.shape == (24, 24, 3)
    assert not crop[12, 6:18].any(), "the middle third alone is in the crop"
    assert (pad[[0, -1]] == 127).all(), "gray above and below"
    assert pad[12, 1, 0] == 255
    assert pad[12, -2, 2] == 255


def test_very_thin_images():
    pad = images.pad_view(Image.new("RGB", (3, 3000), (9, 9, 9)), 48, None)
    assert (pad == 9).all(axis=2).any(axis=0).sum() == images.SMALLEST_SIDE
    with pytest.raises(DataError, match="too thin"):
        images.crop_view(Image.new("RGB", (1, 60_000), (9, 9, 9)), 384, None)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA", "LA", "1"])
def test_opaque_images_do_not_depend_on_the_matte(mode):
    image = wide().convert(mode)
    seen = [images.crop_view(image, 24, matte).tobytes() for matte in (None, (255, 255, 255), (0, 200, 0))]
    assert len(set(seen)) == 1


def half_transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (60, 20), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 60, 10))
    if mode != "P":
        return image.convert(mode)
    file = io.BytesIO()
    image.quantize().save(file, "PNG")
    return Image.open(file)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_matte(mode):
    matted = images.pad_view(half_transparent(mode), 60, (0, 255, 0))
    assert (matted[22] == (0, 255, 0)).all()
    assert (matted[37] < 40).all(), "the opaque half keeps its color"
    assert not (images.pad_view(half_transparent(mode), 60, None)[22] == (0, 255, 0)).all()


def stored(image: Image.Image, kind: str, **options) -> Image.Image:
    """An image as it comes from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(file)


def rotated() -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(wide(), "PNG", exif=exif)


def inked() -> Image.Image:
    """Cyan, magenta, yellow and black, and half of each: Pillow's conversion is 255 - ink, less the black."""
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    for channel in range(4):
        inks[4 * channel : 4 * channel + 4, :8, channel] = 255
        inks[4 * channel : 4 * channel + 4, 8:, channel] = 128
    return stored(Image.fromarray(inks, "CMYK"), "TIFF")


def see_through() -> Image.Image:
    """A palette with one transparent entry."""
    image = Image.new("P", (16, 16), 1)
    image.putpalette([9, 8, 7, 200, 100, 50])
    image.paste(0, (0, 0, 16, 8))
    return stored(image, "PNG", transparency=0)


GRAY = np.linspace(0, 255, 256, dtype=np.uint8).reshape(16, 16)
INKS = np.repeat(
    [[[0, 255, 255], [127, 255, 255]], [[255, 0, 255], [255, 127, 255]], [[255, 255, 0], [255, 255, 127]],
     [[0, 0, 0], [127, 127, 127]]], 4, axis=0,
).repeat(8, axis=1)  # fmt: skip
HALVES = np.repeat([[[9, 8, 7]], [[200, 100, 50]]], 8, axis=0).repeat(16, axis=1)
KINDS = {
    "gray": (lambda: Image.fromarray(GRAY), np.stack([GRAY] * 3, -1)),
    "palette": (see_through, HALVES),
    "CMYK": (inked, INKS),
    "alpha": (lambda: Image.fromarray(np.dstack([HALVES, GRAY]).astype(np.uint8)), HALVES),
    "EXIF": (lambda: rotated().crop((0, 0, 16, 16)), np.asarray(wide().crop((0, 0, 16, 16)))),
}
"""Images of 16 x 16 pixels, and the colors that all views must show: the official code's, alpha dropped."""


@pytest.mark.parametrize("variant", images.VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(kind, variant):
    make, expected = KINDS[kind]
    assert (images.VARIANTS[variant](make(), 16, None) == expected).all()


@pytest.mark.parametrize("variant", images.VARIANTS)
def test_exif_rotation_is_not_applied(variant):
    assert rotated().getexif()[0x0112] == 6
    assert (images.VARIANTS[variant](rotated(), 24, None) == images.VARIANTS[variant](wide(), 24, None)).all()

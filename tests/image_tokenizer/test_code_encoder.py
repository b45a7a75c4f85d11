"""Images to codes: fixed batches, both views, unreadable images, and that Ray is not needed."""

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from unifork.errors import ConfigError, DataError
from unifork.image_tokenizer import canaries
from unifork.image_tokenizer.code_encoder import BATCHES_AHEAD, CodeEncoder
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.images import VARIANTS, open_image, pad_view


def images(count=7):
    """Wide images, because square ones look the same in both views."""
    rng = np.random.default_rng(2)
    return [Image.fromarray(rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)) for _ in range(count)]


ARRANGEMENTS = {
    "alone": [[number] for number in range(7)],
    "backwards": [[6, 5, 4, 3, 2, 1, 0]],
    "other places": [[3, 0, 6], [5, 1, 4, 2]],
    "other neighbours": [[0, 6], [1, 5], [2, 4], [3]],
    "duplicates": [[0, 0, 1, 1, 2, 2], [3, 4, 5, 6, 3, 4, 5, 6]],
}


@pytest.mark.parametrize("view", ["crop", "pad"])
@pytest.mark.parametrize("threads", [1, 3])
def test_codes_do_not_depend_on_their_batch(directory, view, threads):
    """On a CPU, in float32. That the shape of the batch stays the same is part of `encoding`."""
    encoder = CodeEncoder(directory, view, None, batch_images=4, threads=threads)
    codes = encoder.encode_images(images())
    assert codes.shape == (7, 16 * 3)
    assert codes.dtype == np.dtype("<u2")
    assert len(np.unique(codes, axis=0)) == 7
    for name, calls in ARRANGEMENTS.items():
        for numbers in calls:
            again = encoder.encode_images([images()[number] for number in numbers])
            assert (again == codes[numbers]).all(), name
    assert encoder.encode_images([]).shape == (0, 48)


def test_two_shards_at_once_share_an_encoder(directory):
    crop = CodeEncoder(directory, "crop", None, batch_images=2, threads=2)
    pad = crop.seeing("pad")
    alone = crop.encode_images(images(20)), pad.encode_images(images(20))
    with ThreadPoolExecutor(2) as callers:
        together = list(callers.map(lambda encoder: encoder.encode_images(images(20)), [crop, pad]))
    assert all((a == b).all() for a, b in zip(alone, together, strict=True))
    assert (alone[0] != alone[1]).any()


def test_views_are_made_ahead_but_not_far(directory, monkeypatch):
    encoder = CodeEncoder(directory, "crop", None, batch_images=2, threads=2)
    views, ahead = [], []
    look, encode = CodeEncoder._look, ImageTokenizer.encode

    def slow(self, pixels):
        time.sleep(0.05)
        ahead.append(len(views) - 2 * len(ahead))
        return encode(self, pixels)

    monkeypatch.setattr(CodeEncoder, "_look", lambda self, *a: (views.append(0), look(self, *a))[1])
    monkeypatch.setattr(ImageTokenizer, "encode", slow)
    encoder.encode_images(images(20))
    assert len(ahead) == 10
    assert 2 < max(ahead) <= 2 * (1 + BATCHES_AHEAD)


def test_every_batch_has_the_same_shape(directory, monkeypatch):
    shapes = []
    encode = ImageTokenizer.encode
    monkeypatch.setattr(ImageTokenizer, "encode", lambda self, x: (shapes.append(tuple(x.shape)), encode(self, x))[1])
    encoder = CodeEncoder(directory, "pad", None, batch_images=4)
    shapes.clear()
    encoder.encode_images(images(6))
    assert shapes == [(4, 3, 32, 32)] * 2


def test_views_give_different_codes(directory):
    crop, pad = (CodeEncoder(directory, view, None, 4).encode_images(images()) for view in ("crop", "pad"))
    assert (crop != pad).mean() > 0.2


def encoded_as(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def late_transparency():
    """A PNG whose transparent color is named behind its pixels: only a decoder that has read these knows of it."""
    plain = Image.new("RGB", (40, 70), (200, 30, 30))
    plain.paste((9, 90, 200), (0, 0, 20, 30))
    data = encoded_as(plain, "PNG")
    chunk = b"tRNS" + struct.pack(">HHH", 200, 30, 30)
    return data[:-12] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[-12:]


def strange_images():
    wide = images(1)[0]
    faded = wide.copy()
    faded.putalpha(Image.linear_gradient("L").resize(wide.size))
    palette = wide.quantize(8)
    return {
        "jpeg": encoded_as(wide, "JPEG"), "cmyk": encoded_as(wide.convert("CMYK"), "JPEG"),
        "rgba": encoded_as(faded, "PNG"), "gray with alpha": encoded_as(faded.convert("LA"), "PNG"),
        "palette": encoded_as(palette, "PNG", transparency=3), "gif": encoded_as(palette, "GIF", transparency=2),
        "16 bits": encoded_as(wide.convert("L").convert("I;16"), "PNG"), "one color": encoded_as(wide, "PNG",
        transparency=(1, 2, 3)), "late": late_transparency(), "webp": encoded_as(faded, "WEBP"),
    }  # fmt: skip


@pytest.mark.parametrize("matte", [None, (255, 255, 255)])
def test_views_of_one_decode_are_those_of_a_decode_each(directory, matte):
    encoder = CodeEncoder(directory, "crop", matte, batch_images=4, threads=2)
    for name, data in strange_images().items():
        looks = encoder._look(data, 0, ["pad", "crop", "pad-first"])
        for view, look_SSC in zip(["pad", "crop", "pad-first"], looks, strict=True):
            assert np.array_equal(look_SSC, VARIANTS[view](open_image(data), 32, matte)), (name, view)
    files = list(strange_images().values())
    together = encoder.encode_views(files, ["crop", "pad"])
    assert all((codes == encoder.seeing(view).encode_images(files)).all()
               for codes, view in zip(together, ["crop", "pad"], strict=True))  # fmt: skip
    assert [len(codes) for codes in encoder.encode_views([], ["crop", "pad"])] == [0, 0]


def test_a_late_transparent_color_would_change_a_second_look():
    image = open_image(late_transparency())
    first, second = (pad_view(image, 32, (255, 255, 255)) for _ in range(2))
    assert (first != second).any()


def test_bytes_are_read_like_images(directory):
    file = io.BytesIO()
    images()[0].save(file, "PNG")
    encoder = CodeEncoder(directory, "pad", (255, 255, 255), 2)
    assert (encoder.encode_images([file.getvalue()]) == encoder.encode_images(images(1))).all()
    with pytest.raises(DataError, match="image 1 cannot be read"):
        encoder.encode_images([file.getvalue(), file.getvalue()[:300]])
    with pytest.raises(DataError, match="image 0 cannot be read"):
        encoder.encode_images([b"no image"])
    with pytest.raises(DataError, match="image 6 cannot be read"):
        encoder.encode_images([*images(6), b"no image", *images(), b"neither"])
    assert (encoder.encode_images(images()[:1]) == encoder.encode_images([file.getvalue()])).all()


def test_decoding(directory):
    encoder = CodeEncoder(directory, "crop", None, batch_images=4)
    codes = encoder.encode_images(images(5))
    decoded = encoder.decode_codes(codes)
    assert len(decoded) == 5
    assert decoded[0].size == (32, 32)
    assert decoded[0].mode == "RGB"
    assert encoder.decode_codes(codes.reshape(5, 16, 3))[4].tobytes() == decoded[4].tobytes()
    with pytest.raises(DataError, match="16 positions with 3 codes"):
        encoder.decode_codes(codes[:, :-1])


def test_encoding_says_what_codes_depend_on(directory):
    encoding = CodeEncoder(directory, "pad", (1, 2, 3), batch_images=4).encoding
    assert encoding["view"] == "pad"
    assert encoding["matte"] == [1, 2, 3]
    assert encoding["batch_shape"] == [4, 3, 32, 32]
    assert encoding["dtype"] == "float32"
    assert encoding["device_class"].startswith("cpu")
    assert encoding["libraries"].keys() == {"torch", "transformers", "pillow"}


def test_low_precision_keeps_the_codebook(directory, monkeypatch):
    """The table stays float32: a rounded one would have another identity and other distances."""
    monkeypatch.setattr(canaries, "LARGEST_FLIP_RATE", 1.0)  # random weights lose many codes
    encoder = CodeEncoder(directory, "crop", None, 4, dtype=torch.bfloat16)
    assert encoder.tokenizer.quantizer.codebook.dtype == torch.float32
    assert encoder.tokenizer.codebook_id == ImageTokenizer.load(directory).codebook_id
    assert encoder.encoding["dtype"] == "bfloat16"
    assert encoder.decode_codes(encoder.encode_images(images(3)))[0].size == (32, 32)


def test_wrong_arguments(directory):
    with pytest.raises(ConfigError, match=r"unknown view 'corp'.*'crop'"):
        CodeEncoder(directory, "corp", None, 4)

"""Images of strangers: what is opened, measured and refused, at what cost."""

import io
import os
import random
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifork import images
from unifork.errors import Rejected
from unifork.images import (
    FORMATS,
    MAX_ASPECT,
    VARIANTS,
    decode,
    decoded,
    decoding,
    dhash,
    jpeg_scans,
    measure,
    open_image,
)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "JPEG2000"])
def test_formats_people_send_are_measured(form):
    found = measure(encoded(noise(40, 30), form))
    assert (found.width, found.height, found.scans, found.frames) == (40, 30, 1, 1)


def test_what_moves_and_what_comes_in_scans_is_counted():
    frames = [noise(20, 20), Image.new("RGB", (20, 20))]
    assert measure(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])).frames == 2
    progressive = encoded(noise(40, 30), "JPEG", progressive=True)
    assert measure(progressive).scans == 10
    thumbnail = b"\xff\xe1" + struct.pack(">H", 2 + len(progressive)) + progressive
    assert jpeg_scans(progressive[:2] + thumbnail + progressive[2:]) == 10, "those of a thumbnail are none of the image"


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
PSD = b"8BPS\0\1" + bytes(20)
REFUSED = {
    "empty": b"",
    "not_an_image": b"<html>not found</html>",
    "too_many_pixels": encoded(Image.new("1", (9000, 9000)), "PNG"),
    "too_thin": encoded(noise(1, MAX_ASPECT + 1), "PNG"),
    "undecodable": encoded(noise(40, 30), "PNG")[:300],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_each_reason_has_its_word(reason):
    with pytest.raises(Rejected) as error:
        measure(REFUSED[reason])
    assert error.value.reason == reason
    assert "object at 0x" not in str(error.value)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def split(data: bytes) -> tuple[bytes, bytes]:
    """What of a PNG comes before its image data, and the data."""
    place, found = data.index(b"IDAT") - 4, b""
    start = place
    while data[place + 4 : place + 8] == b"IDAT":
        size = int.from_bytes(data[place : place + 4], "big")
        found += data[place + 8 : place + 8 + size]
        place += 12 + size
    return data[:start], found


END = chunk(b"IEND", b"")


def hostile_pngs(mode: str) -> Iterator[bytes]:
    """A whole PNG; its chunks as they should be and not; cut off and changed at every byte, sums right and wrong."""
    whole = encoded(noise(9, 7).convert(mode), "PNG")
    head, zipped = split(whole)
    rows = zlib.decompress(zipped)
    yield from (whole, whole + b"more")
    for other in (rows, rows + rows, rows[:-1], rows + b"\0", b"", *(bytes([n]) + rows[1:] for n in range(8))):
        yield head + chunk(b"IDAT", zlib.compress(other)) + END
    data = chunk(b"IDAT", zipped)
    for parts in ((), (data,), (data, data), *((data, chunk(kind, b"a\0\0b"), END) for kind in (b"tEXt", b"zTXt"))):
        yield head + b"".join(parts)
    for size in range(8):
        yield head + chunk(b"tRNS", bytes(size)) + data + END
    for cut in range(len(zipped)):
        yield head + chunk(b"IDAT", zipped[:cut]) + END
        yield head + chunk(b"IDAT", b"") + chunk(b"IDAT", zipped[:cut]) + chunk(b"IDAT", zipped[cut:]) + END
        yield head + chunk(b"IDAT", zipped[:cut]) + chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", zipped[cut:]) + END
        yield head + chunk(b"IDAT", zipped[:cut] + bytes([zipped[cut] ^ 1 << cut % 8]) + zipped[cut + 1 :]) + END
    for place in range(8, len(whole)):
        yield whole[:place]
        yield whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]


def verdict(data: bytes, look) -> tuple:
    try:
        with open_image(data) as image:
            return decoded(image, data, partial(look, data=data))[:2]
    except Rejected as error:
        return error.reason, str(error)


def look_at_all(image: Image.Image, data: bytes) -> None:
    dhash(image)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "I;16"])
def test_bytes_that_are_only_checked_get_the_same_verdict_as_those_that_are_looked_at(mode, monkeypatch):
    whole_ones = []
    real = images._is_whole
    monkeypatch.setattr(images, "_is_whole", lambda *args: whole_ones.append(real(*args)) or whole_ones[-1])
    for data in hostile_pngs(mode):
        assert verdict(data, decode) == verdict(data, look_at_all), data
    assert (sum(whole_ones) > 50) == (mode in images.BANDS)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("PNG", "JPEG2000")])
def test_other_formats_get_the_same_verdict_too(form):
    whole, inks = encoded(noise(40, 30), form), encoded(noise(40, 30).convert("CMYK"), "JPEG")
    for data in (whole, inks, *(whole[:size] for size in range(1, len(whole), 1 + len(whole) // 100))):
        assert verdict(data, decode) == verdict(data, look_at_all)


@pytest.mark.parametrize("data", [POSTSCRIPT, PSD], ids=["eps", "psd"])
def test_other_decoders_are_never_asked(data, tmp_path, monkeypatch):
    """The one for EPS would start a program."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(Rejected, match="no image of a known format"):
        open_image(data)
    assert not (tmp_path / "started").exists()


def test_scans_without_end_cost_nothing():
    progressive = encoded(noise(400, 400), "JPEG", progressive=True)
    first = progressive.index(b"\xff\xda")
    empty = progressive[first : first + 2 + int.from_bytes(progressive[first + 2 : first + 4], "big")]
    started = time.process_time()
    with pytest.raises(Rejected, match="6010 scans, at most 100"):
        measure(progressive[:first] + empty * 6000 + progressive[first:])
    assert time.process_time() - started < 1


@pytest.mark.parametrize("size", [48, 256, 384])
@pytest.mark.slow
def test_whatever_the_filter_keeps_can_be_encoded_at_every_size(size):
    random.seed(size)
    sides = [(1, 1), (1, MAX_ASPECT), (MAX_ASPECT, 1), (2, 2 * MAX_ASPECT), (3, 600), (7, 3)]
    sides += [(random.randint(1, 12), random.randint(1, 2400)) for _ in range(20)]
    kept = 0
    for width, height in sides:
        data = encoded(noise(width, height), "PNG")
        if max(width, height) > MAX_ASPECT * min(width, height):
            with pytest.raises(Rejected, match="one side is more than"):
                measure(data)
            continue
        assert measure(data)[:2] == (width, height)
        kept += 1
        for view in ("crop", "pad"):
            assert VARIANTS[view](open_image(data), size, (255, 255, 255)).shape == (size, size, 3)
    assert kept >= 6


def test_threads_share_a_budget_of_pixels(monkeypatch):
    monkeypatch.setattr(images, "_pixels_left", 100)
    monkeypatch.setattr(images, "PIXELS_AT_ONCE", 100)
    at_once, most, lock = 0, 0, threading.Lock()

    def decode():
        nonlocal at_once, most
        with decoding(40):
            with lock:
                at_once += 1
                most = max(most, at_once)
            time.sleep(0.02)
            with lock:
                at_once -= 1

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    with decoding(10**9):  # larger than the budget: waits until it is alone
        assert at_once == 0
    for thread in threads:
        thread.join()
    assert most == 2


def test_no_other_file_opens_images_by_itself():
    root = Path(images.__file__).parent
    calls = {path.name for path in root.rglob("*.py") if "Image.open(" in path.read_text()}
    assert calls == {"images.py"}

"""Images of strangers: what is opened, measured and refused, at what cost."""

import io
import os
import random
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unifork import images
from unifork.images import FORMATS, MAX_ASPECT, VARIANTS, ImageError, decoding, jpeg_scans, measure, open_image


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
    with pytest.raises(ImageError) as error:
        measure(REFUSED[reason])
    assert error.value.reason == reason
    assert "object at 0x" not in str(error.value)


@pytest.mark.parametrize("data", [POSTSCRIPT, PSD], ids=["eps", "psd"])
def test_other_decoders_are_never_asked(data, tmp_path, monkeypatch):
    """The one for EPS would start a program."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ImageError, match="no image of a known format"):
        open_image(data)
    assert not (tmp_path / "started").exists()


def test_scans_without_end_cost_nothing():
    progressive = encoded(noise(400, 400), "JPEG", progressive=True)
    first = progressive.index(b"\xff\xda")
    empty = progressive[first : first + 2 + int.from_bytes(progressive[first + 2 : first + 4], "big")]
    started = time.process_time()
    with pytest.raises(ImageError, match="6010 scans, at most 100"):
        measure(progressive[:first] + empty * 6000 + progressive[first:])
    assert time.process_time() - started < 1


@pytest.mark.parametrize("size", [48, 256, 384])
def test_whatever_the_filter_keeps_can_be_encoded_at_every_size(size):
    random.seed(size)
    sides = [(1, 1), (1, MAX_ASPECT), (MAX_ASPECT, 1), (2, 2 * MAX_ASPECT), (3, 600), (7, 3)]
    sides += [(random.randint(1, 12), random.randint(1, 2400)) for _ in range(20)]
    kept = 0
    for width, height in sides:
        data = encoded(noise(width, height), "PNG")
        if max(width, height) > MAX_ASPECT * min(width, height):
            with pytest.raises(ImageError, match="one side is more than"):
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

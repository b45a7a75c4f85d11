"""Whatever a source does its entries are counted; what its images cost, and shrinking them."""

import errno
import hashlib
import io
import os
import subprocess
import sys

import pytest
from archive_samples import (
    JPEG,
    PNG,
    card_of,
    download,
    filtered,
    pairs,
    put,
    tarred,
)
from PIL import Image
from tiny import REPOSITORY

from unifork.config.card import Shrink
from unifork.errors import ChangedFile, ConfigError, MachineError, Rejected
from unifork.images import crop_view, pad_view
from unifork.shards.task import Slice
from unifork.sources import Materialize, RowError, Source, SourceOptions, download_job, image_row, plan, rows_of
from unifork.sources import archives as archives_module
from unifork.sources.url_lists import FetchRules
from unifork.sources.web.download import inspect

# -------------------------------------------------------------------------------------- all kinds


def source_of_rows(make):
    return Source(SourceOptions, lambda options, shard_rows: iter([Slice(0, 6)]), make)


def named(key):
    return image_row(key, JPEG, caption="x")


def breaks(options, piece, seed):
    yield named("a")
    yield RowError("mine/000000003", "no_image", "x")
    raise KeyError("what nobody thought of")


def ends(options, piece, seed):
    yield from map(named, "ab")


def strange(options, piece, seed):
    yield from (named("a"), None, {"image": b""}, named(" "), named("\ud83d"), {**named("b"), "caption": 5})


def repeats(options, piece, seed):
    yield from map(named, ("a", "a", "/b", "b/../c", "d", "d"))


def refuses(options, piece, seed):
    raise ConfigError("no such thing")


def disk(options, piece, seed):
    yield named("a")
    raise OSError(errno.EIO, "Input/output error")


def changed(options, piece, seed):
    raise ChangedFile("another file")


SOURCES = {name: source_of_rows(globals()[name]) for name in (
    "breaks", "ends", "strange", "repeats", "refuses", "disk", "changed")}  # fmt: skip
BREAKS, ENDS, STRANGE, REPEATS, REFUSES, DISK, CHANGED = SOURCES.values()


@pytest.mark.parametrize(
    ("name", "kept", "rejects"),
    [
        ("BREAKS", ["a"], [("mine/000000003", "no_image"),
                           *((f"sample/00000000{n}", "broken_list") for n in (2, 3, 4, 5))]),
        ("ENDS", ["a", "b"], [(f"sample/00000000{n}", "broken_list") for n in (2, 3, 4, 5)]),
        ("STRANGE", ["a"], [("\\ud83d", "broken_name"), ("b", "unexpected"), ("sample/000000001", "unexpected"),
                            ("sample/000000002", "no_key"), ("sample/000000003", "no_key")]),
        ("REPEATS", ["a", "d"], [("/b", "path_outside"), ("a", "duplicate_key"), ("b/../c", "path_outside"),
                                 ("d", "duplicate_key")]),
    ],
)  # fmt: skip
def test_whatever_a_source_does_its_entries_are_counted(at, name, kept, rejects):
    result = download(card_of(f"{__name__}:{name}", {}, ["caption"]), at / "raw", shard_rows=6)
    assert (sorted(result.rows), result.rejects) == (kept, rejects)
    if name == "BREAKS":
        assert result.details["sample/000000005"] == "KeyError: 'what nobody thought of'"


@pytest.mark.parametrize(
    ("name", "error"), [("REFUSES", ConfigError), ("DISK", MachineError), ("CHANGED", ChangedFile)]
)
def test_what_no_input_is_to_blame_for_ends_the_work(at, name, error):
    card = card_of(f"{__name__}:{name}", {}, ["caption"])
    (task,) = plan(card, None, 6, 0)
    with pytest.raises(error):
        Materialize(card)(task)


def test_a_disk_that_fails_under_an_archive_drops_no_row(at, monkeypatch):
    put(at / "sets/s.tar", tarred([("a.jpg", JPEG), ("a.txt", b"x")]))
    (task,) = plan(pairs(), None, 5, 0)

    def failing(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(archives_module, "_read", failing)
    with pytest.raises(MachineError, match=r"Stale file handle: it cannot be read. Mend the disk"):
        list(rows_of(pairs(), task))


@pytest.mark.slow
def test_no_program_is_started_for_what_is_called_an_image(at):
    """Pillow runs Ghostscript for an EPS, whatever it is called."""
    put(at / "bin/gs", b"#!/bin/sh\ntouch %s\n" % os.fsencode(at / "started")).chmod(0o755)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    put(at / "sets/s.tar", tarred([("a.jpg", eps), ("a.txt", b"x"), ("b.jpg", JPEG), ("b.txt", b"x")]))
    code = "from archive_samples import *; import sys\nfrom pathlib import Path\n" \
           "from unifork.sources.url_lists import FetchRules\nfrom unifork.sources.web.download import inspect\n" \
           "from unifork.errors import Rejected\n" \
           "card = card_of('pairs', {'files': 'sets'}, ['caption'], shrink={'longest_side': 5})\n" \
           "download(card, Path('shrunk'))\n" \
           "card = card_of('pairs', {'files': 'sets'}, ['caption'])\ndownload(card, Path('raw'))\n" \
           "result = filtered(card, Path('raw'), Path('kept'))\nprint(result.manifest.dropped)\n" \
           f"try: inspect({eps!r}, FetchRules())\nexcept Rejected as error: print(error.reason)\n"  # fmt: skip
    environment = os.environ | {"PATH": f"{at / 'bin'}:{os.environ['PATH']}",
                                "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["{'not_an_image': 1}", "not_an_image"], done.stderr
    assert not (at / "started").exists()


# -------------------------------------------------------------------------- images, and shrinking them


def saved(image: Image.Image, kind: str, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def scanned(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved(Image.open(io.BytesIO(PNG["img0"])).convert("RGB"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_images_that_cost_much_or_cannot_be_viewed_are_kept_and_named_by_the_filter(at):
    """At download nothing is decoded of what lies here; of the web everything but what is too thin."""
    thin = saved(Image.new("L", (1, 3000)), "GIF")
    images = {"good": JPEG, "thin": thin, "scans": scanned(500), "few": scanned(5), "empty": b"", "page": b"<html>",
              "short": JPEG[: len(JPEG) // 2]}  # fmt: skip
    put(at / "sets/s.tar", tarred([(f"{name}{ending}", data) for name, image in images.items()
                                   for ending, data in ((".jpg", image), (".txt", b"x"))]))  # fmt: skip
    raw = download(pairs(), at / "raw", shard_rows=100)
    assert {key.removeprefix("s/"): row["image"] for key, row in raw.rows.items()} == images
    result = filtered(pairs(), at / "raw", at / "kept")
    reasons = {"s/thin": "too_thin", "s/scans": "too_many_scans", "s/empty": "empty", "s/page": "not_an_image",
               "s/short": "undecodable"}  # fmt: skip
    assert (dict(result.rejects), sorted(result.rows)) == (reasons, ["s/few", "s/good"])
    for key, reason in {**reasons, "s/thin": None, "s/good": None}.items():
        image = images[key.removeprefix("s/")]
        if reason is None:
            assert inspect(image, FetchRules(max_pixels=10**6))["image"] == image
        else:
            with pytest.raises(Rejected) as rejected:
                inspect(image, FetchRules(max_pixels=10**6))
            assert rejected.value.reason == reason


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_larger_images_are_shrunk_where_the_card_says_so(at, kind):
    colors = Image.linear_gradient("L").resize((200, 100))
    alpha = Image.merge("RGBA", (colors, colors, colors, Image.linear_gradient("L").resize((200, 100))))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    images = {
        "small": saved(colors.resize((64, 30)), "PNG"),
        "large": saved(colors.convert("RGB"), "JPEG", exif=rotated), "alpha": saved(alpha, "PNG"),
        "palette": saved(colors.convert("P"), "GIF"), "cmyk": saved(colors.convert("CMYK"), "JPEG"),
        "gray16": saved(colors.convert("I;16"), "PNG"), "tall": saved(colors.resize((30, 200)), "PNG"),
        "broken": saved(Image.effect_noise((200, 100), 64), "PNG")[:2000],
        "thin": saved(Image.new("L", (1, 3000)), "GIF"),
    }  # fmt: skip
    put(at / "sets/s.tar", tarred([(f"{name}{ending}", data) for name, image in images.items()
                                   for ending, data in ((".jpg", image), (".txt", b"x"))]))  # fmt: skip
    longest = 64
    card = card_of("pairs", {"files": "sets"}, ["caption"], matte=(10, 20, 30),
                   shrink={"longest_side": longest, "format": kind})  # fmt: skip
    result = download(card, at / "raw", shard_rows=100)
    reasons = {"s/broken": "undecodable", "s/thin": "too_thin"}
    assert dict(result.rejects) == reasons
    for key, row in result.rows.items():
        received = images[key.removeprefix("s/")]
        assert row["sha256"] == hashlib.sha256(received).hexdigest()
        image = Image.open(io.BytesIO(row["image"]))
        assert (row["width"], row["height"]) == image.size
        if max(Image.open(io.BytesIO(received)).size) <= longest:
            assert row["image"] == received
            continue
        assert (image.format, max(image.size)) == (kind.upper(), longest)
        assert not image.getexif()
        before = Image.open(io.BytesIO(received))
        assert abs(image.width / image.height - before.width / before.height) < 0.3
        for view in (crop_view, pad_view):
            difference = view(image, 16, card.matte).astype(int) - view(before, 16, card.matte)
            assert abs(difference).mean() < 8
    again = download(card, at / "again", shard_rows=100)
    assert [shard.sha256 for shard in again.manifest.shards] == [shard.sha256 for shard in result.manifest.shards]
    plain, other = (card.model_copy(update={"shrink": shrink}) for shrink in (None, Shrink(longest_side=longest)))
    inputs = {download(each, at / f"raw{number}", shard_rows=100).manifest.shards[0].inputs
              for number, each in enumerate((plain, other, card))}  # fmt: skip
    assert len(inputs) == (2 if kind == "jpeg" else 3)
    made_with = [download_job(each, None, 5, 0, at / "x").made_with for each in (plain, card)]
    assert ["shrink" in each for each in made_with] == [False, True]
    assert filtered(card, at / "raw", at / "kept").manifest.dropped.keys() == set()

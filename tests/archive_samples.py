"""Small archives in the layouts of their publishers, made of real images."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image
from tiny import filter_here, run_here

from unifork.config import Card
from unifork.shards.task import QUARANTINE
from unifork.sources import Materialize, RowError, download_job, plan, rows_of

IMAGES = Path(__file__).parent / "fixtures/official_tiny/images"
PNG = {path.stem: path.read_bytes() for path in sorted(IMAGES.glob("img*.png"))}


def jpeg(name: str, mode: str = "RGB") -> bytes:
    """One of the images as a JPEG of some mode."""
    out = io.BytesIO()
    Image.open(io.BytesIO(PNG[name])).convert("RGB").convert(mode).save(out, "JPEG")
    return out.getvalue()


def tarred(members: list[tuple[str, bytes]], mode: str = "w") -> bytes:
    """A tar of members in this order; a name may come twice."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def jsonl(entries: list) -> bytes:
    """Lines; bytes are written as they are."""
    return b"".join((entry if isinstance(entry, bytes) else json.dumps(entry).encode()) + b"\n" for entry in entries)


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data)


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def card_of(kind: str, options: dict, texts: list[str], **more) -> Card:
    plain = {
        "name": "sample", "title": "t", "homepage": "h", "license": "CC0-1.0", "attribution": "a",
        "redistribute_codes": False, "source": {"kind": kind, "options": options},
        "tasks": {"understanding" if "conversations" in texts else "generation":
                  {"view": "pad" if "conversations" in texts else "crop", "texts": texts}},
    }  # fmt: skip
    return Card.model_validate({**plain, **more})


class Made:
    """What a stage left: rows by key, rejects as key -> reason, its manifest."""

    def __init__(self, folder: Path, manifest) -> None:
        self.folder, self.manifest = folder, manifest
        tables = [pq.read_table(folder / shard.path).to_pylist() for shard in manifest.shards]
        listed = [row for table in tables for row in table]
        self.rows = {row["key"]: row for row in listed}
        assert len(self.rows) == len(listed), "a key occurs twice"
        rejected = [
            row
            for shard in manifest.shards
            if (folder / QUARANTINE / shard.path).exists()
            for row in pq.read_table(folder / QUARANTINE / shard.path).to_pylist()
        ]
        self.rejects = sorted((row["key"], row["reason"]) for row in rejected)
        self.details = {row["key"]: row["detail"] for row in rejected}
        if "takedown" not in manifest.dropped:  # these leave no trace
            assert sum(manifest.dropped.values()) == len(self.rejects)


def download(card: Card, folder: Path, rows: int | None = None, shard_rows: int = 2) -> Made:
    job = download_job(card, rows, shard_rows, 0, folder)
    (manifest,) = run_here([job], Materialize(card))
    return Made(folder, manifest)


def filtered(card: Card, raw: Path, folder: Path, duplicates=None) -> Made:
    return Made(folder, filter_here(card, raw, measured_beside(raw), folder, duplicates))


def measured_beside(raw: Path) -> Path:
    """Where the measured rows of some image-text shards go."""
    return raw.with_name(f"{raw.name}-measured")


def accounted(card: Card, shard_rows: int = 3) -> dict[str, str]:
    """Key -> `ok` or the reason of every entry of a source, all of which came out once and in number as planned."""
    found: list[tuple[str, str]] = []
    tasks = plan(card, None, shard_rows, 0)
    for task in tasks:
        rows = [(row.key, row.reason) if isinstance(row, RowError) else (row["key"], "ok")
                for row in rows_of(card, task)]  # fmt: skip
        assert len(rows) == task.rows, f"{task.piece}: {rows}"
        found += rows
    assert len({(key, reason) for key, reason in found}) == len(found) or any(r != "ok" for _, r in found)
    return dict(sorted(found, key=lambda row: row[1] != "ok"))


def links(members: list[tuple[str, bytes | tuple[bytes, str]]], mode: str = "w", **how) -> bytes:
    """A tar of files and of other members: (type, target of the link)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, **how) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                tar.addfile(info)
    return out.getvalue()


def sparse_tar(name: str, size: int) -> bytes:
    """An archive of 10,240 bytes with one member of any size: an old GNU sparse file, all of it a hole."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0" % size + b"%011o\0" % 0  # one piece at the end, of no bytes
    header[482:495] = b"\0" + b"%011o\0" % size
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(10_240 - len(header))


def zeros(path, begin: bytes, size: int, end: bytes = b"") -> None:
    """A compressed file of almost nothing but zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(end)


JPEG = jpeg("img0")


def pairs(**options) -> Card:
    """A card of images and texts of the same name below `sets`."""
    return card_of("pairs", {"files": "sets", **options}, ["caption"])

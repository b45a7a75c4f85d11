"""The prepared documents of one part of a mixture, as files that are mapped into memory.

In: documents in file order, one row group after another. Out: a folder of flat little-endian arrays
(`COLUMNS`), the rows that cannot be used (`quarantine.jsonl`) and, last, `index.json` with the size
and hash of every file. Only the words of a document are kept: where its image stands follows from
one number, and codes stay in their shards. Memory does not grow with the number of documents, since
the system loads and drops pages of the arrays as it needs to.

A folder's name holds the fingerprint of everything it was made from, so it is never stale. One that
is incomplete or damaged is made again; of several workers one makes it while the others wait.

Shape suffixes: R documents, G row groups, S text tokens of all documents.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from unifork.processes import exclusive
from unifork.shards.manifest import file_sha256, fsync_folder, fsync_tree, write_json

COLUMNS = {
    "text_ids_S": "<i4",
    "loss_mask_S": "|b1",
    "text_ends_R": "<i8",  # where a document's text tokens end; they begin where the last ones end
    "image_at_R": "<i4",  # text tokens before the image, or NO_IMAGE
    "supervised_count_R": "<i4",
    "where_R3": "<i4",  # shard, row group of the shard, row of the group
    "key_bytes": "|u1",
    "key_ends_R": "<i8",
    "group_sizes_G": "<i4",  # usable documents of each row group that has any
}
QUARANTINE = "quarantine.jsonl"
"""One JSON list `[key, reason]` a line."""
NO_IMAGE = -1
"""`image_at` of a document of text alone."""
META = "index.json"
FORMAT = 1
WAIT_SECONDS = 24 * 3600.0
"""How long a worker waits for another one that prepares the same documents."""


class TokenizedDocument(NamedTuple):
    """The text tokens of one document, and how many of them stand before its image."""

    key: str
    ids_T: np.ndarray
    loss_mask_T: np.ndarray
    image_at: int
    row: int
    """Row of its row group."""


class Writer:
    """Appends row groups to the files of an index; memory holds one row group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = self.text_end = self.key_end = 0
        self.quarantined: Counter[str] = Counter()
        self._files: dict[str, IO[bytes]] = {name: open(folder / name, "wb") for name in COLUMNS}  # noqa: SIM115
        self._quarantine = open(folder / QUARANTINE, "w")  # noqa: SIM115 - closed by finish

    def quarantine(self, key: str, reason: str) -> None:
        """Record a row that cannot be used."""
        self.quarantined[reason] += 1
        self._quarantine.write(json.dumps([key, reason], ensure_ascii=False) + "\n")

    def add(self, shard: int, group: int, documents: Sequence[TokenizedDocument]) -> None:
        """Append the usable documents of one row group."""
        if not documents:
            return
        keys = [document.key.encode() for document in documents]
        text_ends_R = self.text_end + np.cumsum([len(document.ids_T) for document in documents])
        key_ends_R = self.key_end + np.cumsum([len(key) for key in keys])
        self.append(
            text_ids_S=np.concatenate([document.ids_T for document in documents]),
            loss_mask_S=np.concatenate([document.loss_mask_T for document in documents]),
            text_ends_R=text_ends_R,
            image_at_R=np.array([document.image_at for document in documents]),
            supervised_count_R=np.array([document.loss_mask_T.sum() for document in documents]),
            where_R3=np.array([(shard, group, document.row) for document in documents]),
            key_bytes=np.frombuffer(b"".join(keys), np.uint8),
            key_ends_R=key_ends_R,
            group_sizes_G=np.array([len(documents)]),
        )

    def append(self, **columns: np.ndarray) -> None:
        """Append whole arrays, one of each of COLUMNS; ends are counted over the whole index."""
        for name, dtype in COLUMNS.items():
            self._files[name].write(np.ascontiguousarray(columns[name], dtype).tobytes())
        self.rows += len(columns["text_ends_R"])
        self.text_end, self.key_end = int(columns["text_ends_R"][-1]), int(columns["key_ends_R"][-1])

    def finish(self) -> None:
        """Close the files and write what says that they are whole."""
        self._quarantine.close()
        for file in self._files.values():
            file.close()
        fsync_tree(self.folder)
        files = {
            name: {"bytes": (self.folder / name).stat().st_size, "sha256": file_sha256(self.folder / name)}
            for name in [*COLUMNS, QUARANTINE]
        }
        plain = {"format": FORMAT, "rows": self.rows, "quarantined": dict(self.quarantined), "files": files}
        write_json(self.folder / META, plain)


class Index:
    """A finished index, read-only; arrays are named as in COLUMNS."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = json.loads((folder / META).read_text())
        self.rows: int = meta["rows"]
        self.quarantined: dict[str, int] = meta["quarantined"]
        (
            self.text_ids_S,
            self.loss_mask_S,
            self.text_ends_R,
            self.image_at_R,
            self.supervised_count_R,
            where,
            self.key_bytes,
            self.key_ends_R,
            self.group_sizes_G,
        ) = (_mapped(folder / name, dtype) for name, dtype in COLUMNS.items())
        self.where_R3 = where.reshape(-1, 3)

    def text(self, index: int) -> slice:
        """Where the text tokens of a document lie."""
        return slice(int(self.text_ends_R[index - 1]) if index else 0, int(self.text_ends_R[index]))

    def key(self, index: int) -> str:
        """Key of a document."""
        start = int(self.key_ends_R[index - 1]) if index else 0
        return self.key_bytes[start : int(self.key_ends_R[index])].tobytes().decode()


def _mapped(path: Path, dtype: str) -> np.ndarray:
    # a plain view: indexing np.memmap itself costs microseconds; a file without bytes cannot be mapped
    return np.asarray(np.memmap(path, dtype, "r")) if path.stat().st_size else np.zeros(0, dtype)


def prepared(folder: Path, prepare: Callable[[Writer], None]) -> Index:
    """The index in `folder`; made by `prepare` if there is none or it is damaged. Atomic.

    The rule for who makes it is the folder's lock, so it needs no process group and no barrier that
    could time out. Whatever `prepare` raises is raised, and nothing is kept then.
    """
    if not _whole(folder):
        with exclusive(folder, WAIT_SECONDS):
            if not _whole(folder):  # another worker may have made it meanwhile
                _make(folder, prepare)
    return Index(folder)


def _make(folder: Path, prepare: Callable[[Writer], None]) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        writer = Writer(temporary)
        prepare(writer)
        writer.finish()
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / META).read_text())
        return meta["format"] == FORMAT and all(
            (folder / name).stat().st_size == file["bytes"] and file_sha256(folder / name) == file["sha256"]
            for name, file in meta["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False

"""Where published files lie: a folder, an object store or the Hugging Face Hub, all by way of fsspec.

A store is compared file by file: by size, then by the hash it keeps itself (S3's ETag, the Hub's),
and where it keeps none that says enough, by reading the file again.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi

from unifork import stores
from unifork.errors import ConfigError, DataError
from unifork.shards.manifest import file_sha256, write_atomically
from unifork.stores import Store

CHECKSUMS = "SHA256SUMS"
"""Written last and removed before anything changes: its existence means that all is there."""

TOKENIZER, SAMPLES = "tokenizers/image", "samples.png"
"""The image tokenizer beside codes, and images that were decoded."""

OURS = re.compile(
    r"\w+/train-\d{5}-of-\d{5}\.parquet|samples\.png|model[\w.-]*\.(safetensors|json)|"
    r"(tokenizers/image|image_tokenizer|text_tokenizer|training|histories)/[^/]+"
)
"""What may be removed from a store when it is not published any more; other files are left alone."""

KINDS = {"dataset": "datasets/", "model": ""}
"""Repositories of the Hub: what stands in front of their names there."""

FILES_PER_LINE = 50
"""How many files are uploaded between two lines of progress; the Hub's library shows its own."""


@dataclass(frozen=True)
class HubStore(Store):
    """A repository of the Hugging Face Hub: the library decides how many files are one commit."""

    kind: str = "dataset"

    @property
    def repository(self) -> dict[str, Any]:
        """Whose name is `user/name`, as the library asks for it."""
        return {"repo_id": self.root.removeprefix(KINDS[self.kind]), "repo_type": self.kind}

    def listing(self) -> dict[str, dict[str, Any]]:
        """As of any store; the first publication makes the repository."""
        with self._answering():
            there = HfApi().repo_exists(**self.repository)
        return super().listing() if there else {}

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Upload files; what an interrupted call has uploaded is not uploaded again."""
        with self._answering():
            HfApi().create_repo(**self.repository, exist_ok=True)
            HfApi().upload_folder(**self.repository, folder_path=folder, allow_patterns=list(names))

    def remove(self, names: Sequence[str]) -> None:
        """Delete files in one commit."""
        what = f"Remove {len(names)} files"
        with self._answering():
            HfApi().delete_files(**self.repository, delete_patterns=list(names), commit_message=what)


def open_store(uri: str, kind: str = "dataset") -> Store:
    """The store at a folder, `hf://user/name`, `s3://bucket/path` or any other address fsspec knows.

    kind: of a repository of the Hub, a key of `KINDS`; an address with `datasets/` or `models/` says it itself.
    Credentials come from the environment. Raises ConfigError for an address nobody knows.
    """
    if not uri.startswith("hf://"):
        return stores.open_store(uri)
    found = re.fullmatch(r"hf://(?:(dataset|model)s/)?([\w.\-]+/[\w.\-]+)/?", uri)
    if not found:
        raise ConfigError(f"{uri}: a repository of the Hub is written hf://user/name")
    kind = found[1] or kind
    store = stores.open_store(f"hf://{KINDS[kind]}{found[2]}")
    return HubStore(uri, store.system, store.root, kind)


def published_at(uri: str) -> Store:
    """The store of a publication; of the Hub's repositories of one name that of a data set, if something is there."""
    store = open_store(uri)
    is_empty = isinstance(store, HubStore) and store.get(CHECKSUMS) is None
    return open_store(uri, "model") if is_empty else store


def holds(store: Store, info: Mapping[str, Any] | None, name: str, path: Path, sha256: str) -> bool:
    """Whether a file of a store's listing has the bytes of a local one, whose hash is known."""
    if info is None or info["size"] != path.stat().st_size:
        return False
    if info.get("lfs"):  # the Hub keeps a SHA-256 of large files
        return bool(info["lfs"].sha256 == sha256)
    # S3's ETag is the MD5 of what was put in one piece; in parts or encrypted it is something else
    if etag := info.get("ETag"):
        with open(path, "rb") as handle:
            if etag.strip('"') == hashlib.file_digest(handle, "md5").hexdigest():
                return True
    return store.sha256(name) == sha256


def read(store: Store, name: str, sha256: str) -> bytes:
    """The bytes of a published file. Raises DataError when they do not have the hash."""
    data = store.get(name)
    found = None if data is None else hashlib.sha256(data).hexdigest()
    if data is None or found != sha256:
        raise DataError(f"{store.uri}: {_fault(name, found, sha256)}; publish the set again")
    return data


def reread(store: Store) -> list[str]:
    """Read every published file again; what is wrong, one line per file."""
    there, sums = store.listing(), checksums(store)
    found = {name: store.sha256(name) if name in there else None for name in sums}
    return [_fault(name, found[name], sums[name]) for name in sums if found[name] != sums[name]]


def _fault(name: str, found: str | None, sha256: str) -> str:
    """What is wrong with a file that has another hash than it should, or is missing (None)."""
    return f"{name}: sha256 {found[:12]}... instead of {sha256[:12]}..." if found else f"{name}: missing"


def checksums(store: Store) -> dict[str, str]:
    """SHA-256 by file name, as the store says. Raises DataError when the publication is not complete."""
    text = store.get(CHECKSUMS)
    if text is None:
        raise DataError(f"{store.uri}: no {CHECKSUMS}; nothing was published here, or not to its end. Publish (again)")
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in text.decode().splitlines())}
    for name in sums:
        if not (parts := PurePosixPath(name).parts) or name[0] == "/" or ".." in parts:
            raise DataError(f"{store.uri}: {CHECKSUMS} names {name!r}; a path inside the publication is expected")
    return sums


def checksums_text(sums: Mapping[str, str]) -> str:
    """As `sha256sum` writes them, and checks with -c."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def bring(store: Store, sums: Mapping[str, str], folder: Path, prefix: str = "") -> None:
    """Copy the files below a prefix of a store into a folder, each checked; those that are there and right are kept.

    Raises DataError for one that is missing or has another hash.
    """
    for name, digest in sums.items():
        path = folder / name.removeprefix(prefix)
        if not name.startswith(prefix) or (path.is_file() and file_sha256(path) == digest):
            continue

        def write(temporary: Path, name: str = name, digest: str = digest) -> None:
            store.copy(name, temporary)
            if (found := file_sha256(temporary)) != digest:
                raise DataError(f"{store.uri}: {_fault(name, found, digest)}; publish it again")

        write_atomically(path, write)


def hashes(folder: Path, patterns: Sequence[str] = ("*",)) -> dict[str, str]:
    """SHA-256 of the files of a folder that match patterns, by their names inside."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in sorted(found) if path.name[0] != "."}


@dataclass(frozen=True)
class Synced:
    """What an upload did."""

    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    kept: int


def sync(folder: Path, store: Store) -> Synced:
    """Upload what is missing from a store or differs, remove published shards that are no longer, checksums last.

    folder: a publication that was just built; its files are what its checksums say.
    """
    sums = checksums(open_store(str(folder)))
    sums[CHECKSUMS] = file_sha256(folder / CHECKSUMS)
    there = store.listing()
    missing = [name for name, digest in sums.items() if not holds(store, there.get(name), name, folder / name, digest)]
    stale = sorted(name for name in there if OURS.fullmatch(name) and name not in sums)
    if missing or stale:
        if CHECKSUMS in there:
            store.remove([CHECKSUMS])
        changed = [name for name in missing if name != CHECKSUMS]
        step = max(1, len(changed)) if isinstance(store, HubStore) else FILES_PER_LINE
        for start in range(0, len(changed), step):
            store.put(folder, changed[start : start + step])
            print(f"{store.uri}: {min(start + step, len(changed))}/{len(changed)} files", flush=True)
        if stale:
            store.remove(stale)
        store.put(folder, [CHECKSUMS])
    return Synced(tuple(missing), tuple(stale), len(sums) - len(missing))

"""Where published files lie: a folder, an object store or the Hugging Face Hub, all by way of fsspec.

A store is compared file by file: by size, then by the hash it keeps itself (S3's ETag, the Hub's),
and where it keeps none that says enough, by reading the file again.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from unifork.errors import ConfigError, DataError
from unifork.shards import stores
from unifork.shards.manifest import file_sha256
from unifork.shards.stores import Store

CHECKSUMS = "SHA256SUMS"
"""Written last and removed before anything changes: its existence means that all is there."""

SHARD_NAME = re.compile(r"\w+/train-\d{5}-of-\d{5}\.parquet")
"""What may be removed from a store when it is not published any more; other files are left alone."""

FILES_PER_BATCH = 50
"""The Hub advises at most 100 files per commit."""


@dataclass(frozen=True)
class HubStore(Store):
    """A data set repository of the Hugging Face Hub: one commit for many files."""

    @property
    def repository(self) -> str:
        """`user/name`."""
        return self.root.removeprefix("datasets/")

    def listing(self) -> dict[str, dict[str, Any]]:
        """As of any store; the first publication makes the repository."""
        try:
            return super().listing()
        except DataError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return {}
            raise

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files in one commit."""
        with self._answering():
            HfApi().create_repo(self.repository, repo_type="dataset", exist_ok=True)
        self._commit([CommitOperationAdd(name, str(path)) for name, path in files.items()], f"Add {len(files)} files")

    def remove(self, names: Sequence[str]) -> None:
        """Delete files in one commit."""
        self._commit([CommitOperationDelete(name) for name in names], f"Remove {len(names)} files")

    def _commit(self, operations: list[Any], message: str) -> None:
        with self._answering():
            HfApi().create_commit(self.repository, operations, commit_message=message, repo_type="dataset")


def open_store(uri: str) -> Store:
    """The store at a folder, `hf://user/name`, `s3://bucket/path` or any other address fsspec knows.

    Credentials come from the environment. Raises ConfigError for an address nobody knows.
    """
    if not uri.startswith("hf://"):
        return stores.open_store(uri)
    name = uri.removeprefix("hf://").removeprefix("datasets/").strip("/")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        raise ConfigError(f"{uri}: a data set of the Hub is written hf://user/name")
    store = stores.open_store(f"hf://datasets/{name}")
    return HubStore(uri, store.system, store.root)


def holds(store: Store, info: Mapping[str, Any] | None, name: str, path: Path) -> bool:
    """Whether a file of a store's listing has the bytes of a local one."""
    if info is None or info["size"] != path.stat().st_size:
        return False
    if info.get("lfs"):  # the Hub keeps a SHA-256 of large files
        return bool(info["lfs"].sha256 == file_sha256(path))
    # S3's ETag is the MD5 of what was put in one piece; in parts or encrypted it is something else
    if etag := info.get("ETag"):
        with open(path, "rb") as handle:
            if etag.strip('"') == hashlib.file_digest(handle, "md5").hexdigest():
                return True
    return store.sha256(name) == file_sha256(path)


def read(store: Store, name: str, sha256: str) -> bytes:
    """The bytes of a published file. Raises DataError when they do not have the hash."""
    data = store.get(name)
    found = "missing" if data is None else f"sha256 {hashlib.sha256(data).hexdigest()[:12]}..."
    if data is None or hashlib.sha256(data).hexdigest() != sha256:
        raise DataError(f"{store.uri}: {name}: {found} instead of {sha256[:12]}...; publish the set again")
    return data


def checksums(store: Store) -> dict[str, str]:
    """SHA-256 by file name, as the store says. Raises DataError when the publication is not complete."""
    text = store.get(CHECKSUMS)
    if text is None:
        raise DataError(f"{store.uri}: no {CHECKSUMS}; nothing was published here, or not to its end. Publish (again)")
    return parse_checksums(text.decode())


def checksums_text(sums: Mapping[str, str]) -> str:
    """As `sha256sum` writes them, and checks with -c."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def parse_checksums(text: str) -> dict[str, str]:
    """SHA-256 by file name."""
    pairs = (line.split("  ", 1) for line in text.splitlines())
    return {name: digest for digest, name in pairs}


@dataclass(frozen=True)
class Synced:
    """What an upload did."""

    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    kept: int


def sync(folder: Path, store: Store, progress: Callable[[int, int], None]) -> Synced:
    """Upload what is missing from a store or differs, remove published shards that are no longer, checksums last."""
    names = [*parse_checksums((folder / CHECKSUMS).read_text()), CHECKSUMS]
    there = store.listing()
    missing = [name for name in names if not holds(store, there.get(name), name, folder / name)]
    stale = sorted(name for name in there if SHARD_NAME.fullmatch(name) and name not in names)
    if missing or stale:
        if CHECKSUMS in there:
            store.remove([CHECKSUMS])
        shards = [name for name in missing if name != CHECKSUMS]
        for start in range(0, len(shards), FILES_PER_BATCH):
            batch = shards[start : start + FILES_PER_BATCH]
            store.put({name: folder / name for name in batch})
            progress(start + len(batch), len(shards))
        if stale:
            store.remove(stale)
        store.put({CHECKSUMS: folder / CHECKSUMS})
    return Synced(tuple(missing), tuple(stale), len(names) - len(missing))


def reread(store: Store) -> list[str]:
    """Read every published file again; what is wrong, one line per file."""
    there = store.listing()
    faults = []
    for name, digest in checksums(store).items():
        if name not in there:
            faults.append(f"{name}: missing")
        elif (found := store.sha256(name)) != digest:
            faults.append(f"{name}: sha256 {found[:12]}... instead of {digest[:12]}...")
    return faults

"""Where published files lie: a folder, an object store or the Hugging Face Hub, all by way of fsspec.

A store is compared file by file: by size, then by the hash it keeps itself (S3's ETag, the Hub's),
and where it keeps none that says enough, by reading the file again.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from unifork.errors import ConfigError, DataError
from unifork.manifest import file_sha256

CHECKSUMS = "SHA256SUMS"
"""Written last and removed before anything changes: its existence means that all is there."""

SHARD_NAME = re.compile(r"\w+/train-\d{5}-of-\d{5}\.parquet")
"""What may be removed from a store when it is not published any more; other files are left alone."""

FILES_PER_BATCH = 50
"""The Hub advises at most 100 files per commit."""

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Store:
    """A folder of some file system."""

    uri: str
    system: Any
    """fsspec file system."""
    root: str

    @property
    def local(self) -> Path | None:
        """The folder on this machine, None when it is elsewhere."""
        return Path(self.root) if isinstance(self.system, LocalFileSystem) else None

    def listing(self) -> dict[str, dict[str, Any]]:
        """What is known of each file, by its name relative to the store."""
        with self._answering():
            self.system.invalidate_cache()
            try:
                found = self.system.find(self.root, detail=True)
            except FileNotFoundError:
                return {}
        return {path.removeprefix(self.root).lstrip("/"): info for path, info in found.items()}

    def holds(self, info: Mapping[str, Any] | None, name: str, path: Path) -> bool:
        """Whether a file of the listing has the bytes of a local one."""
        if info is None or info["size"] != path.stat().st_size:
            return False
        if info.get("lfs"):  # the Hub keeps a SHA-256 of large files
            return bool(info["lfs"].sha256 == file_sha256(path))
        # S3's ETag is the MD5 of what was put in one piece; in parts or encrypted it is something else
        if etag := info.get("ETag"):
            with open(path, "rb") as handle:
                if etag.strip('"') == hashlib.file_digest(handle, "md5").hexdigest():
                    return True
        return self.sha256(name) == file_sha256(path)

    def put(self, files: Mapping[str, Path]) -> None:
        """Upload files, by name."""
        with self._answering():
            for name, path in files.items():
                self.system.put_file(str(path), self._path(name))

    def remove(self, names: Sequence[str]) -> None:
        """Delete files."""
        with self._answering():
            for name in names:
                self.system.rm_file(self._path(name))

    def sha256(self, name: str) -> str:
        """Hash of a file's bytes, read from the store."""
        digest = hashlib.sha256()
        with self._answering(), self.system.open(self._path(name), "rb") as handle:
            while block := handle.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """The bytes of a file. Raises DataError when they do not have the hash."""
        with self._answering():
            data: bytes = self.system.cat_file(self._path(name))
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise DataError(
                f"{self.uri}: {name}: sha256 {found[:12]}... instead of {sha256[:12]}...; publish the set again"
            )
        return data

    def checksums(self) -> dict[str, str]:
        """SHA-256 by file name, as the store says. Raises DataError when the publication is not complete."""
        if CHECKSUMS not in self.listing():
            raise DataError(
                f"{self.uri}: no {CHECKSUMS}; nothing was published here, or not to its end. Publish (again)"
            )
        return parse_checksums(self.read(CHECKSUMS).decode())

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # every kind of store raises errors of its own
            raise DataError(
                f"{self.uri}: {type(error).__name__}: {error}. Run the command again: what is there stays"
            ) from error


@dataclass(frozen=True)
class HubStore(Store):
    """A data set repository of the Hugging Face Hub: one commit for many files."""

    @property
    def repository(self) -> str:
        """`user/name`."""
        return self.root.removeprefix("datasets/")

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
    address, kind = uri, Store
    if uri.startswith("hf://"):
        name = uri.removeprefix("hf://").removeprefix("datasets/").strip("/")
        if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
            raise ConfigError(f"{uri}: a data set of the Hub is written hf://user/name")
        address, kind = f"hf://datasets/{name}", HubStore
    try:
        system, root = fsspec.core.url_to_fs(address)
    except ImportError as error:
        raise ConfigError(f"{uri}: {error}; for s3:// that is pip install 'unifork[s3]'") from None
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}. Allowed: a folder, hf://user/name, s3://bucket/path, ...") from None
    return kind(uri, system, str(root).rstrip("/"))


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
    missing = [name for name in names if not store.holds(there.get(name), name, folder / name)]
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
    for name, digest in store.checksums().items():
        if name not in there:
            faults.append(f"{name}: missing")
        elif (found := store.sha256(name)) != digest:
            faults.append(f"{name}: sha256 {found[:12]}... instead of {digest[:12]}...")
    return faults

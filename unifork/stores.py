"""Files in a folder of an object store, or of any other file system that fsspec knows.

In: an address such as `s3://bucket/path`. Out: what lies there, by names relative to it. Credentials come from
the environment; an address that holds some is refused, since addresses stand in manifests and logs.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from unifork.errors import ConfigError, DataError

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
        """What is known of each file, by its name relative to the store. Raises DataError where there is no bucket."""
        with self._answering():
            self.system.invalidate_cache()
            found = self.system.find(self.root, detail=True)
        return {path.removeprefix(self.root).lstrip("/"): info for path, info in found.items()}

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by its name relative to the store."""
        return {name: int(info["size"]) for name, info in self.listing().items()}

    def put(self, folder: Path, names: Sequence[str]) -> None:
        """Upload files of a folder, under their names there."""
        with self._answering():
            for name in names:
                self.system.put_file(str(folder / name), self._path(name))

    def remove(self, names: Sequence[str]) -> None:
        """Delete files."""
        if names:
            with self._answering():
                self.system.rm([self._path(name) for name in names])

    def sha256(self, name: str) -> str:
        """Hash of a file's bytes, read from the store."""
        digest = hashlib.sha256()
        with self._answering(), self.system.open(self._path(name), "rb") as handle:
            while block := handle.read(READ_BYTES):
                digest.update(block)
        return digest.hexdigest()

    def size(self, name: str) -> int | None:
        """Bytes of a file as the store says now, None where there is no such file."""
        with self._answering():
            self.system.invalidate_cache()
            try:
                return int(self.system.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def get(self, name: str) -> bytes | None:
        """The bytes of a file, None where there is no such file."""
        with self._answering():
            try:
                return bytes(self.system.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def copy(self, name: str, path: Path) -> None:
        """Write a file of any size to a path here."""
        with self._answering():
            self.system.get_file(self._path(name), str(path))

    def get_all(self, names: Sequence[str]) -> list[bytes]:
        """The bytes of small files, many at a time; those that are gone by now are left out."""
        with self._answering():
            found = self.system.cat([self._path(name) for name in names], on_error="omit") if names else {}
        return list(found.values())

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


def open_store(uri: str) -> Store:
    """The store at a folder, `s3://bucket/path` or any other address fsspec knows.

    Raises ConfigError for an address that nobody knows or that holds credentials.
    """
    scheme, mark, rest = uri.partition("://")
    if mark and ("@" in rest or "?" in rest):
        raise ConfigError(f"{scheme}://...: an address with '@' or '?'; credentials belong into the environment")
    try:
        system, root = fsspec.core.url_to_fs(uri)
    except ImportError as error:
        raise ConfigError(f"{uri}: {error}; for s3:// that is pip install 'unifork[s3]'") from None
    except ValueError as error:
        raise ConfigError(f"{uri}: {error}. Allowed: a folder, hf://user/name, s3://bucket/path, ...") from None
    return Store(uri, system, str(root).rstrip("/"))


def deliver(path: Path, store: str | None) -> None:
    """Move a finished file into a store, under its own name; None leaves it where it is.

    An object appears whole or not at all, so nothing needs a temporary name there.
    """
    if store is not None:
        open_store(store).put(path.parent, [path.name])
        path.unlink()

"""Files that exist only when they are whole, and the manifest that says which ones there are.

A shard appears by write-temp, fsync, rename; the manifest is written last, so its existence means
that the stage is done. It lists shards with rows and hash, drops by reason, schema and lineage, and
nothing that changes from run to run. Consumers read the manifest and check every shard they open.
A shard lies beside its manifest, or in a store (`uri`) as one object, which appears whole by itself. Until there is a
manifest, records say which shards an earlier run finished.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any
from uuid import uuid4

from pydantic import AfterValidator, Field

from unifork.config import StrictModel, parse
from unifork.errors import FULL, ConfigError, DataError, writing
from unifork.layout import command_for
from unifork.stores import Store, open_store

MANIFEST = "manifest.json"
RECORD_SUFFIX = ".done"
"""After the name of a shard: its entry of the manifest, for as long as there is no manifest."""
RECORDS = "records.json"
"""The entries of a manifest that was taken away because some of its shards have to be made again."""
TEMPORARY = ".tmp-"
"""In the name of a file that is being written."""
FETCHED = "fetched"
"""Folder below `data` with copies of shards that lie in a store. May be deleted at any time."""


def _bare(name: str) -> str:
    """A file name without a folder: what a manifest names lies beside it, whoever wrote the manifest."""
    if name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError("a bare file name is expected, without a folder")
    return name


class Shard(StrictModel):
    """One finished shard of a stage."""

    path: Annotated[str, AfterValidator(_bare)]
    """File name inside the folder of the manifest."""
    rows: int
    bytes: int
    sha256: str
    inputs: str
    """Fingerprint of everything the shard was made from; a re-run keeps a shard only if it agrees."""
    dropped: dict[str, int] = {}
    """Rows of the input that are not in the shard, by reason."""
    uri: str | None = Field(default=None, exclude_if=lambda uri: uri is None)
    """Address of a shard that lies in a store; no part of any fingerprint, since data may move."""

    def identity(self) -> dict[str, Any]:
        """What a shard made from this one depends on: its name, rows, bytes and hash."""
        return self.model_dump(mode="json", include={"path", "rows", "bytes", "sha256"})

    @property
    def store(self) -> Store | None:
        """The folder of a store that holds the shard, None where it lies beside the manifest."""
        return None if self.uri is None else open_store(self.uri.removesuffix("/" + self.path))


class Manifest(StrictModel):
    """What a stage left behind."""

    format: int = 1
    kind: str
    """`image-text` or `codes`."""
    dataset: str
    columns: dict[str, str]
    """Column names and Arrow types."""
    shards: tuple[Shard, ...]
    lineage: dict[str, Any] = {}
    """Identities and fingerprints of what the shards were made with."""

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def dropped(self) -> dict[str, int]:
        """Rows dropped by the stage, by reason, most frequent first."""
        total: Counter[str] = Counter()
        for shard in self.shards:
            total.update(shard.dropped)
        return dict(total.most_common())

    def summary(self, folder: Path) -> str:
        """One line for people: what a job kept and what it dropped."""
        drops = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return f"{folder}: kept {self.rows} rows, dropped {drops or 'none'}"

    @property
    def stores(self) -> list[Store]:
        """The folders of stores in which shards lie."""
        found = [store for shard in self.shards if (store := shard.store)]
        return list({store.uri: store for store in found}.values())

    def content(self) -> dict[str, Any]:
        """What was made, as plain data: all but where the shards lie."""
        return self.model_dump(mode="json", exclude={"shards": {"__all__": {"uri"}}})


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` on a temporary path beside `path`, flush it to disk and rename it into place.

    Raises DataError where the disk is full, read-only or forbidden; nothing half-written is left then.
    """
    temporary = path.with_name(f".{path.name}{TEMPORARY}{uuid4().hex[:8]}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            with open(temporary, "rb+") as handle:
                os.fsync(handle.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` when all of it is written. Raises as `writing` does."""
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            partial.mkdir(parents=True)
        with writing(folder, FULL):
            yield partial
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fsync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut; flushes a file as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, and the folders themselves, to disk."""
    for path in [*folder.rglob("*"), folder]:
        fsync_folder(path)


def write_json(path: Path, plain: Any) -> None:
    """StrictModel data as sorted, indented JSON, atomically; equal data gives equal bytes."""
    text = json_text(plain)
    write_atomically(path, lambda temporary: temporary.write_text(text))


def json_text(plain: Any) -> str:
    """StrictModel data as sorted, indented JSON."""
    return json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Remove every file the manifest does not name, then write it; the shards' records stay until it is there.

    Writes nothing where all is there: a finished folder may lie on a disk that takes nothing.
    """
    here, text = [shard.path for shard in manifest.shards if shard.uri is None], json_text(manifest.model_dump())
    path = folder / MANIFEST
    keep_only(folder, [*here, *(shard.path + RECORD_SUFFIX for shard in manifest.shards), RECORDS, MANIFEST])
    if not path.exists() or path.read_text() != text:
        write_atomically(path, lambda temporary: temporary.write_text(text))
    keep_only(folder, [*here, MANIFEST])


def keep_only(folder: Path, names: Iterable[str]) -> None:
    """Delete the files of `folder` that are not named."""
    wanted = set(names)
    with writing(folder):
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.name not in wanted:
                path.unlink()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished stage. Raises DataError when the stage has not finished."""
    path = folder / MANIFEST
    if not path.exists():
        raise DataError(f"{folder}: no {MANIFEST}; the stage that writes this folder has not finished. Run it first.")
    try:
        plain = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged: {error}. Delete it and run the stage again.") from None
    return parse(Manifest, plain, str(path))


def manifest_sha256(folder: Path) -> str:
    """Hash of a finished stage's manifest, which names the hash of every shard, wherever it lies. Raises DataError."""
    return hashlib.sha256(json_text(read_manifest(folder).content()).encode()).hexdigest()


def wrong_sizes(folder: Path, shards: Iterable[Shard]) -> dict[str, str]:
    """What is wrong with shards by their sizes alone, by name; their folder and stores are listed once each."""
    found: dict[str | None, dict[str, int]] = {None: sizes(folder)}
    wrong: dict[str, str] = {}
    for shard in shards:
        store = shard.store
        place = store.uri if store else None
        if store and place not in found:
            found[place] = store.sizes()
        if problem := _differs(shard, found[place].get(shard.path)):
            wrong[shard.path] = problem
    return wrong


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file of a folder, by name."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}


def present(folder: Path) -> Manifest:
    """The manifest of a finished stage whose shards are all there with the sizes that it names; for who reads them.

    Raises DataError, which says what brings them back, before anything is read or started.
    """
    manifest = read_manifest(folder)
    if wrong := wrong_sizes(folder, manifest.shards):
        name, problem = next(iter(wrong.items()))
        raise DataError(
            f"{folder}: {len(wrong)} of {len(manifest.shards)} shards are not as its manifest says, first {name}: "
            f"{problem}. {way_out(folder)}"
        )
    return manifest


def elsewhere(folder: Path) -> bool:
    """Whether a finished stage has a manifest here and none of its shards, as where a clone pulled manifests alone."""
    if not (folder / MANIFEST).exists():
        return True
    shards = read_manifest(folder).shards
    return list(wrong_sizes(folder, shards).values()) == ["missing"] * len(shards)


def way_out(folder: Path) -> str:
    """What makes the damaged shards of a folder, and only those, again."""
    return f"`unifork verify --repair {folder}` takes them away, then {command_for(folder)} makes them again"


def fault(folder: Path, shard: Shard) -> str | None:
    """What is wrong with a shard where it lies, in words; None when it is as the manifest says. Reads all of it."""
    path, store = folder / shard.path, shard.store
    if store is not None:
        return _differs(shard, store.size(shard.path), lambda: store.sha256(shard.path))
    return _differs(shard, path.stat().st_size if path.exists() else None, lambda: file_sha256(path))


def checked(folder: Path, shard: Shard) -> Path | BytesIO:
    """A shard to read from, after checking size and hash: its path, or its bytes where it lies in a store.

    Raises DataError saying what differs.
    """
    store = shard.store
    data = store.get(shard.path) if store else None
    if store is None:
        problem = fault(folder, shard)
    else:
        size = None if data is None else len(data)
        problem = _differs(shard, size, lambda: hashlib.sha256(data or b"").hexdigest())
    if problem:
        raise DataError(f"{shard.uri or folder / shard.path}: {problem}. {way_out(folder)}")
    return folder / shard.path if data is None else BytesIO(data)


def local_path(folder: Path, shard: Shard, copies: Path) -> Path:
    """Where a shard is read piece by piece: one of a store in `copies`, named by its hash."""
    return folder / shard.path if shard.uri is None else copies / f"{shard.sha256}.parquet"


def make_local(folder: Path, shard: Shard, copies: Path) -> Path:
    """`local_path` after checking size and hash there, and copying from the store what is not. Raises DataError."""
    path = local_path(folder, shard, copies)
    if shard.uri is None or fault(copies, shard.model_copy(update={"path": path.name, "uri": None})):
        source = checked(folder, shard)
        if isinstance(source, BytesIO):
            write_atomically(path, lambda temporary: temporary.write_bytes(source.getvalue()))
    return path


def _differs(shard: Shard, size: int | None, sha256: Callable[[], str] | None = None) -> str | None:
    if size is None:
        return "missing"
    if size != shard.bytes:
        return f"{size} bytes instead of {shard.bytes}"
    found = sha256() if sha256 else shard.sha256
    return None if found == shard.sha256 else f"sha256 {found[:12]}... instead of {shard.sha256[:12]}..."


# ------------------------------------------------------------------------- what earlier runs finished


class Records(StrictModel):
    """What RECORDS holds."""

    shards: tuple[Shard, ...]


RECORDED: dict[str, type[StrictModel]] = {MANIFEST: Manifest, RECORDS: Records, "*" + RECORD_SUFFIX: Shard}
"""Files of a folder that name finished shards, each more recent than those before."""


def recorded_shards(folder: Path, stores: Iterable[Store] = ()) -> dict[str, Shard]:
    """Shards recorded by an earlier run, finished or killed, here or in stores, by file name."""
    return read_records(folder, stores)[0]


def read_records(folder: Path, stores: Iterable[Store] = ()) -> tuple[dict[str, Shard], dict[str, str]]:
    """The same, and what is wrong with files that should name them: what these say is not known to be finished."""
    shards: dict[str, Shard] = {}
    damaged: dict[str, str] = {}
    files = [(path, path.read_bytes()) for name in RECORDED for path in folder.glob(name)]
    for store in stores:
        names = [name for name in store.listing() if name.endswith(RECORD_SUFFIX)]
        files += [(folder / RECORD_SUFFIX, data) for data in store.get_all(names)]
    for path, data in files:
        kind = RECORDED.get(path.name, Shard)
        try:
            found: Any = parse(kind, json.loads(data), str(path))
            shards |= {shard.path: shard for shard in ([found] if kind is Shard else found.shards)}
        except (ConfigError, ValueError) as error:
            damaged[path.name] = str(error)
    return shards, damaged


def revert_to_records(folder: Path, shards: Iterable[Shard]) -> None:
    """Make a folder one of a killed job that had finished these shards and no others: records instead of a manifest.

    No record of another shard stays: its size alone would not tell a shard that is made anew from the old one.
    """
    records = Records(shards=tuple(shards))
    if records.shards:
        write_json(folder / RECORDS, records.model_dump(mode="json"))
    with writing(folder):
        for name in (MANIFEST, *(() if records.shards else (RECORDS,))):
            (folder / name).unlink(missing_ok=True)
        for record in folder.glob("*" + RECORD_SUFFIX):
            record.unlink(missing_ok=True)


def delete_record(folder: Path, store: Store, name: str) -> None:
    """Remove the records of a shard before its object is replaced: size alone would not tell it from the old one."""
    with writing(folder):
        (folder / (name + RECORD_SUFFIX)).unlink(missing_ok=True)
    if store.size(name + RECORD_SUFFIX) is not None:
        store.remove([name + RECORD_SUFFIX])

"""jsonl files and JSON arrays, entry by entry: what is damaged costs the entries that it holds, and each is counted.

Memory holds one entry of bounded size. A slice begins at a byte, so that reading it does not begin at the top.
"""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from unifork.errors import Rejected, rejected
from unifork.shards.task import Slice
from unifork.sources import MAX_LINE_BYTES, Row, planned
from unifork.sources.archives import open_tar, until_damage
from unifork.sources.files import as_planned, bounded_lines, check_ending, opened_list, size_of, too_long

LISTS = (".jsonl", ".jsonl.gz", ".jsonl.tgz", ".jsonl.tar.gz", ".json")

Entry = tuple[bytes | None, int]
"""An entry, None for one that is too long to be read, and its size."""


def list_slices(path: Path, shard_rows: int, most: int | None = None, **where: Any) -> Iterator[Slice]:
    """Slices of one list, each with the byte it starts at, so that reading it does not begin at the top."""
    check_ending(path.name, LISTS)
    start = offset = begin = stop = 0
    for stop, size in enumerate(islice(sizes_of(path), most), 1):
        offset += size
        if stop - start == shard_rows:
            yield Slice(start, stop, offset=begin, bytes=size_of(path), **where)
            start, begin = stop, offset
    if start < stop:
        yield Slice(start, stop, offset=begin, bytes=size_of(path), **where)


def sizes_of(path: Path) -> Iterator[int]:
    """Bytes of every entry of a list; damage is one more."""

    def sizes() -> Iterator[int]:
        with entries_of(path) as entries:
            yield from (size for _, size in entries)

    return planned(sizes(), 0)


def objects(path: Path, piece: Slice) -> Iterator[Row | Rejected]:
    """The entries of one slice of a list. Raises what damage raises."""
    with entries_of(as_planned(path, piece), piece.offset or 0) as entries:
        for _ in range(piece.start, piece.stop):
            yield _parsed(*next(entries))


def _parsed(entry: bytes | None, size: int) -> Row | Rejected:
    if entry is None:
        return too_long(size)
    try:
        text = entry.decode("utf-8-sig")
        row = json.loads(text)
    except UnicodeError as error:
        return rejected(error)
    except (ValueError, RecursionError) as error:
        return Rejected("broken_line", f"{error}: {text[:200]!r}")
    return row if isinstance(row, dict) else Rejected("broken_line", f"an object is expected, this is {row!r:.200}")


@contextmanager
def entries_of(path: Path, offset: int = 0) -> Iterator[Iterator[Entry]]:
    """The lines of a list, or the elements of an array, from the one on that begins at a byte.

    Both raise what damage raises, such as an archive that does not hold exactly one file.
    """
    with ExitStack() as stack:
        if path.name.lower().endswith((".tgz", ".tar.gz")):
            with open_tar(path) as tar:  # once more below: a stream that broke off cannot be read again
                listed = [member for member in until_damage(tar) if member.isfile()]
            members = [member for member in listed if not Path(member.name).name.startswith(".")]
            if len(members) != 1:
                raise ValueError(f"{path.name}: {len(members)} files in it, one jsonl file is expected")
            file: Any = stack.enter_context(open_tar(path)).extractfile(members[0])
        else:
            file = stack.enter_context(opened_list(path, "rb"))
        file.seek(offset)
        if path.suffix.lower() == ".json":
            yield _elements(file, offset)
        else:
            yield ((line if size == len(line) else None, size) for line, size in bounded_lines(file, b"\n"))


ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[")
TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
"""A string, the beginning of one that goes on in the next block, or what opens, closes and separates elements."""
REST = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
"""The end of a string that began in an earlier block."""


def _blocks(file: Any) -> Iterator[bytes]:
    """A file in pieces, none of which ends within an escape."""
    while block := file.read(1 << 18):
        while (len(block) - len(block.rstrip(b"\\"))) % 2 and (more := file.read(1)):
            block += more
        yield block


def _elements(file: Any, offset: int) -> Iterator[Entry]:
    """The elements of a JSON array as they are written; their sizes include the mark before them, `[` or `,`.

    An element is what lies between two commas outside of all brackets and strings: what is wrong in one of them is
    found by who parses it, and costs no other. Memory holds one element. Raises ValueError where there is no array or
    more than one, EOFError where it does not end.
    """
    element, size, depth, inside, first = bytearray(), 0, 0, False, offset == 0
    for block in _blocks(file):
        begin = place = 0
        if depth == 0:
            opening = ARRAY.match(block) if first else re.match(b",", block)
            if not opening:
                raise ValueError(f"a JSON array is expected, it starts with {block[:40]!r}")
            depth, size, begin = 1, opening.end(), opening.end()
            place = begin
        if inside and (rest := REST.match(block)):
            inside, place = False, rest.end()
        while not inside and (token := TOKEN.search(block, place)):
            mark, place = token[0], token.end()
            inside = mark == b'"'
            depth += (mark in (b"[", b"{")) - (mark == b"]" or (mark == b"}" and depth > 1))
            if depth == 0 or (depth == 1 and mark == b","):
                element += block[begin : token.start()][: MAX_LINE_BYTES + 1 - len(element)]
                size += token.start() - begin
                if not (first and depth == 0 and not element.strip()):  # an array of nothing
                    yield (bytes(element) if len(element) <= MAX_LINE_BYTES else None), size
                if depth == 0:
                    if (block[place:] + file.read(4096)).strip():
                        raise ValueError("it goes on after the end of the array")
                    return
                element, size, begin, first = bytearray(), 1, place, False
        element += block[begin:][: MAX_LINE_BYTES + 1 - len(element)]
        size += len(block) - begin
    if depth == 1 and not inside and element.strip():
        yield bytes(element), size
    raise EOFError("the array does not end")

"""Does memory grow with the number of documents? Synthetic indices of 10^4 to 10^7 rows, one process each.

    python benchmarks/order_memory.py [--rows 10000 100000 1000000 10000000] [--folder /tmp]

Each index holds captions of 10 to 60 tokens and keys of 12 characters, in row groups of 256. A fresh
process opens it (which hashes every file), seeks to places all over ten passes, and walks through
consecutive documents as training does. Printed: bytes on disk, seconds to open, resident memory that
belongs to the process alone (RssAnon; pages of mapped files are the system's and are dropped when it
needs the room), the time of a seek, and nanoseconds per lookup of a document's place, length and key.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from unifork.documents.index import Index, Writer, prepared
from unifork.documents.order import SetOrder

GROUP = 256
SEEKS, WALKED = 200, 100_000


def synthetic(writer: Writer, rows: int) -> None:
    """Append `rows` documents in blocks, so that memory does not limit the benchmark itself."""
    rng = np.random.default_rng(0)
    for start in range(0, rows, 1 << 18):
        count = min(1 << 18, rows - start)
        lengths_R = rng.integers(10, 61, count)
        numbers_R = np.arange(start, start + count)
        groups_R = numbers_R // GROUP
        digits = (numbers_R[:, None] // 10 ** np.arange(11, -1, -1)) % 10
        writer.append(
            text_ids_S=rng.integers(0, 150_000, lengths_R.sum()),
            loss_mask_S=np.zeros(lengths_R.sum(), bool),
            text_ends_R=writer.text_end + np.cumsum(lengths_R),
            image_at_R=lengths_R,
            supervised_count_R=np.zeros(count),
            where_R3=np.stack([groups_R // 64, groups_R % 64, numbers_R % GROUP], 1),
            key_bytes=digits + ord("0"),
            key_ends_R=(numbers_R + 1) * 12,
            group_sizes_G=np.bincount(groups_R - groups_R[0]),
        )


def resident_mib(kind: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[kind].split()[0]) / 1024


def never(_: Writer) -> None:
    """The index is there already."""
    raise AssertionError("the index was not found whole")


def measure(folder: Path) -> dict[str, float]:
    """Open an index in this process and use it."""
    before = resident_mib("RssAnon")
    started = time.perf_counter()
    index: Index = prepared(folder, never)
    order = SetOrder(index.group_sizes_G, 0, "benchmark", 0)
    opened = time.perf_counter() - started
    places = np.random.default_rng(1).integers(0, 10 * index.rows, SEEKS).tolist()
    started = time.perf_counter()
    for place in places:
        order.index(place)
    seek = (time.perf_counter() - started) / SEEKS
    started = time.perf_counter()
    for place in range(places[0], places[0] + WALKED):
        document = order.index(place)
        index.where_R3[document].tolist()
        index.text(document)
        index.key(document)
    lookup = (time.perf_counter() - started) / WALKED
    anonymous = resident_mib("RssAnon")
    return {"open": opened, "memory": anonymous, "more": anonymous - before, "seek": seek, "lookup": lookup}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--folder", help="where the synthetic indices go; removed afterwards")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure))))
        return
    print("| rows | MiB on disk | s to open | RssAnon MiB | of it added | ms per seek | ns per lookup |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "index"
            index = prepared(path, lambda writer, rows=rows: synthetic(writer, rows))  # type: ignore[misc]
            disk = sum(file.stat().st_size for file in index.folder.iterdir()) / 2**20
            command = [sys.executable, __file__, "--measure", str(path)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"| {rows:,} | {disk:.1f} | {found['open']:.2f} | {found['memory']:.0f} | {found['more']:.1f} "
            f"| {1e3 * found['seek']:.2f} | {1e9 * found['lookup']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

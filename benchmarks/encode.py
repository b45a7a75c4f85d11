"""What the encode job costs beside the same work without Ray: CPU seconds of all processes per image, and wall.

    python benchmarks/encode.py [--images 1536] [--rounds 9] [--workers 2]

Three ways make the same code shards of the same images, byte for byte, in turns and in changing order: the job
(actors of Ray Data), a pool of `multiprocessing` with the same worker class (spawn, one task at a time), and, for
scale, a bare loop in this process, which starts no process and imports nothing anew. Processes are started in every
round, by job and pool alike; what that takes is measured with one image per worker. Ray itself is started once
and its cost is named apart; its daemons count.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from samples import kept_images, shapes_card, untrained
from timing import Meter, interval, machine, ratio, table

from unifork.cluster import local_ray, map_shards
from unifork.config import Cluster, JobResources
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.shards.job import KeptRows
from unifork.shards.manifest import MANIFEST
from unifork.shards.task import ShardResult, ShardTask

SIZE, SIDE = 64, 128
_worker: list[Encode] = []


def make_worker(*arguments: Any) -> None:
    """In a process of the pool."""
    _worker.append(Encode(*arguments))


def call_worker(task: ShardTask) -> ShardResult:
    """In a process of the pool."""
    return _worker[0](task)


def with_ray(workers: int, arguments: tuple[Any, ...], tasks: list[ShardTask]) -> Iterator[ShardResult]:
    """As the stage does it."""
    return map_shards(tasks, Encode, arguments, JobResources(workers=workers, cpus=1))


def with_pool(workers: int, arguments: tuple[Any, ...], tasks: list[ShardTask]) -> Iterator[ShardResult]:
    """The least that works in several processes."""
    with multiprocessing.get_context("spawn").Pool(workers, make_worker, arguments) as pool:
        yield from pool.imap_unordered(call_worker, tasks)
        pool.close()
        pool.join()


def bare(arguments: tuple[Any, ...], tasks: list[ShardTask]) -> Iterator[ShardResult]:
    """One after the other, here."""
    return map(Encode(*arguments), tasks)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1536)
    parser.add_argument("--shard-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    card, workers = shapes_card(), given.workers
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = untrained(root / "tokenizer", SIZE, width=128, layers=5)
        many = kept_images(root / "many", given.images, given.shard_rows, SIDE)
        few = kept_images(root / "few", workers, 1, SIDE)
        arguments = (card, tokenizer, "cpu")
        ways = {
            "bare loop": partial(bare, arguments),
            "pool": partial(with_pool, workers, arguments),
            "job": partial(with_ray, workers, arguments),
        }

        def measured(way: str, source: KeptRows) -> tuple[float, float, bytes]:
            with tempfile.TemporaryDirectory(dir=root) as folder, Meter() as used:
                job = encode_job(card, "generation", source, Path(folder) / "codes", tokenizer)
                for result in ways[way](job.missing()):
                    job.add(result)
                job.finish()
                manifest = (job.folder / MANIFEST).read_bytes()
            return used.cpu, used.wall, manifest

        cpu: dict[str, list[float]] = {way: [] for way in ways}
        wall: dict[str, list[float]] = {way: [] for way in ways}
        manifests = set()
        with Meter() as session, local_ray(Cluster(name="benchmark", cpus=workers)):
            time.sleep(1)
        with local_ray(Cluster(name="benchmark", cpus=workers)):
            start = {way: median(measured(way, few)[0] for _ in range(3)) for way in ways}
            for number in range(given.rounds):
                for way in list(ways)[:: 1 if number % 2 else -1]:
                    seconds, lasted, manifest = measured(way, many)
                    cpu[way].append(seconds)
                    wall[way].append(lasted)
                    manifests.add(manifest)
    if len(manifests) != 1:
        raise RuntimeError("the ways did not make the same bytes")
    print(f"{machine('cpu')}; {given.images} JPEGs of {SIDE} px in shards of {given.shard_rows}, {workers} workers, "
          f"{given.rounds} rounds,\nsame bytes of all; start and end of Ray: {session.wall - 1:.1f} s wall, "
          f"{session.cpu:.1f} s CPU\n")  # fmt: skip
    print(table(["way", "CPU ms per image", "wall s", "of it start: CPU s"], [
        [way, interval([1000 * spent / given.images for spent in cpu[way]]), interval(wall[way]), f"{start[way]:.2f}"]
        for way in ways]) + "\n")  # fmt: skip
    job, pool = ([spent - start[way] for spent in cpu[way]] for way in ("job", "pool"))
    print(f"job / pool: CPU {ratio(cpu['job'], cpu['pool'])}, without start {ratio(job, pool)}, "
          f"wall {ratio(wall['job'], wall['pool'])}")  # fmt: skip


if __name__ == "__main__":
    main()

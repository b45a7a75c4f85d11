"""What the encode job costs beside the same work without Ray: CPU seconds of all processes per image, and wall.

    python benchmarks/encode.py [--images 1536] [--rounds 9] [--workers 2]
    python benchmarks/encode.py --views [--images 128] [--rounds 9]

Three ways make the same code shards of the same images, byte for byte, in turns and in changing order: the job
(actors of Ray Data), a pool of `multiprocessing` with the same worker class (spawn, one task at a time), and, for
scale, a bare loop in this process, which starts no process and imports nothing anew. Processes are started in every
round, by job and pool alike; what that takes is measured with one image per worker. Ray itself is started once
and its cost is named apart; its daemons count.

With `--views`: shards of both views, one view after the other and from one decode of each image, in this process, with
images of a shorter side of 480 px, views of 384 px and almost no network: what reading, decoding and views cost.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from samples import kept_images, shapes_card, untrained
from timing import Meter, alternate, interval, machine, ratio, table

from unifork.cluster import local_ray, map_shards
from unifork.config import Cluster, JobResources
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.shards.job import KeptRows
from unifork.shards.manifest import MANIFEST
from unifork.shards.task import ShardResult, ShardTask, joined

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


def views(images: int, rounds: int) -> None:
    """Print what both views cost, one by one and together; they must be the same files."""
    card = shapes_card()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = untrained(root / "tokenizer", 384, patch=32, width=32, layers=1)
        source = kept_images(root / "kept", images, 64, 480)
        worker, written = Encode(card, tokenizer, "cpu"), set()

        def both(plan: Callable[[list[ShardTask]], list[ShardTask]]) -> None:
            with tempfile.TemporaryDirectory(dir=root) as folder:
                jobs = [encode_job(card, task, source, Path(folder) / task, tokenizer) for task in card.tasks]
                for task in plan([task for job in jobs for task in job.missing()]):
                    worker(task)
                written.add(b"".join(path.read_bytes() for path in sorted(Path(folder).rglob("part-*.parquet"))))

        ways = {"one decode a view": partial(both, list), "one decode for both": partial(both, joined)}
        seconds = alternate(ways, rounds, "cpu")
    if len(written) != 1:
        raise RuntimeError("the ways did not make the same bytes")
    print(f"{machine('cpu')}; {images} JPEGs, shorter side 480 px, {rounds} pairs, same bytes of both\n")
    print(table(["way", "CPU ms per image"], [
        [way, interval([1000 * spent / images for spent in seconds[way]])] for way in ways]) + "\n")  # fmt: skip
    print(f"after / before: CPU {ratio(*reversed(list(seconds.values())))}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", action="store_true")
    parser.add_argument("--images", type=int)
    parser.add_argument("--shard-rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    if given.views:
        views(given.images or 128, given.rounds)
        return
    card, workers, images = shapes_card(), given.workers, given.images or 1536
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tokenizer = untrained(root / "tokenizer", SIZE, width=128, layers=5)
        many = kept_images(root / "many", images, given.shard_rows, SIDE)
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
    print(f"{machine('cpu')}; {images} JPEGs of {SIDE} px in shards of {given.shard_rows}, {workers} workers, "
          f"{given.rounds} rounds,\nsame bytes of all; start and end of Ray: {session.wall - 1:.1f} s wall, "
          f"{session.cpu:.1f} s CPU\n")  # fmt: skip
    print(table(["way", "CPU ms per image", "wall s", "of it start: CPU s"], [
        [way, interval([1000 * spent / images for spent in cpu[way]]), interval(wall[way]), f"{start[way]:.2f}"]
        for way in ways]) + "\n")  # fmt: skip
    job, pool = ([spent - start[way] for spent in cpu[way]] for way in ("job", "pool"))
    print(f"job / pool: CPU {ratio(cpu['job'], cpu['pool'])}, without start {ratio(job, pool)}, "
          f"wall {ratio(wall['job'], wall['pool'])}")  # fmt: skip


if __name__ == "__main__":
    main()

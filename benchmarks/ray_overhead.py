"""Does the device wait? The encode job with a stand-in for the network that takes a known time per batch.

    python benchmarks/ray_overhead.py [--milliseconds 100 200 400] [--sides 128 512] [--size 256] [--threads 2]

Everything is real, shards, hashes, decoding, views, Parquet and Ray, but for the network, which sleeps, as a
processor does that waits for a device. One actor with `threads` decoding threads. Busy is the time in the network
over the time from the start of its first batch to the end of its last one. No device can be kept busier than
images can be decoded: `reachable` is the batch's time over the processor time it costs to decode, with as many
cores as there are threads, at most 1.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from samples import jpegs, kept_images, shapes_card, untrained
from timing import machine, table
from torch import Tensor

from unifork.cluster import local_ray, run_jobs
from unifork.config import Card, Cluster, JobResources
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.image_tokenizer.encode import BATCH_IMAGES, Encode, encode_job

CLUSTER = Cluster(name="benchmark", cpus=1, jobs={"encode": JobResources(workers=1, cpus=1)})


class StandIn(Encode):
    """`Encode` with a network that sleeps and writes down when."""

    def __init__(self, card: Card, tokenizer: Path, seconds: float, threads: int, log: str) -> None:
        super().__init__(card, tokenizer, "cpu", threads)
        self.seconds, self.log = seconds, log
        for view in self.views.values():
            architecture = view.encoder.tokenizer.architecture
            view.encoder.tokenizer = SimpleNamespace(architecture=architecture, encode=self.encode)  # type: ignore[assignment]
            self.shape = (BATCH_IMAGES, architecture.grid**2, architecture.depth)

    def encode(self, _: Tensor) -> Tensor:
        """Codes of nothing, in the time of a device."""
        started = time.time()
        time.sleep(self.seconds)
        with open(self.log, "a") as file:
            file.write(f"{started} {time.time()}\n")
        return torch.zeros(self.shape, dtype=torch.int64)


def decode_seconds(tokenizer: Path, side: int) -> float:
    """Processor time of a batch of views, in one thread of this process."""
    encoder, images = CodeEncoder(tokenizer, "crop", None, BATCH_IMAGES), jpegs(side)
    architecture = encoder.tokenizer.architecture
    nothing_BND = torch.zeros(BATCH_IMAGES, architecture.grid**2, architecture.depth, dtype=torch.int64)
    encoder.tokenizer = SimpleNamespace(architecture=architecture, encode=lambda _: nothing_BND)  # type: ignore[assignment]
    encoder.encode_images(images)
    started = time.process_time()
    for _ in range(4):
        encoder.encode_images(images)
    return (time.process_time() - started) / (4 * len(images)) * BATCH_IMAGES


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, nargs="+", default=[100, 200, 400])
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--size", type=int, default=256, help="side of the views in pixels")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, default=48)
    given = parser.parse_args()
    card, rows = shapes_card(), 4 * BATCH_IMAGES
    lines = []
    with tempfile.TemporaryDirectory() as name, local_ray(CLUSTER):
        root = Path(name)
        tokenizer = untrained(root / "tokenizer", given.size, patch=16)
        for side in given.sides:
            kept = kept_images(root / f"images-{side}", given.batches * BATCH_IMAGES, rows, side)
            decoding = decode_seconds(tokenizer, side)
            for milliseconds in given.milliseconds:
                run, seconds = f"{side}-{milliseconds}", milliseconds / 1000
                arguments = (card, tokenizer, seconds, given.threads, str(root / run))
                job = encode_job(card, "generation", kept, root / f"codes-{run}", tokenizer)
                began = time.time()
                run_jobs([job], StandIn, *arguments, cluster=CLUSTER, step="encode")
                calls_B2 = np.loadtxt(root / run)
                busy = (calls_B2[:, 1] - calls_B2[:, 0]).sum() / (calls_B2[-1, 1] - calls_B2[0, 0])
                reachable = min(1.0, seconds * given.threads / decoding)
                lines.append([side, f"{milliseconds:g}", f"{1000 * decoding:.0f}", f"{reachable:.0%}", f"{busy:.1%}",
                              f"{calls_B2[0, 0] - began:.1f}"])  # fmt: skip
    print(f"{machine('cpu')}; views of {given.size} px, {given.batches} batches of {BATCH_IMAGES} in shards of {rows} "
          f"rows, {given.threads} threads\n")  # fmt: skip
    print(table(["JPEG px", "device ms per batch", "CPU ms to decode it", "reachable", "device busy",
                 "s to the first batch"], lines))  # fmt: skip


if __name__ == "__main__":
    main()

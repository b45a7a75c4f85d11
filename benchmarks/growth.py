"""How time, memory and bytes of the data's stages grow with the number of rows.

    python benchmarks/growth.py [--rows 1000 10000 100000] [--folder /tmp]

The real stages, one after the other and each in a process of its own, on the world `shapes` (images of 48x48 and
96x48, both views) with a small tokenizer of random weights: download (which draws the images), filter and publish
in the process itself, encode on two actors of a Ray Data job. The filter has three rows: measuring the images, the
decisions, and decisions by another rule, which read no image. CPU seconds and peak memory are those of all processes
(Ray's daemons too); memory is given for the driver and for the largest of all others, each with torch, which the
benchmark imports. MB read are those of the process itself, from files and its cache of them. What one more image
costs is taken between the two largest numbers of rows, so that starting does not count.
"""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samples import shapes_card, untrained
from timing import Meter, in_a_new_process, machine, table

from unifork.cluster import run_jobs
from unifork.config import Cluster, FilterRule, JobResources
from unifork.filters.measure import Measure, measure_job
from unifork.filters.worker import Filter, filter_job
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.layout import Layout
from unifork.publish.publication import build
from unifork.shards.job import KeptRows, ShardJob
from unifork.sources import Materialize, download_job

SHARD_ROWS = 1000
PAPER_IMAGES = 90_000_000
PAPER_CODES = 576 * 4
"""Codes of an image of the paper's tokenizer, two bytes each."""


def as_stages_do(jobs: list[ShardJob], worker: type, *arguments: object, workers: int = 0) -> None:
    """Run jobs over shards."""
    resources = {"growth": JobResources(workers=workers, cpus=1)}
    cluster = Cluster(name="growth", cpus=max(1, workers), jobs=resources)
    run_jobs(jobs, worker, *arguments, cluster=cluster, step="growth")


def download(layout: Layout, rows: int) -> None:
    """Draw the images."""
    card = shapes_card()
    job = download_job(card, rows, SHARD_ROWS, 0, layout.raw(card.name))
    as_stages_do([job], Materialize, card)


def measure(layout: Layout, _: int) -> None:
    """Look at every image."""
    card = shapes_card()
    as_stages_do([measure_job(card, layout.raw(card.name), layout.measured(card.name))], Measure, card)


def decide(layout: Layout, _: int, *more: FilterRule) -> None:
    """Keep what the card keeps."""
    card = shapes_card()
    card = card.model_copy(update={"filters": (*card.filters, *more)})
    as_stages_do([filter_job(card, layout.measured(card.name), layout.filtered(card.name))], Filter, card)


def decide_otherwise(layout: Layout, rows: int) -> None:
    """The same after one more rule was added to the card."""
    decide(layout, rows, FilterRule(rule="max_aspect", options={"ratio": 1.5}))


def encode(layout: Layout, _: int) -> None:
    """Both views on two actors."""
    card, tokenizer = shapes_card(), layout.root / "tokenizer"
    kept, codes = KeptRows(layout, card.name), layout.codes / card.name
    jobs = [encode_job(card, task, kept, codes / use.view, tokenizer) for task, use in card.tasks.items()]
    as_stages_do(jobs, Encode, card, tokenizer, "cpu", workers=2)


def publish(layout: Layout, _: int) -> None:
    """Into a folder."""
    build("shapes", layout, layout.published("shapes"), None)


STAGES: dict[str, tuple[str, Callable[[Layout, int], None]]] = {
    "download": ("raw", download),
    "filter, measuring": ("measured", measure),
    "filter, deciding": ("filtered", decide),
    "filter, another rule": ("filtered", decide_otherwise),
    "encode, both views": ("codes", encode),
    "publish, both views": ("published", publish),
}
"""Folder and work of each job."""


def measured(job: str, root: Path, rows: int) -> dict[str, Any]:
    """Run one job in this process."""
    folder, work = STAGES[job]
    layout = Layout(root)
    before = bytes_read()
    with Meter() as used:
        work(layout, rows)
    others = [peak for number, peak in used.peaks.items() if number != os.getpid()]
    size = sum(file.stat().st_size for file in (layout.data / folder / "shapes").rglob("*.parquet"))
    return {"rows": rows, "stage": job, "wall": used.wall, "cpu": used.cpu, "bytes": size,
            "read": bytes_read() - before,
            "driver": used.peaks[os.getpid()], "others": max(others, default=0.0)}  # fmt: skip


def bytes_read() -> int:
    """What this process has read so far."""
    lines = dict(text.split(": ") for text in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def line(run: dict[str, Any]) -> list[str]:
    """A job in the first table."""
    rates = [f"{run['rows']:,}", f"{run['rows'] / run['wall']:,.0f}", f"{run['wall']:.1f}", f"{run['cpu']:.1f}"]
    rates.append(f"{run['read'] / 1e6:.1f}")
    return [run["stage"], *rates, f"{run['driver']:.0f}", f"{run['others']:.0f}", f"{run['bytes'] / run['rows']:,.0f}"]


def more(job: str, small: dict[str, Any], large: dict[str, Any]) -> list[str]:
    """A job in the second table."""
    each = {key: (large[key] - small[key]) / (large["rows"] - small["rows"]) for key in ("wall", "cpu", "bytes")}
    hours = [f"{PAPER_IMAGES * each[key] / 3600:,.0f}" for key in ("wall", "cpu")]
    return [job, f"{1000 * each['cpu']:.2f}", *hours, f"{PAPER_IMAGES * each['bytes'] / 1e9:,.0f}"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5])
    parser.add_argument("--folder", help="where the data goes; removed afterwards")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        print(json.dumps(measured(given.stage, Path(given.folder), given.rows[0])))
        return
    found = []
    for rows in given.rows:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            root = Path(name)
            untrained(root / "tokenizer", 48)
            shutil.copytree(Path(__file__).parent.parent / "datasets", root / "datasets")
            for job in STAGES:
                output = in_a_new_process(__file__, "--stage", job, "--folder", name, "--rows", str(rows))
                found.append(json.loads(output.splitlines()[-1]))
    print(f"{machine('cpu')}; shards of {SHARD_ROWS} rows\n")
    head = [
        "stage",
        "rows",
        "rows/s",
        "wall s",
        "CPU s",
        "MB read",
        "MiB of driver",
        "MiB of largest other",
        "bytes per row",
    ]
    print(table(head, [line(run) for job in STAGES for run in found if run["stage"] == job]))
    if len(given.rows) > 1:
        head = ["stage", "CPU ms per row more", f"hours for {PAPER_IMAGES / 1e6:.0f} M rows here", "CPU hours", "GB"]
        print("\n" + table(head, [more(job, *[run for run in found if run["stage"] == job][-2:]) for job in STAGES]))
    print(f"\nCodes of the paper's tokenizer: {2 * PAPER_CODES:,} bytes per image and view, "
          f"{2 * PAPER_CODES * PAPER_IMAGES / 1e9:,.0f} GB per view before compression")  # fmt: skip


if __name__ == "__main__":
    main()

"""What a job of very many shards costs besides its shards: planning, resuming, finishing, verifying.

    python benchmarks/metadata.py [--shards 900 9000 90000] [--folder /tmp]

The shards are files of a few bytes, made beforehand with their records as workers leave them. Each step runs in a
process of its own; its memory is that of the process at its peak, less what it held after its imports.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from samples import shapes_card
from timing import in_a_new_process, machine, table

from unifork.filters.measure import measure_job
from unifork.shards.job import ShardJob
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX, Shard
from unifork.shards.repair import faults, repair
from unifork.sources import download_job


def plan(folder: Path, shards: int) -> ShardJob:
    """One task for each shard."""
    return download_job(shapes_card(), shards, 1, 0, folder)


def worked_on(folder: Path, shards: int) -> None:
    """Shards and records as workers leave them when a job is killed; every tenth is missing."""
    job = plan(folder, shards)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, task) in enumerate(zip(job.names, job.tasks, strict=True)):
        if number % 10:
            write(folder, name, job.inputs(task))


def write(folder: Path, name: str, inputs: str) -> None:
    """One shard and its record; without the flush to disk, which is the workers' time."""
    data = f"the shard {name}".encode()
    shard = Shard(path=name, rows=1, bytes=len(data), sha256=sha256(data).hexdigest(), inputs=inputs)
    (folder / name).write_bytes(data)
    (folder / (name + RECORD_SUFFIX)).write_text(shard.model_dump_json())


def resume(folder: Path, shards: int) -> str:
    """Find out what a killed run has finished."""
    return f"{len(plan(folder, shards).missing()):,} left"


def finish(folder: Path, shards: int) -> str:
    """Fold all records into a manifest, the last shards having been made."""
    job = plan(folder, shards)
    for task in job.missing():
        name = Path(task.output).name
        write(folder, name, task.inputs)
        job.finished[name] = Shard.model_validate_json((folder / (name + RECORD_SUFFIX)).read_text())
    return f"{len(job.finish().shards):,} shards, {(folder / MANIFEST).stat().st_size / 1e6:.0f} MB of manifest"


def again(folder: Path, shards: int) -> str:
    """A finished job that is run again."""
    job = plan(folder, shards)
    left = job.missing()
    job.finish()
    return f"{len(left)} left"


def follow(folder: Path, _: int) -> str:
    """Plan the stage that reads these shards."""
    return f"{len(measure_job(shapes_card(), folder, folder.with_name('next')).tasks):,} tasks"


def verify(folder: Path, _: int) -> str:
    """Read and hash every shard."""
    return f"{len(faults(folder))} faults"


def mend(folder: Path, shards: int) -> str:
    """Find one damaged shard and take it away; the run that follows makes it alone."""
    name = plan(folder, shards).names[shards // 2]
    (folder / name).write_bytes(b"x" * (folder / name).stat().st_size)
    repair(faults(folder))
    return f"{len(plan(folder, shards).missing())} left"


STEPS: dict[str, Callable[[Path, int], str]] = {
    "resume a killed job": resume,
    "finish": finish,
    "run again": again,
    "plan what follows": follow,
    "verify": verify,
    "verify --repair, plan again": mend,
}


def measured(step: str, folder: Path, shards: int) -> dict[str, Any]:
    """Do a step in this process."""
    before, started = peak(), time.perf_counter()
    result = STEPS[step](folder, shards)
    return {"step": step, "result": result, "seconds": time.perf_counter() - started, "mib": peak() - before}


def peak() -> float:
    """Most MiB that this process held so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[900, 9000, 90_000])
    parser.add_argument("--folder", help="where the shards go; removed afterwards")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(measured(given.step, Path(given.folder), given.shards[0])))
        return
    lines = []
    for shards in given.shards:
        root = Path(tempfile.mkdtemp(dir=given.folder))
        folder = root / "data/raw/shapes"
        worked_on(folder, shards)
        for step in STEPS:
            output = in_a_new_process(__file__, "--step", step, "--folder", str(folder), "--shards", str(shards))
            done = json.loads(output.splitlines()[-1])
            lines.append([step, f"{shards:,}", f"{done['seconds']:.1f}", f"{done['mib']:.0f}", done["result"]])
        shutil.rmtree(root)
    print(f"{machine('cpu')}\n")
    print(table(["step", "shards", "seconds", "MiB", "result"], lines))


if __name__ == "__main__":
    main()

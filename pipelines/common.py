"""What the programs share: arguments, folders, configuration.

All paths are relative to the working directory, which is the root of the experiment.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from unifork.cluster import load_cluster, local_ray, map_shards, run_stage
from unifork.config import DatasetUse, Experiment, HopResources, load
from unifork.errors import UniForkError, unknown
from unifork.processes import exclusive
from unifork.shards.job import Hop, run_hops
from unifork.shards.manifest import Manifest

RAW, FILTERED, CODES = Path("data/raw"), Path("data/filtered"), Path("data/codes")
SIGNATURES = Path("data/signatures")
STORED = (RAW, FILTERED, CODES)
"""Folders whose new shards go to the cluster's store. Signatures are read over and over and stay."""
IMAGE_TOKENIZER, TEXT_TOKENIZER = Path("tokenizers/image"), Path("tokenizers/text")
MODELS, RUNS, SCORES, REPORTS = Path("models"), Path("runs"), Path("scores"), Path("reports")


def experiment() -> Experiment:
    """The experiment of this folder."""
    return load(Experiment, "params.yaml")


def dataset_use(params: Experiment, name: str) -> DatasetUse:
    """How the experiment uses a data set. Raises ConfigError when it does not."""
    if name not in params.datasets:
        raise unknown("data set", name, params.datasets, "params.yaml: datasets")
    return params.datasets[name]


def program(module: str, output: Callable[[str], Path], main: Callable[[str], None], what: str | None) -> None:
    """Run `main(name)` where the cluster file says, alone in its output folder.

    what: what the one argument of the program names; None for a program without arguments.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=sys.modules["__main__"].__doc__)
    if what:
        parser.add_argument("name", help=what)
    name: str = getattr(parser.parse_args(), "name", "")
    try:
        folder = output(name)
    except UniForkError as error:
        parser.exit(2, f"error: {error}\n")

    def alone() -> None:
        with exclusive(folder):
            main(name)

    run_stage(alone, module, [name] if what else [], [folder])


def stored(store: str, folder: Path) -> str | None:
    """Where in a store the shards of a folder below `data` go."""
    if not any(folder.is_relative_to(known) for known in STORED):
        return None
    return f"{store.rstrip('/')}/{folder.relative_to(RAW.parent).as_posix()}"


def run(step: str, hops: Sequence[Hop], worker: type, *arguments: object) -> list[Manifest]:
    """Run hops with the workers that the cluster file gives to `step`, and print their progress."""
    cluster = load_cluster()
    resources = cluster.hops.get(step, HopResources())
    if cluster.store:
        hops = [replace(hop, store=stored(cluster.store, hop.folder)) for hop in hops]

    def map_tasks(tasks: list[dict[str, Any]], on_result: Callable[[dict[str, Any]], None]) -> None:
        with local_ray(cluster, needed=resources.workers > 0):  # not started where nothing is left to do
            map_shards(tasks, worker, arguments, resources, on_result)

    return run_hops(hops, map_tasks, lambda progress: print(progress, flush=True))

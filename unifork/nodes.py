"""What the nodes of a cluster have: `unifork doctor --cluster FILE`, one line for each.

In: a file that the command wrote into the experiment's folder, with the versions that are installed beside it. Out: a
line and a verdict for each node, from a task there. The file shows whether a node shares the folder, and a lock on it
whether locks hold across nodes.
"""

import fcntl
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from unifork.cluster import check_shared, living_nodes, local_ray, on_every_node, this_node
from unifork.config import load_cluster
from unifork.errors import MachineError
from unifork.jobs import run_stage
from unifork.processes import meet
from unifork.report.surroundings import installed

LEAST_FREE_GB, LEAST_SHM_GB, LARGEST_SKEW_SECONDS = 1, 1, 5
REDUCED = 16_000_000
"""Numbers of four bytes."""
LOCK = Path(__file__).parents[1] / "requirements.lock"
MODULE = "unifork.nodes"


@contextmanager
def submitted_file() -> Iterator[str]:
    """The name of a new file in this folder: versions of the lock's packages that are installed here."""
    here = installed()
    locked = {line.partition("==")[0].lower() for line in LOCK.read_text().split()} if LOCK.exists() else {*here}
    with tempfile.NamedTemporaryFile("w", dir=".", prefix=".doctor-", suffix=".json") as file:
        json.dump({name: version for name, version in here.items() if name in locked}, file)
        file.flush()
        os.chmod(file.name, 0o666)  # jobs may be of another user
        yield Path(file.name).name


def look(path: str, expected: dict[str, str]) -> tuple[list[str], list[str], float]:
    """On a node: (what is wrong, what is there, its clock). path: the file, which the caller has locked."""
    wrong, there = [], []
    now, folder = installed(), Path(path).parent
    others = [
        f"{name} {now.get(name)}, not {version}" for name, version in expected.items() if now.get(name) != version
    ]
    if others:
        wrong.append("; ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else ""))
    if os.path.exists(path):
        with open(path, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                wrong.append("flock holds on one node only")
            except BlockingIOError:
                there.append("root shared, flock holds")
            except OSError as error:
                wrong.append(f"flock: {error.strerror}")
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as own:
            Path(own, "a").touch()
            os.replace(Path(own, "a"), Path(own, "b"))
    else:
        wrong.append(f"does not see {path}: `root` is not shared")
    for name, least in (str(folder), LEAST_FREE_GB), (tempfile.gettempdir(), LEAST_FREE_GB), ("/dev/shm", LEAST_SHM_GB):
        free = shutil.disk_usage(name).free / 1e9 if os.path.exists(name) else 0.0
        (wrong if free < least else there).append(f"{free:.1f} GB free in {name}")
    mode = os.environ.get("RAY_AUTH_MODE", "disabled")
    there.append(f"tokens: {mode}")
    return wrong, there, time.time()


def meet_here(folder: str, nodes: list[str], backend: str) -> float:
    """This node's part of an all-reduce over all of them, as `meet`. nodes: Ray's ids."""
    return meet(nodes.index(this_node()), len(nodes), backend, folder, REDUCED)


def bandwidth(root: str) -> str:
    """One line: how fast nodes add up numbers together, by nccl where two have GPUs. Raises MachineError."""
    nodes = living_nodes()
    gpus = int(sum(node["Resources"].get("GPU", 0) > 0 for node in nodes) > 1)
    backend, ids = ("gloo", "nccl")[gpus], [node["NodeID"] for node in nodes if node["Resources"].get("GPU", 0) >= gpus]
    if len(ids) < 2:
        return "all-reduce: one node, nothing to measure"
    with tempfile.TemporaryDirectory(dir=root, prefix=".doctor-") as folder:
        os.chmod(folder, 0o777)
        found = on_every_node(meet_here, folder, ids, backend, gpus=gpus)
    for name, _, answer in found:
        if isinstance(answer, Exception):
            raise MachineError(
                f"all-reduce by {backend}: {name}: {' '.join(str(answer).split())[-300:] or 'no answer'}"
            )
    slowest = min(answer for _, _, answer in found)
    return f"all-reduce of {4 * REDUCED / 1e6:.0f} MB over {len(ids)} nodes by {backend}: {slowest:.2f} GB/s"


def main(name: str, reduce: str = "") -> None:
    """Look at every node, from one of them. reduce: anything, for an all-reduce. Exit code 1 where something fails."""
    path, failed = os.path.abspath(name), False
    check_shared(path)
    with local_ray(load_cluster()), open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        expected, started = json.load(file), time.time()
        for node, gpus, answer in on_every_node(look, path, expected):
            if isinstance(answer, Exception):
                wrong, there = [" ".join(str(answer).split())[-300:] or "no answer"], []
            else:
                wrong, there, clock = answer
                skew = max(started - clock, clock - time.time())
                if skew > LARGEST_SKEW_SECONDS:
                    wrong = [*wrong, f"clock {skew:.0f} s off"]
            failed = failed or bool(wrong)
            print(
                f"{node:30} {'failed' if wrong else 'ok':7} {'; '.join([*wrong, f'{gpus:g} GPUs', *there])}", flush=True
            )
        if reduce:
            print(bandwidth(str(Path(path).parent)), flush=True)
    sys.exit(failed)


def examine_nodes(reduce: bool) -> None:
    """Run `main` where the cluster file says. Ends the program."""
    with submitted_file() as name:
        arguments = [name, *["reduce"] * reduce]
        run_stage(partial(main, *arguments), MODULE, arguments)


if __name__ == "__main__":
    run_stage(partial(main, *sys.argv[1:]), MODULE, sys.argv[1:])

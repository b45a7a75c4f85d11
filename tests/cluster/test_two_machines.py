"""Two machines with an address each, a head and a node in token mode; a third one submits jobs."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from machines import (
    REPOSITORY,
    Machine,
    Network,
    assert_same_weights,
    join,
    needs_machines,
    network,
    train_in_one_place,
    trained_on,
)
from tiny import copy_of

__all__ = ["network"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_machines]

KEY = "unifork-s1-captions"
TRAIN = {"workers": 2, "cpus": 1, "threads": 1, "row_tokens": 384}


def submit(login: Machine, root: Path, head: Machine, *words: str, **keys: object) -> tuple[int, str]:
    """Run a module with a cluster file of some keys; exit code and output."""
    (root / "two.yaml").write_text(yaml.safe_dump({"name": "two", "address": f"http://{head.address}:8265", **keys}))
    environment = {"UNIFORK_CLUSTER": "two.yaml", "PYTHONPATH": f"{root}{os.pathsep}{REPOSITORY}"}
    done = login.run("env", f"--chdir={root}", "python", "-m", *words, env=environment, seconds=1500)
    return done.returncode, done.stdout


PROGRAM = """
import socket

from unifork.cluster import local_ray, map_shards
from unifork.config import load_cluster
from unifork.jobs import run_stage
from unifork.shards.task import ShardResult, ShardTask


class Name:
    def __call__(self, task):
        return ShardResult(task.output, problem="none")


def main():
    cluster = load_cluster()
    with local_ray(cluster):
        print("driver on", socket.gethostname(), flush=True)
        print(len(list(map_shards([ShardTask(output="a")], Name, (), cluster.jobs["work"]))), "shards")


if __name__ == "__main__":
    run_stage(main, "stages.program", [])
"""


def write_program(root: Path) -> None:
    (root / "stages").mkdir(parents=True)
    (root / "stages" / "__init__.py").touch()
    (root / "stages" / "program.py").write_text(PROGRAM)


@pytest.fixture
def two(network: Network) -> Callable[..., tuple[Machine, Machine, Machine]]:
    """Starts a head with a CPU, a node with some, with or without the disk, and a machine without Ray."""

    def start(cpus: int, *, disk: bool) -> tuple[Machine, Machine, Machine]:
        head, node, login = network.add("head"), network.add("node", disk=disk), network.add("login")
        join(head, head, 1)
        join(node, head, cpus)
        return head, node, login

    return start


def test_workers_on_two_machines_end_with_the_weights_of_two_in_one_place(tiny_root, network, two, tmp_path):
    root = copy_of(tiny_root, network.disk)
    alone = copy_of(tiny_root, tmp_path / "alone")
    head, node, login = two(1, disk=True)
    code, output = submit(login, root, head, "pipelines.train", KEY, train=TRAIN)
    assert code == 0, output
    assert trained_on(head)
    assert trained_on(node)

    train_in_one_place(alone, KEY, TRAIN)
    assert_same_weights(root, alone, KEY)


def test_a_machine_without_the_disk_is_named_and_a_driver_with_cpus_goes_where_they_are(
    tiny_root, network, two, tmp_path
):
    root, seen = copy_of(tiny_root, network.disk), tmp_path / "seen"
    write_program(root)
    write_program(seen)  # where all machines see it
    head, node, login = two(2, disk=False)

    def refused(*words: str, **keys: object) -> str:
        code, output = submit(login, root, head, *words, **keys)
        assert code == 2, output
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: node node ({node.address}) does not see {root}/runs/.ray/.shared-")
        return output

    output = refused("pipelines.train", KEY, train={**TRAIN, "workers": 3, "max_restarts": 3})
    assert "starting again" not in output
    output = refused("stages.program", jobs={"work": {"workers": 1, "cpus": 2}})
    assert "driver on head" in output  # nothing was asked for

    code, output = submit(login, root, head, "unifork.cli", "doctor", "--cluster", "two.yaml")
    assert code == 1, output
    lines = sorted(line for line in output.splitlines() if " GPUs" in line)
    assert [line.split()[:3] for line in lines] == [
        ["head", f"({head.address})", "ok"], ["node", f"({node.address})", "failed"],
    ]  # fmt: skip
    assert "root shared, flock holds" in lines[0]
    assert "tokens: token" in lines[0]
    assert f"does not see {root}/.doctor-" in lines[1]

    code, output = submit(login, seen, head, "stages.program", driver={"cpus": 2}, jobs={"work": {"workers": 1}})
    assert code == 0, output
    assert "driver on node" in output
    assert "1 shards" in output

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


def test_a_machine_without_the_disk_is_named_and_costs_no_restart(tiny_root, network, two):
    root = copy_of(tiny_root, network.disk)
    head, node, login = two(1, disk=False)
    code, output = submit(login, root, head, "pipelines.train", KEY, train={**TRAIN, "max_restarts": 3})
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: node node ({node.address}) does not see {root}/runs/.ray/.shared-")
    assert "starting again" not in output

"""Two machines with an address each, a head and a node in token mode; a third one submits jobs."""

from collections.abc import Callable
from typing import Any

import pytest
import yaml
from machines import Machine, Network, join, needs_machines, network, trained_on
from one_place import assert_same_weights, train_in_one_place
from tiny import copy_of

from unifork.training.history import read

__all__ = ["network"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.nodes, needs_machines]

KEY = "unifork-s1-captions"
TRAIN = {"workers": 2, "cpus": 1, "threads": 1, "row_tokens": 384, "max_restarts": 3}


def train(login: Machine, head: Machine, resources: dict[str, Any] = TRAIN) -> tuple[int, str]:
    """The stage as a job that another machine submits; exit code and output."""
    keys = {"name": "two", "address": f"http://{head.address}:8265", "train": resources}
    (login.root / "two.yaml").write_text(yaml.safe_dump(keys))
    done = login.run("python", "-m", "pipelines.train", KEY, env={"UNIFORK_CLUSTER": "two.yaml"}, seconds=1500)
    return done.returncode, done.stdout


@pytest.fixture
def two(network: Network) -> Callable[..., tuple[Machine, Machine, Machine]]:
    """Starts a head and a node, with or without the disk, of some CPUs each; and a machine without Ray."""

    def start(*, disk: bool, cpus: int = 1) -> tuple[Machine, Machine, Machine]:
        head, node, login = network.add("head"), network.add("node", disk=disk), network.add("login")
        join(head, head, cpus)
        join(node, head, cpus)
        return head, node, login

    return start


def test_workers_on_two_machines_end_with_the_weights_of_two_in_one_place(tiny_root, network, two, tmp_path):
    root = copy_of(tiny_root, network.disk)
    alone = copy_of(tiny_root, tmp_path / "alone")
    head, node, login = two(disk=True)
    code, output = train(login, head)
    assert code == 0, output
    assert trained_on(head)
    assert trained_on(node)

    train_in_one_place(alone, KEY, TRAIN)
    assert_same_weights(root, alone, KEY)


@pytest.mark.soak
def test_a_replica_on_each_machine_trains_as_one_process(tiny_root, network, two, tmp_path):
    """`shard: node`, two workers on each: bit-equal to the same four in one place; losses those of one process."""
    root = copy_of(tiny_root, network.disk)
    alone, single = [copy_of(tiny_root, tmp_path / name) for name in ("alone", "single")]
    resources = {**TRAIN, "workers": 4, "shard": "node"}
    head, node, login = two(disk=True, cpus=2)
    code, output = train(login, head, resources)
    assert code == 0, output
    assert len(trained_on(head).split()) == len(trained_on(node).split()) > 0

    train_in_one_place(alone, KEY, resources, node_workers=2)
    assert_same_weights(root, alone, KEY)
    train_in_one_place(single, KEY, {**TRAIN, "workers": 1})
    for name in "text_loss", "image_loss":
        found, expected = [[row[name] for row in read(place / "runs" / KEY)] for place in (root, single)]
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.soak  # a node that does not see the folder: test_launch for training, test_real_cluster for a real one
def test_a_machine_without_the_disk_is_named_and_costs_no_restart(tiny_root, network, two):
    root = copy_of(tiny_root, network.disk)
    head, node, login = two(disk=False)
    code, output = train(login, head)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: node node ({node.address}) does not see {root}/runs/.ray/.shared-")
    assert "starting again" not in output

"""Two machines with an address each, a head and a node in token mode; a third one submits jobs."""

from collections.abc import Callable

import pytest
import yaml
from machines import Machine, Network, join, needs_machines, network, trained_on
from one_place import assert_same_weights, train_in_one_place
from tiny import copy_of

__all__ = ["network"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow, needs_machines]

KEY = "unifork-s1-captions"
TRAIN = {"workers": 2, "cpus": 1, "threads": 1, "row_tokens": 384, "max_restarts": 3}


def train(login: Machine, head: Machine) -> tuple[int, str]:
    """The stage as a job that another machine submits; exit code and output."""
    keys = {"name": "two", "address": f"http://{head.address}:8265", "train": TRAIN}
    (login.root / "two.yaml").write_text(yaml.safe_dump(keys))
    done = login.run("python", "-m", "pipelines.train", KEY, env={"UNIFORK_CLUSTER": "two.yaml"}, seconds=1500)
    return done.returncode, done.stdout


@pytest.fixture
def two(network: Network) -> Callable[..., tuple[Machine, Machine, Machine]]:
    """Starts a head and a node, with or without the disk, of one CPU each; and a machine without Ray."""

    def start(*, disk: bool) -> tuple[Machine, Machine, Machine]:
        head, node, login = network.add("head"), network.add("node", disk=disk), network.add("login")
        join(head, head, 1)
        join(node, head, 1)
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


@pytest.mark.soak  # a node that does not see the folder: test_launch for training, test_two_nodes for a real one
def test_a_machine_without_the_disk_is_named_and_costs_no_restart(tiny_root, network, two):
    root = copy_of(tiny_root, network.disk)
    head, node, login = two(disk=False)
    code, output = train(login, head)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: node node ({node.address}) does not see {root}/runs/.ray/.shared-")
    assert "starting again" not in output

"""Machines that lose power, on machines made of namespaces: the lead of a fit in the whole line, and the head."""

import fcntl
import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from checkouts import check_out, environment
from machines import has_ray, join, needs_machines, network, trained_on
from one_place import assert_same_weights, train_in_one_place
from ray_heads import wait_until
from tiny import REPOSITORY, build, copy_of

from unifork.processes import lock_path

__all__ = ["network"]

pytestmark = [pytest.mark.soak, needs_machines]

SLOW = """
import time

from unifork.training.loggers import Logger


class Slow(Logger):
    def add(self, step, numbers):
        time.sleep(0.5)
"""
TRAIN = {"workers": 2, "cpus": 1, "threads": 1, "row_tokens": 384, "max_restarts": 3}
CLUSTER = {
    "name": "machines",
    "address": "http://head:8265",
    "jobs": {"encode": {"workers": 2, "cpus": 1}},
    "train": TRAIN,
}
HURRY = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
"""Nodes do not wait a minute for a lost head."""


def last_step(run: Path) -> int:
    """Of the last checkpoint."""
    pointer = run / "latest"
    return int(pointer.read_text().removeprefix("step-")) if pointer.exists() else 0


@contextmanager
def held(path: Path):
    """A lock that its dead holder's machine keeps."""
    with open(path) as file:
        assert wait_until(lambda: not locked(file), 10)
        yield


def locked(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def test_the_whole_line_from_a_third_machine(network):
    """`dvc repro` to the end of the report, every stage a job; training on both nodes."""
    root = check_out(network.disk, CLUSTER)
    head, login, a, b = [network.add(name) for name in ("head", "login", "a", "b")]
    for machine, cpus in (head, 0), (a, 1), (b, 1):
        join(machine, head, cpus, PYTHONPATH=str(root))
    names = {name: value for name, value in environment(root).items() if name.startswith(("GIT_", "UNIFORK_"))}
    done = login.run("dvc", "repro", env={"PYTHONPATH": str(root), **names}, seconds=5400)
    assert done.returncode == 0, done.stdout
    assert trained_on(a)
    assert trained_on(b)
    assert not trained_on(head)
    assert (root / "reports/micro/index.html").stat().st_size > 100_000
    assert json.loads((root / "scores/unifork.json").read_text())


def test_the_lead_and_then_the_head_lose_power(network, tmp_path):
    """The lead's lock is held after its death, as by a file server. Every step ends up in the history once."""
    key, steps = "unifork-s1-captions", 200
    tracks = {"joint": {"steps": steps}}
    root = build(network.disk, {"stages": {"s1-captions": {"tracks": tracks, "checkpoint_every": 5}}})
    alone, run = copy_of(root, tmp_path / "alone"), root / "runs" / key
    (root / "slow.py").write_text(SLOW)
    (root / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER | {"train": {**TRAIN, "loggers": ["slow:Slow"]}}))
    paths = {"PYTHONPATH": f"{root}{os.pathsep}{REPOSITORY}"}

    def train(name):
        command, log = ("python", "-m", "pipelines.train", key), tmp_path / f"{name}.log"
        environment = paths | {"UNIFORK_CLUSTER": "cluster.yaml"}
        return login.start(*command, env=environment, stdout=log.open("w")), log

    def comes(what, condition, seconds=1800):
        assert wait_until(lambda: condition() or command.poll() is not None, seconds), log.read_text()
        assert condition(), log.read_text()
        print(f"{time.monotonic() - started:6.0f} s, step {last_step(run)}: {what}", flush=True)

    started, login, head = time.monotonic(), network.add("login"), network.add("head")
    nodes = {name: network.add(name) for name in ("a", "b")}
    join(head, head, 0, **paths)
    for node in nodes.values():
        join(node, head, 1, **paths, **HURRY)
    command, log = train("first")
    comes("training", lambda: last_step(run) >= 10)
    assert all(trained_on(node) for node in nodes.values())

    nodes.pop(lock_path(run).read_text().split()[-1]).cut()
    with held(lock_path(run)):
        lost = last_step(run)
        nodes["c"] = network.add("c")
        comes("the loss of the lead is noticed", lambda: "workers failed" in log.read_text())
        join(nodes["c"], head, 1, **paths, **HURRY)
        comes("workers on the new machine", lambda: trained_on(nodes["c"]))
        time.sleep(20)  # longer than an orphan's lock is waited for
        assert command.poll() is None, log.read_text()
        assert last_step(run) == lost
    comes("training on the new machine", lambda: last_step(run) >= lost + 10)
    assert f"{key}: continuing from step {lost} of {steps}" in log.read_text()

    head.cut()
    assert command.wait(900) == 2, log.read_text()
    assert log.read_text().splitlines()[-1].startswith("error: the job server went away")
    print(f"{time.monotonic() - started:6.0f} s, step {last_step(run)}: the loss of the head is noticed", flush=True)
    assert wait_until(lambda: not any(has_ray(node) for node in nodes.values()), 900)  # whose lead holds the lock
    left = last_step(run)
    assert left < steps

    head = network.add("head")
    join(head, head, 0, **paths)
    for node in nodes.values():
        join(node, head, 1, **paths)
    command, log = train("second")
    assert command.wait(1800) == 0, log.read_text()
    print(f"{time.monotonic() - started:6.0f} s, step {last_step(run)}: the end", flush=True)
    assert f"{key}: continuing from step {left} of {steps}" in log.read_text()
    train_in_one_place(alone, key, TRAIN)
    assert_same_weights(root, alone, key)

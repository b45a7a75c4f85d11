"""A worker process or a whole node dies inside a running fit: it is replaced and training goes on."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from tiny import REPOSITORY, build, copy_of

from unifork.cluster import set_ray_environment
from unifork.config import Experiment, TrainResources, load
from unifork.processes import lock_path
from unifork.training.history import read
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

KEY, STEPS, DIES_AFTER = "unifork-s1-captions", 60, 10
CHANGES = {"stages": {"s1-captions": {"tracks": {"joint": {"steps": STEPS}}, "checkpoint_every": 5}}}

pytestmark = pytest.mark.soak


def job(root, workers):
    resources = TrainResources(workers=workers, cpus=1, threads=1, row_tokens=384, max_restarts=3)
    return StageJob(key=KEY, experiment=load(Experiment, root / "params.yaml"), resources=resources, root=str(root))


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs and two nodes of one CPU each: one worker on each node."""
    set_ray_environment()
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A root, and the history of the same stage on one worker without interruption."""
    root = build(tmp_path_factory.mktemp("lost"), CHANGES)
    alone = copy_of(root, tmp_path_factory.mktemp("alone") / "root")
    train_stage(job(alone, 0), WorkerContext())
    return root, read(job(alone, 0).run_folder)


def kill_the_lead(stage_job, cluster):
    os.kill(int(lock_path(stage_job.run_folder).read_text().split()[1]), signal.SIGKILL)


def lose_a_node(stage_job, cluster):
    cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0], allow_graceful=False)
    with mock.patch("ray._private.utils.set_sigterm_handler"):  # allowed in the main thread alone, which trains
        cluster.add_node(num_cpus=1)


def drain_a_node(stage_job, cluster):
    """A cloud's notice, as whoever reads it passes it on; then the machine that replaces the one that leaves."""
    node = sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0]
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds"]
    command = [Path(sys.executable).with_name("ray"), "drain-node", "--address", cluster.address, "--node-id"]
    subprocess.run(
        [*command, node.node_id, *reason, "600"], check=True, env={**os.environ, "RAY_AUTH_MODE": "disabled"}
    )
    with mock.patch("ray._private.utils.set_sigterm_handler"):
        cluster.add_node(num_cpus=1)


@pytest.mark.parametrize("loss", [kill_the_lead, lose_a_node, drain_a_node])
def test_what_is_lost_is_replaced_and_training_goes_on(cluster, prepared, tmp_path, loss):
    from unifork.training.launch import launch

    root, unbroken = prepared
    stage_job = job(copy_of(root, tmp_path / "root"), 2)
    lost, ended = [], threading.Event()

    def watch():
        pointer, deadline = stage_job.run_folder / "latest", time.monotonic() + 300
        while time.monotonic() < deadline:
            if pointer.exists() and int(pointer.read_text().removeprefix("step-")) >= DIES_AFTER:
                loss(stage_job, cluster)
                lost.append(True)
                ended.wait()  # a node dies with the thread that started it
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        launch(stage_job)
    finally:
        ended.set()
        watcher.join()
    assert lost
    log = (stage_job.run_folder / "log.txt").read_text()
    assert "continuing from step" in log
    if loss is drain_a_node:  # which has time to save: no step is trained again
        (saved,) = re.findall(r"stopped by a signal after step (\d+) of", log)
        assert f"continuing from step {saved} of" in log
    history = read(stage_job.run_folder)
    assert [row["documents_hash"] for row in history] == [row["documents_hash"] for row in unbroken]
    for ours, theirs in zip(history, unbroken, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_a_range_of_workers_shrinks_with_a_lost_node_and_grows_with_a_new_one(cluster, prepared, tmp_path, monkeypatch):
    """2 -> 1 -> 2 workers in one command: the documents and losses of the unbroken run."""
    from unifork.training import launch

    root, unbroken = prepared
    stage_job = job(copy_of(root, tmp_path / "root"), (1, 2))
    sizes, plain = tmp_path / "sizes", launch.scaling

    def worker(config):  # which notes how many there are, and is slow where it is alone
        import time

        import ray.train

        from unifork.training import launch

        size, report = ray.train.get_context().get_world_size(), ray.train.report
        with sizes.open("a") as file:
            file.write(f"{size} " if ray.train.get_context().get_world_rank() == 0 else "")
        ray.train.report = lambda metrics: (time.sleep(1.0 if size == 1 else 0.1), report(metrics))
        launch._worker(config)

    monkeypatch.setattr(launch, "_worker", worker)
    monkeypatch.setattr(launch, "scaling", lambda found: plain(found) | {"elastic_resize_monitor_interval_s": 2.0})
    happened, ended = [], threading.Event()

    def comes(what, condition):
        while not ended.is_set():
            if condition():
                happened.append(what)
                return True
            time.sleep(0.05)
        return False

    def saved():
        pointer = stage_job.run_folder / "latest"
        return int(pointer.read_text().removeprefix("step-")) if pointer.exists() else 0

    def watch():
        if comes("lost", lambda: saved() >= DIES_AFTER):
            cluster.remove_node(sorted(cluster.worker_nodes, key=lambda node: node.unique_id)[0], allow_graceful=False)
            at = saved()
            if comes("new", lambda: sizes.read_text().startswith("2 1 ") and saved() > at):
                with mock.patch("ray._private.utils.set_sigterm_handler"):
                    cluster.add_node(num_cpus=1)
                ended.wait()  # a node dies with the thread that started it

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        launch.launch(stage_job)
    finally:
        ended.set()
        watcher.join()
    assert happened == ["lost", "new"]
    assert sizes.read_text().split() == ["2", "1", "2"]
    history = read(stage_job.run_folder)
    assert [row["documents_hash"] for row in history] == [row["documents_hash"] for row in unbroken]
    for ours, theirs in zip(history, unbroken, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)

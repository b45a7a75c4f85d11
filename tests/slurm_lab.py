"""`make slurm-lab`: `clusters/slurm.sbatch` under a real Slurm, on two nodes and a login made of namespaces.

In: this checkout; Debian's Slurm and munge, which are installed when they are missing, without their services. Out: the
line of `micro`, ended in between as Slurm ends jobs, and printed: how long each part took.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from checkouts import check_out, environment
from machines import (
    BIN,
    Machine,
    Network,
    assert_same_weights,
    copies,
    has_ray,
    needs_machines,
    network,
    train_in_one_place,
    trained_on,
)
from ray_heads import wait_until

__all__ = ["network"]

pytestmark = [pytest.mark.soak, needs_machines]

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge"]
NODES, KEY = ("n1", "n2"), "unifork-s2-pretrain"
CONFIGURATION = """
ClusterName=lab
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=10
StateSaveLocation=/var/spool/slurm/ctld
SlurmdSpoolDir=/var/spool/slurm/d
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
NodeName=n1,n2 CPUs=2 RealMemory=4000 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
"""A job that was queued again may start after `cred_expire` seconds (120 by default)."""
PREPARE = """
set -e
mount --bind "$1" /etc/slurm
mkdir -p /var/spool/slurm
mount -t tmpfs none /run
mount -t tmpfs none /var/spool/slurm
mount -t tmpfs none /sys/fs/cgroup
mkdir -p /run/munge /var/spool/slurm/ctld /var/spool/slurm/d
munged --force --key-file="$1/munge.key" --log-file=/run/munge/log --seed-file=/run/munge/seed --pid-file=/run/munge/pid
"$2"
"""
"""What a machine of a Slurm cluster has; $1: a folder with the configuration, $2: its daemon."""
TRAIN = {"workers": 2, "cpus": 1, "threads": 1, "row_tokens": 384, "max_restarts": 3}
CLUSTER = {
    "name": "slurm",
    "address": "http://127.0.0.1:8265",
    "driver": {"cpus": 1},
    "jobs": {"encode": {"workers": 2, "cpus": 1}, "answer": {"workers": 2, "cpus": 1}},
    "train": TRAIN,
    "train_stages": {"s2-pretrain": {**TRAIN, "loggers": ["slow:Slow"]}},
}
SLOW = """
import time

from unifork.training.loggers import Logger


class Slow(Logger):
    def add(self, step, numbers):
        time.sleep(2)
"""


def install() -> None:
    """Debian's packages, whose services are not started."""
    if all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in ("slurmctld", "slurmd", "sbatch", "munged")):
        return
    if not shutil.which("apt-get"):
        pytest.skip("no Slurm, and no apt-get to install it")
    policy = Path("/usr/sbin/policy-rc.d")
    if new := not policy.exists():
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in ("update", "-qq"), ("install", "-y", "-qq", "--no-install-recommends", *PACKAGES):
            subprocess.run(["apt-get", *words], env=quiet, check=True)
    finally:
        if new:
            policy.unlink()


@pytest.fixture
def login(network: Network) -> Machine:
    """The machine with slurmctld, when both nodes are idle."""
    install()
    folder = network.folder / "slurm"
    folder.mkdir()
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    login, *nodes = [network.add(name) for name in ("login", *NODES)]
    for machine, daemon in (login, "slurmctld"), *((node, "slurmd") for node in nodes):
        done = machine.run("sh", "-c", PREPARE, "prepare", folder, daemon)
        assert done.returncode == 0, done.stdout
    idle = ("sinfo", "--noheader", "--format=%D %T")
    assert wait_until(lambda: login.run(*idle).stdout == "2 idle\n", 60), login.run(*idle).stdout
    return login


def last_step(root: Path) -> int:
    pointer = root / "runs" / KEY / "latest"
    return int(pointer.read_text().removeprefix("step-")) if pointer.exists() else 0


def test_the_batch_script_as_it_is_is_told_to_save_queued_again_and_ends(login, network, tmp_path):
    root = check_out(network.disk, CLUSTER)
    (root / "slow.py").write_text(SLOW)
    (root / ".venv").symlink_to(BIN.parent)
    (root / "clusters/slurm.yaml").write_text(yaml.safe_dump(CLUSTER))
    script = root / "clusters/slurm.sbatch"
    script.write_text("".join(line for line in script.read_text().splitlines(True) if "--gpus-per-node" not in line))
    names = {name: value for name, value in environment(root).items() if name.startswith("GIT_")}
    nodes = {machine.name: machine for machine in network.machines if machine is not login}
    submitted = login.run("sbatch", "clusters/slurm.sbatch", env=names | {"PYTHONPATH": str(root)})
    assert submitted.returncode == 0, submitted.stdout
    job, started = submitted.stdout.split()[-1], time.monotonic()
    log = root / f"slurm-{job}.out"

    def state() -> str:
        """Such as RUNNING; empty when the job is over for a while."""
        return re.sub(
            r".*JobState=(\w+).*", r"\1", login.run("scontrol", "--oneliner", "show", "job", job).stdout.strip()
        )

    def comes(what: str, condition, seconds: float = 2400) -> None:
        assert wait_until(lambda: condition() or state() in ("FAILED", "CANCELLED", "TIMEOUT"), seconds), (
            log.read_text()
        )
        assert condition(), state() + log.read_text()
        print(f"{time.monotonic() - started:6.0f} s: {what}", flush=True)

    comes("running", lambda: state() == "RUNNING", 60)
    comes("step 5", lambda: last_step(root) >= 5)
    assert all(trained_on(node) for node in nodes.values())
    steps = (root / "runs" / KEY / "history.jsonl").read_text().count("\n")
    login.run("scancel", "--batch", "--signal=TERM", job).check_returncode()  # as five minutes before the end
    comes("saved and queued again", lambda: state() == "PENDING", 300)
    saved = last_step(root)
    assert saved >= steps
    comes("running again", lambda: state() == "RUNNING", 200)
    comes("a later checkpoint", lambda: last_step(root) > saved)
    assert f"{KEY}: continuing from step {saved} of 25" in log.read_text()

    login.run("scontrol", "requeue", job).check_returncode()  # as an administrator does
    comes("queued again, without a word before", lambda: state() == "PENDING", 300)
    comes("running again", lambda: state() == "RUNNING", 200)
    comes("report", (root / "reports/micro/index.html").exists)
    comes("no Ray on the head", lambda: not has_ray(nodes["n1"]), 300)
    comes("no Ray on the second node", lambda: not has_ray(nodes["n2"]), 300)
    comes("over", lambda: state() == "COMPLETED", 300)

    alone = copies(root, tmp_path / "alone", "data", "models/unifork-init", "models/unifork-s1-captions")
    train_in_one_place(alone, KEY, TRAIN)
    assert_same_weights(root, alone, KEY)

"""`make slurm-lab`: `clusters/slurm.sbatch` under a real Slurm, on two nodes and a login made of namespaces.

In: this checkout; Debian's Slurm and munge, which are installed when they are missing, without their services. Out: the
line of `micro`, ended in between as Slurm ends jobs, and printed: how long each part took.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from checkouts import check_out, environment
from machines import BIN, REPOSITORY, Machine, Network, has_ray, needs_machines, network, trained_on
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
TRAIN = {"workers": 3, "cpus": 1, "threads": 1, "row_tokens": 384, "max_restarts": 3}
CLUSTER = {
    "name": "slurm",
    "address": "http://127.0.0.1:8265",
    "driver": {"cpus": 1},  # with three workers all four CPUs are taken, so that both nodes train
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


@dataclass
class Job:
    """A batch script that was submitted in the experiment's root, without the line that asks for GPUs."""

    login: Machine
    started: float = field(default_factory=time.monotonic)
    number: str = ""

    def submit(self, **environment: str) -> None:
        script = self.login.root / "clusters/slurm.sbatch"
        lines = (REPOSITORY / "clusters/slurm.sbatch").read_text().splitlines(keepends=True)
        script.write_text("".join(line for line in lines if "--gpus-per-node" not in line))
        environment |= {"PYTHONPATH": str(self.login.root)}
        self.number = self.ask("sbatch", "clusters/slurm.sbatch", env=environment).split()[-1]

    def ask(self, *command: str, **options: dict[str, str]) -> str:
        done = self.login.run(*command, **options)
        assert done.returncode == 0, done.stdout
        return done.stdout

    @property
    def output(self) -> str:
        path = self.login.root / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        shown = self.ask("scontrol", "--oneliner", "show", "job", self.number)
        return re.sub(r".*JobState=(\w+).*", r"\1", shown.strip())

    def comes(self, what: str, condition: Callable[[], object], seconds: float = 2400) -> None:
        """Wait for something, while the job does not fail."""
        ended = ("FAILED", "CANCELLED", "TIMEOUT")
        assert wait_until(lambda: condition() or self.state in ended, seconds), self.output
        assert condition(), self.state + self.output
        print(f"{time.monotonic() - self.started:6.0f} s: {what}", flush=True)

    def becomes(self, state: str, what: str) -> None:
        self.comes(what, lambda: self.state == state, 400)

    def end_soon(self) -> None:
        """What Slurm does five minutes before the time is over."""
        self.ask("scancel", "--batch", "--signal=TERM", self.number)

    def requeue(self) -> None:
        """What an administrator does."""
        self.ask("scontrol", "requeue", self.number)


RAY = """#!/bin/bash
while [ "$1" != --address ]; do shift; done
address=${2%%:*}
while [ "$1" != -- ]; do shift; done
shift
if ip -brief address | grep -q " $address/"; then "$@"; else sleep 2; fi
"""
DVC = "#!/bin/bash\npython -m pipelines.train run\n"
STAGE = """
import signal, sys, time
from pathlib import Path


def save(*_):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(2)
    print("saved", flush=True)
    done.write_text(str(number + 1))
    sys.exit(143)


done = Path("done")
number = int(done.read_text()) if done.exists() else 0
signal.signal(signal.SIGTERM, save)
print("start", number, flush=True)
time.sleep(300 if number < 2 else 1)
print("end", flush=True)
"""


def test_the_script_has_the_stage_save_and_queues_again(login):
    """With stand-ins for `ray symmetric-run`, `dvc` and a stage."""
    root = login.root
    for folder in (".venv/bin", "pipelines", "clusters"):
        (root / folder).mkdir(parents=True)
    for name, text in ("ray", RAY), ("dvc", DVC):
        (root / ".venv/bin" / name).write_text(text)
        (root / ".venv/bin" / name).chmod(0o755)
    (root / "pipelines/train.py").write_text(STAGE)
    job = Job(login)
    job.submit()
    for number, end in enumerate((job.end_soon, job.requeue)):
        job.comes(f"start {number}", lambda number=number: f"start {number}" in job.output, 400)
        end()
        job.becomes("PENDING", f"queued again after {end.__name__}")
    job.becomes("COMPLETED", "end")
    words = [line for line in job.output.splitlines() if line.split()[0] in ("start", "saved", "end")]
    assert words == ["start 0", "saved", "start 1", "saved", "start 2", "end"]


def last_step(root: Path) -> int:
    pointer = root / "runs" / KEY / "latest"
    return int(pointer.read_text().removeprefix("step-")) if pointer.exists() else 0


def test_the_line_under_slurm(login, network, tmp_path):
    """`dvc repro` of `micro` on two nodes, ended twice while it trains."""
    from one_place import assert_same_weights, copies, train_in_one_place

    root = check_out(network.disk, CLUSTER)
    (root / "slow.py").write_text(SLOW)
    (root / ".venv").symlink_to(BIN.parent)
    (root / "clusters/slurm.yaml").write_text(yaml.safe_dump(CLUSTER))
    nodes = {machine.name: machine for machine in network.machines if machine is not login}
    job = Job(login)
    job.submit(**{name: value for name, value in environment(root).items() if name.startswith("GIT_")})
    job.comes("step 5", lambda: last_step(root) >= 5)
    assert all(trained_on(node) for node in nodes.values())
    steps = (root / "runs" / KEY / "history.jsonl").read_text().count("\n")
    job.end_soon()
    job.becomes("PENDING", "saved and queued again")
    saved = last_step(root)
    assert saved >= steps
    job.comes("a later checkpoint", lambda: last_step(root) > saved)
    assert f"{KEY}: continuing from step {saved} of 25" in job.output
    job.requeue()
    job.becomes("PENDING", "queued again")
    job.comes("report", (root / "reports/micro/index.html").exists)
    job.comes("no Ray on the head", lambda: not has_ray(nodes["n1"]), 300)
    job.comes("no Ray on the second node", lambda: not has_ray(nodes["n2"]), 300)
    job.becomes("COMPLETED", "end")

    alone = copies(root, tmp_path / "alone", "data", "models/unifork-init", "models/unifork-s1-captions")
    train_in_one_place(alone, KEY, TRAIN)
    assert_same_weights(root, alone, KEY)

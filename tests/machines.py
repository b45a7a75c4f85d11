"""Several machines on this one, made of namespaces: each has an address, a process table and a host name of its own.

In: a folder for what they share. Out: machines that run commands and can lose power. Each has its own `/dev/shm` and
`/tmp/ray`; where the shared disk lies it may have an empty one instead. Programs, users and the rest of the file system
are this machine's. Everything ends with the process that made them, whichever way that ends. Needs root, iproute2 and
util-linux.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray_heads import wait_until

REPOSITORY, BIN = Path(__file__).parent.parent, Path(sys.executable).parent
OWN = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net"]
SWITCH = "ip link add br0 type bridge && ip link set br0 up && echo ready && exec sleep infinity"
BOOT = """
set -e
hostname "$1"
mount -t tmpfs none /dev/shm
mkdir -p /tmp/ray
mount -t tmpfs none /tmp/ray
mount --bind "$2" /etc/hosts
test -z "$3" || mount -t tmpfs none "$3"
ip link set lo up
echo ready
while :; do sleep 3600 & wait $!; done
"""
"""Process 1 of a machine: bash, since it waits for orphans."""


@dataclass
class Machine:
    """A running machine."""

    name: str
    address: str
    switch: int
    holder: "subprocess.Popen[str]"
    """It ends with process 1 of the machine."""
    environment: dict[str, str]
    root: Path
    """Where the disk is, the experiment's root."""

    @property
    def first(self) -> int:
        """Process 1, as the outside counts."""
        return int(psutil.Process(self.holder.pid).children()[0].pid)

    def start(self, *command: str | Path, **options: Any) -> "subprocess.Popen[str]":
        """Start a command in a process group of its own, at the disk; by default without output."""
        enter = [
            "nsenter",
            f"--target={self.first}",
            "--net",
            "--pid",
            "--mount",
            "--uts",
            "--ipc",
            f"--wdns={self.root}",
        ]
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.STDOUT, **options}
        environment = self.environment | options.pop("env", {})
        return subprocess.Popen([*enter, *command], env=environment, start_new_session=True, text=True, **options)

    def run(self, *command: str | Path, seconds: float = 60, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end: exit code, output and errors together. TimeoutExpired ends it."""
        process = self.start(*command, stdout=subprocess.PIPE, **options)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            stop(process, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, process.returncode, output)

    def cut(self) -> None:
        """Power cut: nothing more is sent, not even that connections end, and every process is gone."""
        on_switch(self.switch, "ip", "link", "delete", "dev", self.name)
        os.kill(self.first, signal.SIGKILL)
        self.holder.wait()


@dataclass
class Network:
    """Machines that reach each other."""

    folder: Path
    """Of this machine: `disk` is what they share, `home` everybody's home."""
    switch: "subprocess.Popen[str]" = field(init=False)
    machines: list[Machine] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("disk", "home/.ray"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "home/.ray/auth_token").write_text(secrets.token_hex(32))
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n")
        self.switch = held([*OWN, "sh", "-c", SWITCH])

    @property
    def disk(self) -> Path:
        """The shared disk, as this machine sees it."""
        return self.folder / "disk"

    def add(self, name: str, *, disk: bool = True) -> Machine:
        """A new machine, with the shared disk or an empty one. A name that was there before gets a new address."""
        address = f"10.77.0.{len(self.machines) + 2}"
        hosts = self.folder / "hosts"  # written in place: machines have mounted this file
        others = [line for line in hosts.read_text().splitlines() if line.split()[1] != name]
        hosts.write_text("\n".join([*others, f"{address} {name}", ""]))
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "UNIFORK_"))}
        environment |= {"HOME": str(self.folder / "home"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "PYTHONPATH": str(REPOSITORY)}
        environment |= {"RAY_worker_niceness": "0"}  # Ray's 15 is starved on a machine that others use, too
        parts = ["--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "--ipc"]
        holder = held([*OWN, *parts, "bash", "-c", BOOT, name, name, hosts, "" if disk else self.disk])
        machine = Machine(name, address, self.switch.pid, holder, environment, self.disk)
        self.machines.append(machine)
        pair = ["ip", "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", str(machine.first)]
        on_switch(self.switch.pid, *pair)
        on_switch(self.switch.pid, "ip", "link", "set", "dev", name, "master", "br0", "up")
        machine.run("ip", "addr", "add", f"{address}/24", "dev", "eth0").check_returncode()
        machine.run("ip", "link", "set", "eth0", "up").check_returncode()
        return machine

    def close(self) -> None:
        """Switch everything off."""
        for holder in [machine.holder for machine in self.machines] + [self.switch]:
            if holder.poll() is None:
                for child in psutil.Process(holder.pid).children():
                    child.kill()
                holder.kill()
                holder.wait()


def held(command: Sequence[str | Path]) -> "subprocess.Popen[str]":
    """A process of this machine that holds namespaces; returns when they are ready."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    if (line := process.stdout.readline()) != "ready\n":
        process.kill()
        raise OSError(line.strip() or "no answer")
    return process


def on_switch(switch: int, *command: str) -> None:
    subprocess.run(["nsenter", f"--target={switch}", "--net", *command], check=True, capture_output=True)


def stop(process: "subprocess.Popen[str]", number: int = signal.SIGTERM) -> None:
    """Send a signal to a command of a machine and to what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


@cache
def why_none() -> str:
    """Why no machines can be made here; empty where they can."""
    if os.geteuid():
        return "not root"
    if missing := [name for name in ("ip", "setpriv", "unshare", "nsenter", "bash") if not shutil.which(name)]:
        return f"no {', '.join(missing)}"
    try:
        holder = held([*OWN, "--mount", "sh", "-c", f"mount -t tmpfs none /mnt && {SWITCH}"])
    except OSError as error:
        return str(error)
    holder.kill()
    holder.wait()
    return ""


needs_machines = pytest.mark.skipif(bool(why_none()), reason=f"machines need root and namespaces: {why_none()}")


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    """A switch without machines, an empty disk, and a home with a token for Ray."""
    found = Network(tmp_path / "network")
    try:
        yield found
    finally:
        found.close()


# ------------------------------------------------------------------------------------------ Ray


def join(machine: Machine, head: Machine, cpus: int, **environment: str) -> None:
    """Start Ray on a machine, as the head or as a node of another's."""
    place = (
        ["--head", "--dashboard-host=0.0.0.0", "--no-monitor"]
        if machine is head
        else [f"--address={head.address}:6379"]
    )
    sizes = [f"--num-cpus={cpus}", "--num-gpus=0", "--object-store-memory=80000000"]
    command = ["ray", "start", *place, *sizes]
    for _ in range(3):  # Ray gives itself 30 seconds, which is not enough on a busy machine
        done = machine.run(*command, env=environment, seconds=900)
        if done.returncode == 0:
            break
        machine.run("ray", "stop", "--force", seconds=300)
    assert done.returncode == 0, done.stdout
    port = ("bash", "-c", f"exec 3<>/dev/tcp/{head.address}/8265")  # of the job server
    assert wait_until(lambda: machine.run(*port).returncode == 0, 300)


def has_ray(machine: Machine) -> bool:
    """Whether a Ray runs on a machine."""
    return machine.run("pgrep", "-x", "raylet").returncode == 0


def trained_on(machine: Machine) -> str:
    """Names of the logs that workers of Ray Train left on a machine."""
    return machine.run("sh", "-c", "ls /tmp/ray/session_latest/logs/train | grep worker").stdout

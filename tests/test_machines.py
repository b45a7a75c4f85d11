"""The machines of the tests of clusters are apart, lose power without a word, and leave nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest
from machines import needs_machines, network
from ray_heads import wait_until

__all__ = ["network"]

pytestmark = [pytest.mark.slow, needs_machines]

SERVER = "import socket; server = socket.create_server(('', 8000)); peer = server.accept()[0]; peer.recv(1)"
CLIENT = """
import socket
peer = socket.create_connection(("b", 8000))
print("connected", flush=True)
peer.settimeout(3)
try:
    print("heard", peer.recv(1))
except TimeoutError:
    print("silence")
"""
HOLDS_MACHINES = """
import sys, time
from pathlib import Path
from machines import Network
network = Network(Path(sys.argv[1]))
print(network.add("a").first, flush=True)
time.sleep(600)
"""


def test_machines_share_the_disk_and_nothing_else(network):
    a, b, c = network.add("a"), network.add("b"), network.add("c", disk=False)
    (network.disk / "file").write_text("shared")
    assert [machine.run("cat", "file").stdout for machine in (a, b)] == ["shared", "shared"]
    assert c.run("ls").stdout == ""
    assert a.run("hostname", "--ip-address").stdout.split() == [a.address]
    assert a.run("getent", "hosts", "b").stdout.split() == [b.address, "b"]
    for folder in ("/dev/shm", "/tmp/ray"):
        assert a.run("touch", f"{folder}/of-a").returncode == 0
        assert b.run("ls", folder).stdout == ""
    sleeper = a.start("sleep", "77")
    assert wait_until(lambda: a.run("pgrep", "-fx", "sleep 77").returncode == 0, 30)
    assert b.run("pgrep", "-fx", "sleep 77").returncode == 1
    network.close()
    assert sleeper.wait(30) != 0


def test_a_machine_without_power_closes_no_connection_and_a_new_one_takes_its_name(network):
    a, b = network.add("a"), network.add("b")
    server = b.start("python", "-c", SERVER)
    assert wait_until(lambda: ":8000" in b.run("ss", "--listening", "--numeric").stdout, 60)
    client = a.start("python", "-c", CLIENT, stdout=subprocess.PIPE)
    assert client.stdout.readline() == "connected\n"
    b.cut()
    assert client.stdout.readline() == "silence\n"
    assert server.wait(30) != 0
    new = network.add("b")
    assert new.address != b.address
    assert a.run("getent", "hosts", "b").stdout.split() == [new.address, "b"]


def test_nothing_is_left_of_a_test_that_was_killed(tmp_path):
    command = [sys.executable, "-c", HOLDS_MACHINES, tmp_path / "network"]
    holder = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    first = Path("/proc", holder.stdout.readline().strip())
    assert first.exists()
    holder.kill()
    holder.wait()
    assert wait_until(lambda: not first.exists(), 30)

"""A real Ray head with a job server, in token mode, with a home of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


@dataclass
class Head:
    """A running head node in token mode."""

    address: str
    environment: dict[str, str]
    joins: str
    """Where other nodes join."""

    def get(self, path: str) -> dict[str, object]:
        """What the job server says; HTTPError where it refuses."""
        token = (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text()
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as page:
            answer: dict[str, object] = json.load(page)
        return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_until(condition: object, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.2)
    return bool(done)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """`ray start --head` in token mode with a home and a session folder of its own."""
    home = Path(tempfile.mkdtemp(prefix="unifork-ray-"))  # short: Ray's sockets lie below, their paths have a limit
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UNIFORK_"))}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_worker_niceness": "0"}  # Ray's 15 would wait for the tests of the other process
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    port, joins = free_port(), free_port()
    server = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--object-store-memory=80000000",
         f"--port={joins}", f"--dashboard-port={port}", f"--dashboard-agent-listen-port={free_port()}",
         f"--ray-client-server-port={free_port()}", f"--temp-dir={home / 'ray'}"],
        env=environment, cwd=home, start_new_session=True, stdout=(home / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    head = Head(f"http://127.0.0.1:{port}", environment, f"127.0.0.1:{joins}")

    def ready() -> bool:
        try:
            return "ray_version" in head.get("/api/version")
        except OSError:
            return False

    try:
        assert wait_until(ready, 60), (home / "log").read_text()
        yield head
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # a polite end takes up to 30 seconds
        server.wait()
        shutil.rmtree(home, ignore_errors=True)

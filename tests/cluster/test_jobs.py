"""A stage that submits itself, against a pretended job server."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray_heads import free_port
from stage_programs import Start
from tiny import write_experiment

from unifork import jobs
from unifork.config import Cluster
from unifork.errors import UniForkError
from unifork.jobs import follow, wait_for_outputs

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]

# ----------------------------------------------------------------------------------------- locally


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["work", "out.txt"], 0, ""),
        (["note", "out.txt"], 0, ""),
        (["fail"], 7, ""),
        (["mistake"], 2, "error: shard 3: damaged\n"),
        (["bug"], 1, "ZeroDivisionError: internal mistake\n"),
    ],
    ids=["work", "note", "fail", "mistake", "bug"],
)
def test_exit_codes_of_a_local_stage(start: Start, arguments: list[str], code: int, message: str) -> None:
    process = start("local.yaml", *arguments)
    _, errors = process.communicate()
    assert process.returncode == code
    assert errors.endswith(message)
    assert ("Traceback" in errors) == (code == 1)


# ------------------------------------------------------------------------ a pretended job server


class Door(BaseHTTPRequestHandler):
    """Answers as Ray's job server does: 401 without a token, 403 with a wrong one."""

    token: str | None = None

    def do_GET(self) -> None:
        given = self.headers.get("Authorization")
        status = 200 if self.token is None or given == f"Bearer {self.token}" else 403 if given else 401
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.60.0"}).encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Address of a pretended job server; no token is known."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


CONNECT = """
import sys
from unifork.config import Cluster
from unifork.errors import UniForkError
from unifork.jobs import connect
try:
    more = {name: True for name in sys.argv[2:]}
    print(connect(Cluster(name="far", address=sys.argv[1], **more))._headers)
except UniForkError as error:
    print(f"{type(error).__name__}: {error}")
"""


def connecting(door: str, home: Path, *keys: str, **environment: str) -> str:
    """What a program says that connects to a job server; Ray reads modes and tokens once in a process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**inherited, "HOME": str(home), **environment}
    command = [sys.executable, "-c", CONNECT, door, *keys]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout


def test_the_token_that_ray_finds_is_sent(door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert connecting(door, tmp_path) == "{}\n"
    monkeypatch.setattr(Door, "token", "right")
    assert "'Bearer right'" in connecting(door, tmp_path, RAY_AUTH_TOKEN="right", RAY_AUTH_MODE="disabled")
    wrong = connecting(door, tmp_path, RAY_AUTH_TOKEN="wrong")
    assert wrong.startswith(f"ConfigError: cluster 'far' ({door}): Authentication failed")
    none = connecting(door, tmp_path)
    assert none.startswith(f"ConfigError: cluster 'far' ({door}): Authentication required")
    assert "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH" in none
    assert none.count("\n") == wrong.count("\n") == 1
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("right\n")
    assert "'Bearer right'" in connecting(door, tmp_path)


def test_a_server_elsewhere_must_demand_a_token(door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert connecting(door, tmp_path) == "{}\n"  # loopback: only this machine reaches it
    elsewhere = door.replace("127.0.0.1", "0.0.0.0")  # no loopback address, though this machine answers
    open_to_all = connecting(elsewhere, tmp_path)
    assert open_to_all.startswith(f"ConfigError: cluster 'far' ({elsewhere}): demands no token, ")
    assert "`allow_unprotected: true` in clusters/local.yaml\n" in open_to_all
    assert open_to_all.count("\n") == 1
    assert connecting(elsewhere, tmp_path, RAY_AUTH_TOKEN="idle") == open_to_all  # a token that nobody looks at
    assert connecting(elsewhere, tmp_path, "allow_unprotected") == "{}\n"
    monkeypatch.setattr(Door, "token", "right")
    assert "'Bearer right'" in connecting(elsewhere, tmp_path, RAY_AUTH_TOKEN="right")


def test_dead_server_is_one_line(start: Start, experiment: Path) -> None:
    (experiment / "dead.yaml").write_text(f"name: dead\naddress: http://127.0.0.1:{free_port()}\n")
    process = start("dead.yaml", "work", "out.txt")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert errors.startswith("error: cluster 'dead' (http://127.0.0.1:")
    assert errors.count("\n") == 1
    assert "no Ray job server answers: Failed to connect to Ray" in errors


def test_a_server_of_another_kind(door: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Door, "do_GET", lambda self: self.send_error(500))
    assert "no Ray job server answers: 500 Server Error" in connecting(door, tmp_path)


class Flaky:
    """A job client whose connection breaks once in the middle of the log."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.connections += 1
        if self.connections == 1:
            yield "one\ntw"
            raise RuntimeError("WebSocket connection closed unexpectedly")
        for text in ("one\n", "two\nth", "ree\n"):
            yield text

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=SimpleNamespace(is_terminal=lambda: self.connections > 1))


def test_a_broken_log_is_taken_up_where_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(follow(Flaky(), "job"))
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


class Lost(Flaky):
    """A job client whose server lost power: its connection is not closed, and nobody answers."""

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.Event().wait()

    def get_job_info(self, job: str) -> SimpleNamespace:
        raise ConnectionError("no route to host")


def test_a_server_that_lost_power_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SILENT_SECONDS", 0.1)
    with pytest.raises(UniForkError, match=r"the job server went away \(no route to host\)\. Job job may still run"):
        asyncio.run(follow(Lost(), "job", patience_seconds=0))
    assert capsys.readouterr().out == "one\n"


def test_a_stage_that_trains_in_the_program_itself_asks_for_what_its_own_entry_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_experiment(tmp_path)
    monkeypatch.chdir(tmp_path)
    stages = {"s1-captions": {"workers": 2, "cpus": 8}}
    cluster = Cluster.model_validate(
        {"name": "far", "driver": {"cpus": 0.5}, "train": {"workers": 0, "cpus": 3}, "train_stages": stages}
    )
    sent: list[dict[str, object]] = []
    client = SimpleNamespace(submit_job=lambda **keys: sent.append(keys))
    for run in ("unifork-s3", "unifork-s1-captions"):
        jobs._start_job(client, cluster, "pipelines.train", [run])
    assert [keys["entrypoint_num_cpus"] for keys in sent] == [3, 0.5]
    with pytest.raises(UniForkError, match="unknown run 'x'"):
        jobs._start_job(client, cluster, "pipelines.train", ["x"])


def test_outputs_that_cannot_be_seen_are_named(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    wait_for_outputs([tmp_path / "there"], Cluster(name="far"))
    with pytest.raises(UniForkError, match=r"cluster 'far': the job succeeded, but .*missing cannot be seen here"):
        wait_for_outputs([tmp_path / "there", tmp_path / "missing"], Cluster(name="far"), patience_seconds=0)

"""SIGKILL at random moments, again and again, of the real programs: the end is always the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import REPOSITORY, build

KILLS = 12
CLUSTER = "name: soak\ntrain: {workers: 0, threads: 1, row_tokens: 384}\n"
CHANGES = {
    "datasets": {"shapes": {"rows": 1200, "shard_rows": 40}},
    "stages": {"s1-captions": {"tracks": {"joint": {"steps": 150, "batch_documents": 16}}, "checkpoint_every": 5}},
}

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = build(tmp_path_factory.mktemp("soak"), CHANGES)
    (folder / "cluster.yaml").write_text(CLUSTER)
    return folder


def start(root: Path, program: str, name: str) -> subprocess.Popen:
    environment = os.environ | {"UNIFORK_CLUSTER": "cluster.yaml", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", f"pipelines.{program}", name]
    return subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)


def kill_at_random(root: Path, program: str, name: str, shortest: float, longest: float) -> int:
    """Run a program to its end, killing it at random moments on the way; how often it was killed."""
    random.seed(name)
    for kills in range(KILLS):
        process = start(root, program, name)
        try:
            process.wait(timeout=random.uniform(shortest, longest))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            continue
        assert process.returncode == 0
        return kills
    assert start(root, program, name).wait(timeout=600) == 0
    return KILLS


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def timed(root: Path, program: str, name: str) -> float:
    started = time.monotonic()
    assert start(root, program, name).wait(timeout=600) == 0
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("program", "name", "output"),
    [
        ("download", "shapes", "data/raw/shapes"),
        ("filter", "shapes", "data/filtered/shapes"),
        ("encode", "shapes", "data/codes/shapes"),
        ("train", "unifork-s1-captions", "models/unifork-s1-captions"),
    ],
)
def test_random_kills_change_nothing(root, program, name, output):
    shutil.rmtree(root / output, ignore_errors=True)
    seconds = timed(root, program, name)
    expected = contents(root / output)
    shutil.rmtree(root / output)
    shutil.rmtree(root / "runs", ignore_errors=True)
    kills = kill_at_random(root, program, name, 0.3 * seconds, 1.1 * seconds)
    assert kills >= 1
    assert contents(root / output) == expected

"""SIGKILL at every named point of every job, and at random moments of a shard: the end is always the same bytes."""

import json
import random
import re
import shutil
import time
from pathlib import Path

import psutil
import pytest
from crashes import POINTS, killed_after, run, shard
from tiny import REPOSITORY, ROWS, SHARD_ROWS, bytes_of, copy_of, run_here, start, write_experiment

from unifork.config import load_card, parse
from unifork.filters.measure import Measure, measure_job
from unifork.filters.worker import Filter, filter_job
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX, Shard, read_manifest
from unifork.sources import Materialize, download_job

pytestmark = pytest.mark.slow

STAGES = {
    "download": (("pipelines.download", "shapes"), "data/raw/shapes"),
    "measure": (("pipelines.filter", "shapes"), "data/measured/shapes"),
    "filter": (("pipelines.filter", "shapes"), "data/filtered/shapes"),
    "encode": (("pipelines.encode", "shapes"), "data/codes/shapes"),
    "prepare": (("pipelines.prepare", "shapes-conversations-answer"), "data/prepared/shapes-conversations-answer"),
    "publish": (("unifork.cli", "publish", "shapes", "--to", "out"), "out"),
}
OF_PUBLISHING = ("before the page", "before the checksums")
SLOW = {("encode", point) for point in POINTS} - {
    ("encode", "in the middle of the shard"),
    ("encode", "before the record"),
}
"""Every start of these loads a network."""
CASES = [
    pytest.param(job, point, marks=pytest.mark.soak if (job, point) in SLOW else ())
    for job in STAGES
    for point in POINTS
    if (job == "publish" or point not in OF_PUBLISHING) and (job, point) != ("prepare", "in the middle of the shard")
]
WHOLE = ("before the manifest", "after the manifest", "among the records", *OF_PUBLISHING)
FINISHED = {"after the record": 2} | dict.fromkeys(WHOLE, 3)
"""Shards of 3 in the first folder of a stage that the next run keeps, by where the last was killed; elsewhere 1."""
KILLS = 50
"""Of a shard of each of two stages."""


@pytest.fixture(scope="module")
def whole(tiny_root, tmp_path_factory) -> Path:
    """A root with the output of every job, of programs that nobody disturbed."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("whole"))
    for words, output in STAGES.values():
        shutil.rmtree(root / output, ignore_errors=True)
        run(root, words)
    return root


@pytest.mark.parametrize(("job", "point"), CASES)
def test_a_job_killed_at_a_point_keeps_what_is_recorded_and_ends_with_the_same_bytes(whole, tmp_path, job, point):
    words, output = STAGES[job]
    root = copy_of(whole, tmp_path / "root")
    shutil.rmtree(root / output)
    run(root, words, point)
    assert bytes_of(root / output) != bytes_of(whole / output)
    lines = run(root, words)
    kept = re.findall(rf"{output}.*: (\d)/3 shards", lines)
    assert kept[:1] == [str(FINISHED.get(point, 1))], lines
    assert bytes_of(root / output) == bytes_of(whole / output)


@pytest.mark.parametrize("name", ["raw", "measured", "filtered"])
def test_a_shard_killed_at_random_is_whole_or_not_there(whole, tmp_path, name):
    card, expected = load_card("shapes", whole / "datasets"), whole / f"data/{name}/shapes"
    job, worker = {
        "raw": (download_job(card, ROWS, SHARD_ROWS, 0, tmp_path), Materialize),
        "measured": (measure_job(card, whole / "data/raw/shapes", tmp_path), Measure),
        "filtered": (filter_job(card, whole / "data/measured/shapes", tmp_path), Filter),
    }[name]
    task = job.missing()[0]
    path = Path(task.output)
    record = path.with_name(path.name + RECORD_SUFFIX)
    for _ in range(2):  # the first imports
        started = time.monotonic()
        shard(worker, card, task)
        seconds = time.monotonic() - started
    random.seed(name)
    kills = 0
    while kills < KILLS:
        for left in tmp_path.iterdir():
            left.unlink()
        kills += killed_after(random.uniform(0, seconds), shard, worker, card, task)
        if path.exists():
            assert path.read_bytes() == (expected / path.name).read_bytes()
        if record.exists():
            assert path.exists()
            assert parse(Shard, json.loads(record.read_text()), "record") == read_manifest(expected).shards[0]
    run_here([job], worker(card))
    assert bytes_of(tmp_path) == bytes_of(expected)


# ------------------------------------------------------------------------------------------ on actors


@pytest.fixture
def many(tmp_path) -> tuple[Path, dict[str, bytes]]:
    """A root whose download takes twelve shards and two actors; what it makes in one process."""
    rows = {"rows": 96, "shard_rows": 8}
    alone, root = tmp_path / "alone", tmp_path / "root"
    for folder in (alone, root):
        write_experiment(folder, {"datasets": {"shapes": rows}})
    (root / "actors.yaml").write_text("name: actors\ncpus: 2\njobs: {download: {workers: 2, cpus: 0.5}}\n")
    run(alone, STAGES["download"][0])
    return root, bytes_of(alone / "data")


DIES = """
import sys
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    sys.path.insert(0, {tests!r})
    import crashes
    crashes.arm("before the rename", {mark!r})
"""


@pytest.mark.soak
def test_an_actor_that_dies_is_replaced_and_the_end_is_the_same_bytes(many, tmp_path):
    root, expected = many
    mark = tmp_path / "mark"
    (tmp_path / "sitecustomize.py").write_text(DIES.format(tests=str(REPOSITORY / "tests"), mark=str(mark)))
    program = start(root, *STAGES["download"][0], cluster="actors.yaml", path=tmp_path)
    output = program.communicate(timeout=120)
    assert program.returncode == 0, output
    assert mark.exists()
    assert bytes_of(root / "data") == expected


@pytest.mark.cluster
def test_a_killed_driver_takes_its_actors_along_and_the_end_is_the_same_bytes(many):
    root, expected = many
    program = start(root, *STAGES["download"][0], cluster="actors.yaml")
    while not list(root.glob(f"data/raw/shapes/*{RECORD_SUFFIX}")):
        assert program.poll() is None, program.communicate()
        time.sleep(0.01)
    family = psutil.Process(program.pid).children(recursive=True)
    family = [child for child in family if not child.name().endswith("Agent")]  # Ray's own stay for a minute or more
    program.kill()
    program.communicate()
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert not (root / "data/raw/shapes" / MANIFEST).exists()
    assert "kept from before" in run(root, STAGES["download"][0])
    assert bytes_of(root / "data") == expected

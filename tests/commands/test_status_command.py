"""`unifork status` of jobs over shards, seen while they run and after they ended, well or not."""

import json
import os
import shutil
import signal
import time

import pytest
from tiny import copy_of, start
from typer.testing import CliRunner

from unifork.cli import app
from unifork.cluster import run_jobs
from unifork.config import load_card
from unifork.errors import DataError, MachineError
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.layout import Layout
from unifork.processes import exclusive, lock_path
from unifork.shards import job as shard_jobs
from unifork.shards.job import KeptRows
from unifork.sources import Materialize, download_job

LAYOUT = Layout()


@pytest.fixture
def root(tiny_root, tmp_path, monkeypatch):
    root = copy_of(tiny_root, tmp_path / "root")
    monkeypatch.chdir(root)
    monkeypatch.setattr(shard_jobs, "NOTED_SECONDS", 0.0)
    return root


def rows():
    return {row["name"]: row for row in json.loads(CliRunner().invoke(app, ["status", "--json"]).output)}


def download(worker=Materialize):
    card = load_card("shapes")
    with exclusive(folder := LAYOUT.raw("shapes")):
        run_jobs([download_job(card, 96, 32, 0, folder)], worker, card)


def test_every_job_of_a_finished_experiment_and_what_waits(root):
    shutil.rmtree(root / "data/filtered")
    found = rows()
    state = {name: (row["stage"], row["state"]) for name, row in found.items()}
    assert state | {
        "raw/shapes": ("download", "finished"), "measured/shapes": ("filter", "finished"),
        "filtered/shapes": ("filter", "waiting"), "codes/shapes/crop": ("encode", "finished"),
        "codes/shapes/pad": ("encode", "finished"), "prepared/shapes-conversations-answer": ("prepare", "finished"),
        "unifork-s2-pretrain": ("train", "waiting"),
    } == state  # fmt: skip
    assert "codes/shapes" not in found
    assert (found["raw/shapes"]["done"], found["raw/shapes"]["total"], found["raw/shapes"]["rows"]) == (3, 3, 96)
    text = CliRunner().invoke(app, ["status"]).output
    assert text.splitlines()[0].split() == ["stage", "job", "state", "shards", "rows", "rate", "left", "seen"]
    assert "download  raw/shapes" in text


def test_a_job_is_seen_while_it_runs_and_leaves_nothing_beside_its_manifest(root):
    shutil.rmtree(root / "data/raw/shapes")
    assert rows()["raw/shapes"]["state"] == "waiting"
    seen = []

    class Worker(Materialize):
        def __call__(self, task):
            seen.append(rows()["raw/shapes"])
            return super().__call__(task)

    download(Worker)
    assert [(row["state"], row["done"], row["total"], row["rows"]) for row in seen] == [
        ("running", 0, 3, 0), ("running", 1, 3, 32), ("running", 2, 3, 64),
    ]  # fmt: skip
    assert seen[2]["rows_per_second"] > 0
    assert seen[2]["left"] == pytest.approx(32 / seen[2]["rows_per_second"])
    assert sorted(path.name for path in (root / "data/raw").iterdir()) == ["shapes"]
    assert rows()["raw/shapes"]["state"] == "finished"


def test_two_views_under_a_lock_are_seen_apart(root):
    shutil.rmtree(root / "data/codes/shapes")
    card, tokenizer, seen = load_card("shapes"), LAYOUT.image_tokenizer.absolute(), []

    class Worker:
        def __init__(self):
            self.encode = Encode(card, tokenizer, "cpu")

        def __call__(self, task):
            seen.append({name: (row["state"], row["done"]) for name, row in rows().items() if "codes" in name})
            return self.encode(task)

    kept = KeptRows(LAYOUT, "shapes")
    with exclusive(LAYOUT.codes / "shapes"):
        jobs = [
            encode_job(card, task, kept, LAYOUT.codes / "shapes" / use.view, tokenizer)
            for task, use in card.tasks.items()
        ]
        run_jobs(jobs, Worker)
    views = [f"codes/shapes/{use.view}" for use in card.tasks.values()]
    assert seen[4] == {views[0]: ("running", 3), views[1]: ("running", 1)}
    assert not list((root / "data").rglob("*progress*"))


@pytest.mark.parametrize("error", [MachineError("no network"), DataError("one shard")])
def test_why_a_job_stopped_is_shown_until_it_goes_on(root, error):
    shutil.rmtree(root / "data/raw/shapes")
    calls = []

    class Worker(Materialize):
        def __call__(self, task):
            calls.append(task)
            if len(calls) == 2:
                raise error
            return super().__call__(task)

    with pytest.raises(type(error)):
        download(Worker)
    row = rows()["raw/shapes"]
    assert (row["state"], row["total"]) == ("stopped", 3)
    assert str(error) in row["reason"]
    assert f"raw/shapes: {row['reason']}" in CliRunner().invoke(app, ["status"]).output
    download()
    assert rows()["raw/shapes"]["state"] == "finished"


@pytest.mark.slow  # starts whole programs
def test_a_killed_program_is_stopped_and_what_it_had_done_stays_known(root):
    shutil.rmtree(root / "data/raw/shapes")
    experiment = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(experiment.replace("rows: 96", "rows: 9600"))
    program = start(root, "pipelines.download", "shapes")
    while program.poll() is None and not rows()["raw/shapes"]["done"]:
        time.sleep(0.05)
    assert rows()["raw/shapes"]["state"] == "running"
    os.kill(program.pid, signal.SIGKILL)
    program.wait()
    assert lock_path(root / "data/raw/shapes").exists()
    row = rows()["raw/shapes"]
    assert (row["state"], row["total"]) == ("stopped", 300)
    assert row["done"] > 0
    assert row["reason"].startswith("without a word")

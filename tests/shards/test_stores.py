"""Shards in a store, a real S3 server: the same content as on disk, exactly once, mended alone, read by all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import REPOSITORY, ROWS, SHARD_ROWS, copy_of, objects, prepare, run_here, write_experiment
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import Cluster, Experiment, TrainResources, load, load_card, parse
from unifork.documents.text_tokenizer import texts_of
from unifork.errors import ConfigError, DataError
from unifork.filters.measure import Measure, measure_job
from unifork.filters.takedown import takedown
from unifork.filters.worker import Filter, filter_job
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.layout import Layout
from unifork.publish.card import Offer
from unifork.publish.publication import build
from unifork.report.images import rejected_rows
from unifork.shards.job import RECORD_SUFFIX, KeptRows, read_table
from unifork.shards.manifest import FETCHED, MANIFEST, manifest_sha256, read_manifest
from unifork.shards.task import QUARANTINE, quarantine_of
from unifork.sources import Materialize, download_job
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

CARD = load_card("shapes", REPOSITORY / "datasets").model_copy(update={"held_out": 0.0})  # as the tiny experiment's
FOLDERS = ("raw/shapes", "measured/shapes", "filtered/shapes", "codes/shapes/crop", "codes/shapes/pad")
SHARDS = ROWS // SHARD_ROWS


def stages(root: Path, store: str | None) -> list[str]:
    """Download, filter and encode as `tiny.build` does, the shards in a store; those that had to be made."""
    outputs = []

    def run(*some, worker):
        placed = [replace(job, store=store and f"{store}/{job.folder.relative_to(root / 'data')}") for job in some]
        noted = lambda task: outputs.append(str(Path(task.output).relative_to(root / "data"))) or worker(task)  # noqa: E731
        run_here(placed, noted)

    raw, measured, filtered, codes = (
        root / "data" / name / "shapes" for name in ("raw", "measured", "filtered", "codes")
    )
    tokenizer = root / "tokenizers/image"
    run(download_job(CARD, ROWS, SHARD_ROWS, 0, raw), worker=Materialize(CARD))
    run(measure_job(CARD, raw, measured), worker=Measure(CARD))
    run(filter_job(CARD, measured, filtered), worker=Filter(CARD))
    kept = KeptRows(Layout(root), "shapes")
    views = [encode_job(CARD, task, kept, codes / use.view, tokenizer) for task, use in CARD.tasks.items()]
    run(*views, worker=Encode(CARD, tokenizer, "cpu"))
    return outputs


def put(store: str, name: str, body: bytes | None) -> None:
    bucket, _, prefix = store.removeprefix("s3://").partition("/")
    client, key = boto3.client("s3"), f"{prefix}/{name}"
    client.delete_object(Bucket=bucket, Key=key) if body is None else client.put_object(
        Bucket=bucket, Key=key, Body=body
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def store(bucket) -> str:
    return f"{bucket}/exp"


@pytest.fixture
def root(tiny_root, tmp_path, monkeypatch) -> Path:
    """An experiment with tokenizers and a fresh model, and no data yet."""
    for name in ("tokenizers", "models", "datasets"):
        copy_of(tiny_root / name, tmp_path / name)
    shutil.copy(tiny_root / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_store_holds_the_bytes_that_a_disk_would_and_every_reader_finds_them(tiny_root, root, store):
    assert len(stages(root, store)) == 5 * SHARDS
    local = files(tiny_root / "data")
    assert objects(store) == {
        name: data for name, data in local.items() if name.startswith(FOLDERS) and name.endswith(".parquet")
    }
    assert set(files(root / "data")) == {f"{folder}/{MANIFEST}" for folder in FOLDERS}
    for folder in FOLDERS:
        here_, there = tiny_root / "data" / folder, root / "data" / folder
        away = read_manifest(there)
        assert [shard.uri for shard in away.shards] == [f"{store}/{folder}/{shard.path}" for shard in away.shards]
        assert away.content() == read_manifest(here_).content() == json.loads((here_ / MANIFEST).read_text())
        assert manifest_sha256(there) == manifest_sha256(here_)
    before = files(root / "data")
    assert stages(root, store) == []
    assert stages(root, None) == []  # a finished shard stays where it is
    assert files(root / "data") == before
    disk, away = copy_of(tiny_root, root / "disk"), objects(store)
    assert stages(disk, store) == []  # what lies on a disk stays there, too, and what others have in the store
    assert (files(disk / "data"), objects(store)) == (local, away)

    texts = [list(texts_of(KeptRows(Layout(place), "shapes", images=False), CARD)) for place in (root, tiny_root)]
    assert texts[0] == texts[1]
    views = build("shapes", Layout(root), root / "out", None, Offer("unifork"))
    build("shapes", Layout(tiny_root), root / "as-local", None, Offer("unifork"))
    assert files(root / "out") == files(root / "as-local")
    assert [view.manifest.rows for view in views] == [ROWS, ROWS]

    experiment = load(Experiment, root / "params.yaml")
    key, stage = "unifork-s2-pretrain", experiment.stages["s2-pretrain"]
    tracks = {n: t.model_copy(update={"steps": 2, "batch_documents": 8}) for n, t in stage.tracks.items()}
    change = {"runs": {key: experiment.runs[key].model_copy(update={"after": "models/unifork-init"})}}
    change["stages"] = {"s2-pretrain": stage.model_copy(update={"tracks": tracks, "sample_prompts": ()})}
    prepare(root, experiment)
    trained = []
    for place in (root, disk):
        plan = experiment.model_copy(update=change)
        job = StageJob(key=key, experiment=plan, resources=TrainResources(threads=1, row_tokens=384), root=str(place))
        train_stage(job, WorkerContext())
        trained.append((place / "models" / key / "model.safetensors").read_bytes())
    assert trained[0] == trained[1]
    copies = files(root / "data" / FETCHED)
    codes = [data for name, data in objects(store).items() if name.startswith("codes/")]
    assert Counter(copies.values()) == Counter(set(codes))


DAMAGES = {
    "missing": lambda data: None,
    "bytes instead of": lambda data: data[:-9],
    "sha256": lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
}


@pytest.mark.slow
def test_a_damaged_object_is_named_and_made_again_alone(root, store):
    stages(root, store)
    before, away = files(root / "data"), objects(store)
    victim, raw = "raw/shapes/part-00001.parquet", root / "data/raw/shapes"
    verify = lambda *words: CliRunner().invoke(app, ["verify", *words, "data"])  # noqa: E731
    for problem, change in DAMAGES.items():
        put(store, victim, change(away[victim]))
        advice = rf"`unifork verify --repair {raw}` .*`dvc repro download@shapes`"
        with pytest.raises(DataError, match=rf"{store}/{victim}: .*{problem}.*{advice}"):
            read_table(raw, read_manifest(raw).shards[1])
        assert re.search(rf"data/{victim}: .*{problem}", verify().output)
        if problem == "sha256":
            assert stages(root, store) == []  # a run looks at sizes only
        else:
            with pytest.raises(DataError, match=rf"1 of {SHARDS} shards are not as .*{problem}.*{advice}"):
                KeptRows(Layout(root), "shapes")
        assert "now run `dvc repro download@shapes`" in verify("--repair").output
        assert set(objects(store)) | {victim} == set(away)  # nothing is deleted there
        with pytest.raises(DataError, match="has not finished"):  # which DVC notices, too
            read_manifest(raw)
        assert stages(root, store) == [victim]
        assert objects(store) == away
        assert files(root / "data") == before
    assert verify().exit_code == 0


KILLED = """
import os, runpy, signal, sys
from unifork import stores

put = stores.Store.put

def dying(self, folder, names):
    put(self, folder, names)
    if os.environ["POINT"] in names:
        os.kill(os.getpid(), signal.SIGKILL)

stores.Store.put = dying
sys.argv = ["pipelines.download", "shapes"]
runpy.run_module("pipelines.download", run_name="__main__")
"""


@pytest.mark.slow  # starts whole programs
def test_a_program_killed_between_object_and_record_makes_only_the_rest(store, tmp_path, tiny_root):
    """The real program with a cluster file; a second place without any local state goes on as well."""
    write_experiment(tmp_path, {"datasets": {"shapes": {"rows": ROWS, "shard_rows": SHARD_ROWS}}})
    (tmp_path / "away.yaml").write_text(yaml.safe_dump({"name": "away", "store": f"{store}/"}))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "UNIFORK_CLUSTER": "away.yaml"}

    def program(*command, **more):
        words = [sys.executable, *(command or ("-m", "pipelines.download", "shapes"))]
        return subprocess.run(words, cwd=tmp_path, env=environment | more, capture_output=True, text=True, check=False)

    victim = "part-00001.parquet"
    dead = program("-c", KILLED, POINT=victim)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    names = ["part-00000.parquet", "part-00000.parquet" + RECORD_SUFFIX, victim]
    assert sorted(objects(store)) == [f"raw/shapes/{name}" for name in names]
    shutil.rmtree(tmp_path / "data")
    done = program()
    assert done.returncode == 0, done.stderr
    assert f"{SHARDS}/{SHARDS} shards (1 kept from before)" in done.stdout
    local = {name: data for name, data in files(tiny_root / "data/raw").items() if name.endswith(".parquet")}
    assert objects(f"{store}/raw") == local
    assert set(files(tmp_path / "data")) == {f"raw/shapes/{MANIFEST}"}
    assert Layout().in_store(store, Layout().signatures("shapes")) is None
    text = done.stdout + done.stderr + (tmp_path / "data/raw/shapes" / MANIFEST).read_text()
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in text.split()


def test_an_old_record_is_gone_before_its_object_is_replaced(store, tmp_path):
    """Otherwise a run killed in between leaves a record that another object of the same size would pass for."""
    folder, place = tmp_path / "data/raw/shapes", f"{store}/raw/shapes"
    job = replace(download_job(CARD, 8, 4, 0, folder), store=place)
    (manifest,) = run_here([job], Materialize(CARD))
    whole = objects(place)
    (folder / MANIFEST).unlink()
    for shard in manifest.shards:
        record = shard.model_copy(update={"inputs": "others"}).model_dump_json()
        put(place, shard.path + RECORD_SUFFIX, record.encode())

    def dies(task):
        assert objects(place) == whole
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_here([job], dies)
    assert run_here([job], Materialize(CARD)) == [manifest]
    assert objects(place) == whole


def test_a_smaller_plan_and_a_takedown_leave_nothing_behind(store, tmp_path):
    folder, place = tmp_path / "data/raw/shapes", f"{store}/raw/shapes"
    filtered, kept = tmp_path / "data/filtered/shapes", f"{store}/filtered/shapes"
    plan = lambda rows: replace(download_job(CARD, rows, 500, 0, folder), store=place)  # noqa: E731
    run_here([plan(1500)], Materialize(CARD))
    put(place, "notes.txt", b"of somebody else")
    (raw,) = run_here([plan(1000)], Materialize(CARD))
    assert sorted(objects(place)) == ["notes.txt", "part-00000.parquet", "part-00001.parquet"]
    run_here([measure_job(CARD, folder, tmp_path / "data/measured/shapes")], Measure(CARD))
    job = replace(filter_job(CARD, tmp_path / "data/measured/shapes", filtered), store=kept)
    (manifest,) = run_here([job], Filter(CARD))  # one row in 997 is cut off on purpose
    assert manifest.dropped == {"undecodable": 1}
    assert [name for name in objects(kept) if QUARANTINE in name] == [f"{QUARANTINE}/part-00001.parquet"]
    (rejected,) = rejected_rows(KeptRows(Layout(tmp_path), "shapes"))

    first = read_table(filtered, manifest.shards[0])["key"].to_pylist()
    copy = tmp_path / "data" / FETCHED / f"{manifest.shards[0].sha256}.parquet"
    copy.parent.mkdir()
    copy.write_bytes(b"a copy of training")
    gone = dict(zip([shard.path for shard in manifest.shards], ([first[3]], [rejected["key"]]), strict=True))
    assert takedown(filtered, gone) == 1
    less = read_manifest(filtered)
    assert less.rows == manifest.rows - 1 == raw.rows - 2
    assert not copy.exists()
    assert first[3] not in read_table(filtered, less.shards[0])["key"].to_pylist()
    assert pq.read_table(quarantine_of(filtered, less.shards[1])).num_rows == 0
    assert sorted(objects(kept)) == ["part-00000.parquet", "part-00001.parquet", f"{QUARANTINE}/part-00001.parquet"]
    assert run_here([job], None) == [less]


def test_what_is_wrong_with_a_store_is_one_line(bucket, tmp_path, monkeypatch):
    def download(store: str):
        job = replace(download_job(CARD, 4, 4, 0, tmp_path / "raw"), store=store)
        run_here([job], lambda task: pytest.fail("a shard was made for a store that cannot take it"))

    with pytest.raises(DataError, match=r"^s3://not-there/raw: FileNotFoundError: .*bucket does not exist[^\n]*$"):
        download("s3://not-there/raw")
    with pytest.raises(ConfigError, match=r"^s3://\.\.\.: .*credentials belong into the environment$"):
        download("s3://KEY:secret@bucket/raw")
    with pytest.raises(ConfigError, match="nowhere://"):
        download("nowhere://bucket/raw")
    for wrong in ("bucket/path", "hf://user/name"):
        with pytest.raises(ConfigError, match="store"):
            parse(Cluster, {"name": "x", "store": wrong}, "x.yaml")

    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0.0)  # from now on keys are looked at
    with pytest.raises(DataError, match=rf"^{bucket}/raw: PermissionError: [^\n]*Run the command again"):
        download(f"{bucket}/raw")

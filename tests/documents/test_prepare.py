"""The prepare stage: through its program, killed and resumed, shared, taken down from, and never stale in training."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from crashes import run
from test_documents import ANSWER, opened, part
from tiny import REPOSITORY, ROWS, SHARD_ROWS, bytes_of, copy_of, prepare_set

import pipelines.prepare
from unifork.config import Experiment, TrainResources, load
from unifork.documents import mixture
from unifork.documents.mixture import Documents
from unifork.documents.text_tokenizer import TextTokenizer, train_text_tokenizer
from unifork.errors import ConfigError, DataError
from unifork.filters.takedown import takedown
from unifork.shards.job import mapped_table
from unifork.shards.manifest import MANIFEST, file_sha256, read_manifest, write_json
from unifork.shards.repair import faults
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

KEY = "shapes-conversations-answer"
PROGRAM = ("pipelines.prepare", KEY)


def folder_of(root: Path) -> Path:
    return root / "data/prepared" / KEY


@pytest.mark.slow  # starts whole programs
def test_the_program_makes_what_the_worker_makes_one_shard_for_each_shard_of_codes(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path)
    shutil.rmtree(folder_of(root))
    printed = run(root, PROGRAM)
    assert f"data/prepared/{KEY}: kept {ROWS} rows, dropped none" in printed
    assert bytes_of(folder_of(root)) == bytes_of(folder_of(tiny_root))
    assert "3/3 shards (3 kept from before)" in run(root, PROGRAM)
    assert [shard.rows for shard in read_manifest(folder_of(root)).shards] == [SHARD_ROWS] * 3
    assert faults(folder_of(root)) == []


def test_two_workers_make_the_same_bytes(ray_session, tiny_root, tmp_path, monkeypatch):
    root = copy_of(tiny_root, tmp_path)
    (root / "two.yaml").write_text("name: two\ncpus: 2\njobs: {prepare: {workers: 2, cpus: 0.5}}\n")
    shutil.rmtree(folder_of(root))
    monkeypatch.chdir(root)
    monkeypatch.setenv("UNIFORK_CLUSTER", "two.yaml")
    pipelines.prepare.main(KEY)
    assert bytes_of(folder_of(root)) == bytes_of(folder_of(tiny_root))


def test_columns_are_views_of_the_file(tiny_root):
    path = folder_of(tiny_root) / "part-00000.arrow"
    documents = Documents.mapped(path)
    before = pa.total_allocated_bytes()
    table = mapped_table(path)
    assert pa.total_allocated_bytes() == before
    assert table.column("text_ids").num_chunks == 1
    for name, column in documents._asdict().items():
        if isinstance(column, np.ndarray):
            assert not column.flags.owndata, name
            assert not column.flags.writeable, name


def training(root: Path) -> StageJob:
    resources = TrainResources(threads=1, row_tokens=2048)
    experiment = load(Experiment, root / "params.yaml")
    return StageJob(key="unifork-s1-captions", experiment=experiment, resources=resources, root=str(root))


def test_training_only_maps_files(tiny_root, tmp_path):
    """The folder may be read-only."""
    root = copy_of(tiny_root, tmp_path)
    before = bytes_of(root / "data")
    train_stage(training(root), WorkerContext())
    assert bytes_of(root / "data") == before
    summary = json.loads((root / "models/unifork-s1-captions/training/summary.json").read_text())
    assert summary["quarantined"] == {}


@pytest.mark.slow
def test_nobody_who_trains_can_tokenize_a_row():
    """What does that is never imported."""
    program = "import sys, unifork.training.stage; print('unifork.documents.prepare' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", program], cwd=REPOSITORY) == b"False\n"


def test_what_is_left_out_is_in_log_and_summary(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path)
    answers = opened(root, ANSWER.model_copy(update={"text": "description", "template": "caption-plain"}))
    job = training(root)
    lengths = list(map(answers.length, range(ROWS)))
    stage = job.stage.model_copy(update={"context": sorted(lengths)[ROWS // 2]})
    experiment = job.experiment.model_copy(update={"stages": {**job.experiment.stages, "s1-captions": stage}})
    job = job.model_copy(update={"experiment": experiment})
    train_stage(job, WorkerContext())
    counts = json.loads((job.model_folder / "training/summary.json").read_text())["quarantined"]
    reason = f"shapes: longer than the context of {stage.context} tokens"
    assert list(counts) == [reason]
    assert counts[reason] >= sum(length > stage.context for length in lengths) > 0
    assert f"quarantined: {counts[reason]} x {reason}" in (job.run_folder / "log.txt").read_text()


def test_a_missing_or_damaged_folder_is_one_line_with_the_command_that_makes_it(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path)
    shutil.rmtree(folder_of(root))
    with pytest.raises(DataError, match=rf"prepared/{KEY}: not there yet; `dvc repro prepare@{KEY}` makes it$"):
        opened(root, ANSWER)
    part(root, ANSWER)
    (folder_of(root) / "part-00001.arrow").unlink()
    with pytest.raises(DataError, match=rf"1 of 3 shards .*part-00001.arrow: missing.*`dvc repro prepare@{KEY}`"):
        opened(root, ANSWER)


def test_another_tokenizer_or_version_is_noticed_and_makes_it_anew(tiny_root, tmp_path, monkeypatch):
    root = copy_of(tiny_root, tmp_path)
    before = bytes_of(folder_of(root))
    again = rf"`dvc repro --force --single-item prepare@{KEY}` makes it anew"
    for name in ("DOCUMENTS_VERSION", "VOCABULARY_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(mixture, name, 99)
            with pytest.raises(DataError, match=rf"{KEY}: made with other versions than are here now; {again}"):
                opened(root, ANSWER)
    with monkeypatch.context() as patch:
        patch.setattr(mixture.tokenizers, "__version__", "0.0")
        with pytest.raises(DataError, match="made with other versions"):
            opened(root, ANSWER)
    shutil.rmtree(root / "tokenizers/text")
    train_text_tokenizer(["a red circle", "how many?"] * 20, 330, root / "tokenizers/text")
    with pytest.raises(DataError, match=rf"made with other tokenizer than .*{again}"):
        opened(root, ANSWER)
    assert "0/3 shards" in run(root, PROGRAM)
    assert len(opened(root, ANSWER, context=2000)) == ROWS
    after = bytes_of(folder_of(root))
    assert all(after[name] != before[name] for name in before if name.endswith(".arrow"))


def test_a_row_is_taken_down_from_a_finished_shard(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path)
    whole = part(root, ANSWER)
    keys = [whole.key(n) for n in range(ROWS)]
    untouched = (folder_of(root) / "part-00000.arrow").read_bytes()
    gone = [keys[SHARD_ROWS + 3], keys[SHARD_ROWS + 4]]
    named = {"part-00001.parquet": gone}
    assert takedown(folder_of(root), named) == 2
    manifest = read_manifest(folder_of(root))
    assert (manifest.rows, manifest.dropped) == (ROWS - 2, {"takedown": 2})
    assert (folder_of(root) / "part-00000.arrow").read_bytes() == untouched
    assert gone[0].encode() not in (folder_of(root) / "part-00001.arrow").read_bytes()
    left = opened(root, ANSWER)
    kept = [number for number, key in enumerate(keys) if key not in gone]
    assert [left.key(n) for n in range(len(left))] == [keys[n] for n in kept]
    for number in (SHARD_ROWS + 2, SHARD_ROWS + 3, ROWS - 3):
        assert (left.document(number).text_ids_T == whole.document(kept[number]).text_ids_T).all()
        assert (left.codes(number) == whole.codes(kept[number])).all()
    assert left.quarantined == {"takedown": 2}
    # gone from the codes as well, the rows behind it have moved there: prepared again before anybody reads
    takedown(root / "data/codes/shapes/pad", named)
    with pytest.raises(DataError, match="made with other codes than are here now"):
        opened(root, ANSWER)
    manifest = prepare_set(root, "shapes", "conversations", "answer")
    assert (manifest.rows, manifest.dropped) == (ROWS - 2, {})
    again = opened(root, ANSWER)
    for number in (SHARD_ROWS + 3, ROWS - 3):
        assert again.key(number) == left.key(number)
        assert (again.codes(number) == left.codes(number)).all()


def changed(root: Path, change) -> Path:
    """A root in whose padded codes the rows of every shard are changed, in row groups of 8."""
    folder = root / "data/codes/shapes/pad"
    plain = read_manifest(folder).model_dump(mode="json")
    for shard in plain["shards"]:
        path = folder / shard["path"]
        table = pq.read_table(path)
        rows = table.to_pylist()
        change(rows)
        path.unlink()
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path, row_group_size=8)
        shard |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    write_json(folder / MANIFEST, plain)
    return root


def test_one_bad_row_costs_one_row_and_is_counted_by_reason(tiny_root, tmp_path, monkeypatch):
    def change(rows):
        rows[0]["description"], rows[2]["description"], rows[3]["description"] = None, "a <image>", "boom"

    root = changed(copy_of(tiny_root, tmp_path), change)
    real = TextTokenizer.encode_pieces

    def fails(self, pieces, border="letters"):
        if any(piece.text == "boom" for piece in pieces):
            raise ValueError("cannot be read")
        return real(self, pieces, border)

    monkeypatch.setattr(TextTokenizer, "encode_pieces", fails)
    manifest = prepare_set(root, "shapes", "description", "caption")
    assert manifest.dropped == {"no_text": 3, "broken_text": 3, "unexpected": 3}
    table = pq.read_table(root / "data/prepared/shapes-description-caption/quarantine/part-00000.parquet")
    assert sorted(zip(table["reason"].to_pylist(), table["detail"].to_pylist(), strict=True)) == [
        ("broken_text", "the text contains the mark <image>"),
        ("no_text", "no text"),
        ("unexpected", "ValueError: cannot be read"),
    ]
    entry = ANSWER.model_copy(update={"text": "description", "template": "caption"})
    left = opened(root, entry)
    assert left.group_sizes.tolist() == [5, 8, 8, 8] * 3
    assert left.quarantined == manifest.dropped


def test_a_set_of_which_no_row_can_be_used_is_an_error(tiny_root, tmp_path):
    root = changed(copy_of(tiny_root, tmp_path), lambda rows: [row.update(description=None) for row in rows])
    with pytest.raises(DataError, match=r"none of 96 rows is kept: 96 no_text, the first '\S+': no text"):
        prepare_set(root, "shapes", "description", "caption")


def test_a_column_that_the_codes_lack_is_an_error(tiny_root, tmp_path):
    with pytest.raises(ConfigError, match=r"part-00000.parquet: unknown text column 'captoin'.*Did you mean 'caption'"):
        prepare_set(copy_of(tiny_root, tmp_path), "shapes", "captoin", "generate")

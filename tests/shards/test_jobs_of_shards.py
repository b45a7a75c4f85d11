"""Download, filter and encode: counts, quarantine, exactly-once, repair."""

import io
import json
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import ROWS, bytes_of, copy_of, filter_here, run_here

from unifork.cluster import run_jobs
from unifork.config import FilterRule, load_card
from unifork.config.card import Losses
from unifork.errors import ConfigError, DataError, IdentityError
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.layout import Layout
from unifork.shards.job import KeptRows
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX, Manifest, Shard, fault, read_manifest
from unifork.shards.schema import codes_meta
from unifork.shards.task import QUARANTINE, warnings_of
from unifork.sources import Materialize, download_job


@pytest.fixture
def card():
    return load_card("shapes")


def download(card, folder, rows=40, shard_rows=16):
    outputs = []
    worker = Materialize(card)

    def counting(task):
        outputs.append(task.output)
        return worker(task)

    job = download_job(card, rows, shard_rows, 0, folder)
    (manifest,) = run_here([job], counting)
    return manifest, outputs


def test_a_job_lists_its_shards_and_its_rows_are_sorted_by_key(card, tmp_path):
    manifest, _ = download(card, tmp_path / "raw")
    assert [shard.rows for shard in manifest.shards] == [16, 16, 8]
    keys = [k for s in manifest.shards for k in pq.read_table(tmp_path / "raw" / s.path)["key"].to_pylist()]
    assert keys == sorted(set(keys))
    assert read_manifest(tmp_path / "raw") == manifest


def test_a_second_run_does_nothing_and_changes_no_byte(card, tmp_path):
    download(card, tmp_path / "raw")
    before = bytes_of(tmp_path / "raw")
    _, outputs = download(card, tmp_path / "raw")
    assert outputs == []
    assert bytes_of(tmp_path / "raw") == before


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_only_the_damaged_shard_is_made_again(card, tmp_path, damage):
    download(card, tmp_path / "raw")
    before = bytes_of(tmp_path / "raw")
    victim = tmp_path / "raw" / "part-00001.parquet"
    data = victim.read_bytes()
    victim.unlink()
    if damage == "truncated":
        victim.write_bytes(data[:-10])
    assert fault(tmp_path / "raw", read_manifest(tmp_path / "raw").shards[1])
    _, outputs = download(card, tmp_path / "raw")
    assert [name.rpartition("/")[2] for name in outputs] == ["part-00001.parquet"]
    assert bytes_of(tmp_path / "raw") == before


def test_a_killed_job_keeps_its_finished_shards_and_ends_with_the_same_bytes(card, tmp_path):
    download(card, tmp_path / "whole")
    worker = Materialize(card)

    def dies_on_the_second(task):
        if task.output.endswith("part-00001.parquet"):
            raise KeyboardInterrupt
        return worker(task)

    job = download_job(card, 40, 16, 0, tmp_path / "raw")
    with pytest.raises(KeyboardInterrupt):
        run_here([job], dies_on_the_second)
    assert not (tmp_path / "raw" / MANIFEST).exists()
    with pytest.raises(DataError, match="has not finished"):
        read_manifest(tmp_path / "raw")
    _, outputs = download(card, tmp_path / "raw")
    assert len(outputs) == 2
    assert bytes_of(tmp_path / "raw") == bytes_of(tmp_path / "whole")


def test_another_plan_removes_what_it_does_not_name(card, tmp_path):
    download(card, tmp_path / "raw")
    (tmp_path / "raw" / "part-00009.parquet").write_bytes(b"left over")
    (tmp_path / "raw" / QUARANTINE).mkdir(exist_ok=True)
    (tmp_path / "raw" / QUARANTINE / ".part-00000.parquet.tmp-1234").write_bytes(b"of a killed worker")
    manifest, outputs = download(card, tmp_path / "raw", rows=16)
    assert outputs == []
    assert set(bytes_of(tmp_path / "raw")) == {MANIFEST, "part-00000.parquet"}
    assert not list((tmp_path / "raw").glob("*" + RECORD_SUFFIX))
    assert not list((tmp_path / "raw" / QUARANTINE).iterdir())
    assert manifest.rows == 16


def test_the_filter_counts_and_quarantines_and_loses_nothing_else(card, tmp_path):
    download(card, tmp_path / "raw")
    shard = tmp_path / "raw" / "part-00000.parquet"
    rows = pq.read_table(shard).to_pylist()
    small = io.BytesIO()
    Image.new("RGB", (20, 48)).save(small, "PNG")
    rows[3]["image"] = rows[3]["image"][:60]
    rows[5]["image"] = b"<html>not found</html>"
    rows[7]["image"] = small.getvalue()
    rows[9] = rows[9] | {"caption": "", "description": None, "conversations": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(shard)), shard)
    manifest = read_manifest(tmp_path / "raw").model_dump(mode="json")
    from unifork.shards.manifest import file_sha256

    manifest["shards"][0] |= {"bytes": shard.stat().st_size, "sha256": file_sha256(shard)}
    (tmp_path / "raw" / MANIFEST).write_text(json.dumps(manifest))

    kept = filter_here(card, tmp_path / "raw", tmp_path / "measured", tmp_path / "filtered")
    assert kept.dropped == {"undecodable": 1, "not_an_image": 1, "min_side": 1, "no_text": 1}
    assert kept.rows == 36
    rejected = pq.read_table(tmp_path / "filtered" / QUARANTINE / "part-00000.parquet").to_pylist()
    assert {row["key"] for row in rejected} == {rows[n]["key"] for n in (3, 5, 7, 9)}
    assert all(row["detail"] for row in rejected)
    assert set(rejected[0]) == {"key", "url", "sha256", "reason", "detail"}, "the bytes stay in the raw shards alone"
    keys = [k for s in kept.shards for k in pq.read_table(tmp_path / "filtered" / s.path)["key"].to_pylist()]
    assert len(keys) == 36


def test_a_consumer_refuses_a_shard_that_is_not_what_the_manifest_says(card, tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path / "root")
    victim = root / "data/raw/shapes/part-00001.parquet"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.unlink()
    victim.write_bytes(data)
    tokenizer = root / "tokenizers/image"
    job = encode_job(card, "generation", KeptRows(Layout(root), "shapes"), tmp_path / "codes", tokenizer)
    with pytest.raises(DataError, match=r"part-00001.*sha256"):
        run_here([job], Encode(card, tokenizer, "cpu"))
    victim.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-00001.*4 bytes instead of"):
        KeptRows(Layout(root), "shapes")


def test_the_plan_of_encoding_loads_no_network(card, tiny_root, tmp_path):
    """Only config.json is needed; without torch the program starts in half a second."""
    (tmp_path / "tokenizer").mkdir()
    shutil.copy(tiny_root / "tokenizers/image/config.json", tmp_path / "tokenizer")
    job = encode_job(card, "generation", KeptRows(Layout(tiny_root), "shapes"), tmp_path, tmp_path / "tokenizer")
    manifest = read_manifest(tiny_root / "data/codes/shapes/crop")
    assert [job.inputs(task) for task in job.tasks] == [shard.inputs for shard in manifest.shards]
    assert (job.lineage, job.columns) == (manifest.lineage, manifest.columns)
    program = "import sys, pipelines.encode; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout == b"False False\n"


@pytest.mark.parametrize("fault", ["canaries", "promise"])
def test_a_tokenizer_that_encodes_otherwise_makes_no_shard(card, tiny_root, tmp_path, fault):
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_root / "tokenizers/image", tokenizer)
    if fault == "canaries":
        tensors = load_file(tokenizer / "canaries.safetensors")
        tensors["codes"][0, 0, 0] ^= 1
        save_file(tensors, tokenizer / "canaries.safetensors")
    else:
        config = (tokenizer / "config.json").read_text()
        identity = read_manifest(tiny_root / "data/codes/shapes/crop").lineage["encoder_id"]
        (tokenizer / "config.json").write_text(config.replace(identity, "0" * 16))
    job = encode_job(card, "generation", KeptRows(Layout(tiny_root), "shapes"), tmp_path / "codes", tokenizer)

    with pytest.raises(IdentityError, match="canaries' codes differ" if fault == "canaries" else "promises 0000"):
        run_jobs([job], Encode, card, tokenizer, "cpu")
    assert not list((tmp_path / "codes").iterdir())


def test_codes_say_who_made_them(tiny_root):
    manifest = read_manifest(tiny_root / "data/codes/shapes/crop")
    assert manifest.rows == ROWS
    assert manifest.lineage["encoding"]["view"] == "crop"
    shard = codes_meta(pq.read_schema(tiny_root / "data/codes/shapes/crop" / manifest.shards[0].path), "shard")
    assert shard["encoding"].items() > manifest.lineage["encoding"].items()
    assert shard["encoding"]["device_class"].startswith("cpu")
    other = read_manifest(tiny_root / "data/codes/shapes/pad")
    for name in ("codebook_id", "encoder_id"):
        assert manifest.lineage[name] == other.lineage[name]


def test_an_unknown_source_or_rule_names_the_known_ones(card, tmp_path):
    wrong = card.model_copy(update={"source": card.source.model_copy(update={"kind": "emojis"})})
    with pytest.raises(ConfigError, match=r"'emojis'.*Did you mean 'emoji'"):
        download(wrong, tmp_path / "raw")
    with pytest.raises(ConfigError, match="endless"):
        download(card, tmp_path / "raw", rows=None)


def test_the_two_views_of_a_wide_image_have_different_codes(tiny_root):
    """What a swap of the views would do to the scores is shown in tests/evaluation."""
    raw = tiny_root / "data/filtered/shapes"
    sides = [
        s
        for m in read_manifest(raw).shards
        for s in pq.read_table(raw / m.path, columns=["width", "height"]).to_pylist()
    ]
    codes = {}
    for view in ("crop", "pad"):
        folder = tiny_root / "data/codes/shapes" / view
        codes[view] = [
            c for m in read_manifest(folder).shards for c in pq.read_table(folder / m.path)["codes"].to_pylist()
        ]
    square = [side["width"] == side["height"] for side in sides]
    assert 0.2 < 1 - sum(square) / len(square) < 0.5
    for same, crop, pad in zip(square, codes["crop"], codes["pad"], strict=True):
        assert (crop == pad) == same


def test_a_stage_that_keeps_no_row_fails_and_says_why(card, tmp_path):
    download(card, tmp_path / "raw")
    strict = card.model_copy(update={"filters": (FilterRule(rule="min_side", options={"pixels": 4000}),)})
    with pytest.raises(DataError, match=r"filtered: none of 40 rows is kept: 40 min_side, the first '.*pixels.: 4000"):
        filter_here(strict, tmp_path / "raw", tmp_path / "measured", tmp_path / "filtered")
    assert not (tmp_path / "filtered" / MANIFEST).exists()
    assert filter_here(card, tmp_path / "raw", tmp_path / "measured", tmp_path / "filtered").rows == 40


def test_losses_are_told_when_they_are_more_than_the_card_expects(card):
    manifest = Manifest(
        kind="image-text", dataset="web", columns={},
        shards=(Shard(path="a", rows=30, bytes=1, sha256="", inputs="",
                      dropped={"timeout": 40, "http_404": 20, "undecodable": 8, "min_side": 2}),),
    )  # fmt: skip
    transport, content = warnings_of(manifest, "download", card.losses)
    assert "download lost 60.0% of 100 rows to transport (40 timeout, 20 http_404)" in transport
    assert "lost 10.0% of 100 rows to content (8 undecodable, 2 min_side); expected are at most 5%" in content
    assert "8.0%" in warnings_of(manifest, "filter", Losses(transport=0.7))[0], "what rules drop is no loss"
    assert warnings_of(manifest, "filter", Losses(transport=0.6, content=0.08)) == []

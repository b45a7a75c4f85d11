"""What decides codes beside the images: bytes travel as bytes, the number type of a card, images decoded once."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import bytes_of, run_here

from unifork.cluster import run_jobs
from unifork.config import Card, load_card, parse
from unifork.errors import ConfigError, DataError
from unifork.image_tokenizer import canaries, code_encoder, encode, samples
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.image_tokenizer.model import ImageTokenizer, to_tensor
from unifork.image_tokenizer.samples import sample_views
from unifork.images import VIEWS, open_image
from unifork.layout import Layout
from unifork.shards.job import KeptRows, kept_rows


def test_the_device_is_sent_bytes(directory, blocks, monkeypatch):
    sent, tokenizer, to = [], ImageTokenizer.load(directory), torch.Tensor.to
    codes_BND = tokenizer.encode(to_tensor(blocks[:4]))

    def noted(self, *place):
        sent.append(self)
        return to(self, *place)

    monkeypatch.setattr(torch.Tensor, "to", noted)
    assert (tokenizer.encode_bytes(blocks[:4]) == codes_BND).all()
    images = [tensor for tensor in sent if tensor.shape == (4, 32, 32, 3)]
    assert [tensor.dtype for tensor in images] == [torch.uint8]


def encoded(card, rows, tokenizer, folder):
    """The shards of a set's crops, and what their schema says of the encoding."""
    [manifest] = run_here([encode_job(card, "generation", rows, folder, tokenizer)], Encode(card, tokenizer, "cpu"))
    tables = [pq.read_table(folder / shard.path) for shard in manifest.shards]
    return manifest, tables, json.loads(tables[0].schema.metadata[b"unifork.codes"])["encoding"]


def test_a_card_chooses_the_number_type_and_shards_record_it(tiny_root, tmp_path, monkeypatch):
    monkeypatch.setattr(canaries, "LARGEST_FLIP_RATE", 1.0)  # random weights lose many codes
    layout, card = Layout(tiny_root), load_card("shapes", tiny_root / "datasets")
    rows, tokenizer = KeptRows(layout, "shapes"), layout.image_tokenizer
    half = card.model_copy(update={"encoder_dtype": "bfloat16"})
    plain, _, encoding = encoded(card, rows, tokenizer, tmp_path / "float32")
    other, _, half_encoding = encoded(half, rows, tokenizer, tmp_path / "bfloat16")
    assert (encoding["dtype"], half_encoding["dtype"]) == ("float32", "bfloat16")
    assert "canary_flips" not in encoding
    assert 0 < half_encoding["canary_flips"] < 1
    assert [shard.inputs for shard in plain.shards] != [shard.inputs for shard in other.shards], "made anew"
    assert plain.lineage["encoding"]["dtype"] == "float32"
    assert other.lineage["encoding"]["dtype"] == "bfloat16"
    assert "encoder_dtype" not in card.model_dump()
    assert half.model_dump()["encoder_dtype"] == "bfloat16"


def test_both_views_of_a_sample_come_from_one_decode(tiny_root, monkeypatch):
    layout, opened = Layout(tiny_root), []
    card, rows = load_card("shapes", layout.cards), KeptRows(layout, "shapes")
    monkeypatch.setattr(samples, "open_image", lambda data: (opened.append(data), open_image(data))[1])
    views = sample_views(rows, card, 32, seed=3, most=20)
    assert views.keys() == {"crop", "pad"}
    assert len(opened) == len(set(opened)) == 20
    for view, pixels_BSSC in views.items():
        alone = {VIEWS[view](open_image(data), 32, card.matte).tobytes() for data in opened}
        assert {image_SSC.tobytes() for image_SSC in pixels_BSSC} == alone
    square = [number for number, image in enumerate(opened) if len(set(open_image(image).size)) == 1]
    same = [number for number in range(20) if np.array_equal(views["crop"][number], views["pad"][number])]
    assert len(same) == len(square), "both views are in one order"


def both_views(card, layout, folder):
    """Jobs of a set's crops and padded images, and the arguments of their worker."""
    rows, tokenizer = KeptRows(layout, "shapes"), layout.image_tokenizer
    return [encode_job(card, t, rows, folder / use.view, tokenizer) for t, use in card.tasks.items()], (
        card,
        tokenizer,
        "cpu",
    )


def changed_rows(change):
    """The kept rows of a task with some of them changed, as a stand-in for `kept_rows`."""

    def rows(task, columns):
        table = kept_rows(task, columns)
        return pa.Table.from_pylist([change(n, row) for n, row in enumerate(table.to_pylist())], table.schema)

    return rows


def thin(number, row):
    """One image that can be padded and not cropped."""
    file = io.BytesIO()
    Image.new("RGB", (1, 90_000)).save(file, "PNG")
    return row | ({"image": file.getvalue()} if number == 2 else {})


def silent(number, row):
    return row | (dict.fromkeys(("description", "conversations")) if number % 3 == 1 else {})


@pytest.mark.parametrize("change", [lambda _, row: row, thin, silent], ids=["plain", "one view fails", "other rows"])
def test_encoding_decodes_an_image_once_and_writes_the_files_of_each_view_alone(
    change, tiny_root, tmp_path, monkeypatch
):
    layout, opened = Layout(tiny_root), []
    card = load_card("shapes", layout.cards)
    monkeypatch.setattr(encode, "kept_rows", changed_rows(change))
    monkeypatch.setattr(code_encoder, "open_image", lambda data: (opened.append(data), open_image(data))[1])
    jobs, arguments = both_views(card, layout, tmp_path / "alone")
    alone = run_here(jobs, Encode(*arguments))
    rows = KeptRows(layout, "shapes").manifest.rows
    if change is not thin:
        assert len(opened) == 2 * rows - sum(alone[1].dropped.values())
    opened.clear()
    jobs, arguments = both_views(card, layout, tmp_path / "together")
    run_jobs(jobs, Encode, *arguments)
    assert bytes_of(tmp_path / "alone") == bytes_of(tmp_path / "together")
    if change not in (thin, silent):
        assert len(opened) == rows
    assert [manifest.dropped for manifest in alone] == {
        thin: [{"unencodable": len(alone[0].shards)}, {}], silent: [{}, {"no_text_for_task": mute(alone[1])}],
    }.get(change, [{}, {}])  # fmt: skip


def mute(manifest):
    return sum(len(range(1, shard.rows + sum(shard.dropped.values()), 3)) for shard in manifest.shards)


def test_a_view_that_is_there_is_not_made_again(tiny_root, tmp_path, monkeypatch):
    layout, opened = Layout(tiny_root), []
    card = load_card("shapes", layout.cards)
    jobs, arguments = both_views(card, layout, tmp_path)
    run_jobs(jobs, Encode, *arguments)
    before = bytes_of(tmp_path)
    (tmp_path / "pad" / "part-00001.parquet").unlink()
    crop = (tmp_path / "crop" / "part-00001.parquet").stat().st_mtime_ns
    monkeypatch.setattr(code_encoder, "open_image", lambda data: (opened.append(data), open_image(data))[1])
    jobs, arguments = both_views(card, layout, tmp_path)
    manifests = run_jobs(jobs, Encode, *arguments)
    assert len(opened) == manifests[1].shards[1].rows
    assert (tmp_path / "crop" / "part-00001.parquet").stat().st_mtime_ns == crop
    assert bytes_of(tmp_path) == before


def test_a_damaged_shard_costs_both_views_theirs_alone(tiny_root, tmp_path, monkeypatch):
    def damaged(task, columns):
        if task.shard.path == "part-00001.parquet":
            raise DataError("damaged")
        return kept_rows(task, columns)

    monkeypatch.setattr(encode, "kept_rows", damaged)
    jobs, arguments = both_views(load_card("shapes", tiny_root / "datasets"), Layout(tiny_root), tmp_path)
    with pytest.raises(DataError, match=r"crop: 1 of \d shards could not be made: part-00001.parquet: damaged"):
        run_jobs(jobs, Encode, *arguments)
    assert [job.failed for job in jobs] == [{"part-00001.parquet": "damaged"}] * 2
    assert [len(job.finished) for job in jobs] == [len(job.tasks) - 1 for job in jobs]


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_other_number_types_are_refused(tiny_root, dtype):
    card = load_card("shapes", tiny_root / "datasets").model_dump(mode="json")
    with pytest.raises(ConfigError, match="encoder_dtype"):
        parse(Card, {**card, "encoder_dtype": dtype}, "card")

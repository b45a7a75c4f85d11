"""What decides codes beside the images: bytes travel as bytes, the number type of a card, images decoded once."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import run_here

from unifork.config import Card, load_card, parse
from unifork.errors import ConfigError
from unifork.image_tokenizer import canaries, samples
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.image_tokenizer.model import ImageTokenizer, to_tensor
from unifork.image_tokenizer.samples import sample_views
from unifork.images import VIEWS, open_image
from unifork.layout import Layout
from unifork.shards.job import KeptRows


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


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_other_number_types_are_refused(tiny_root, dtype):
    card = load_card("shapes", tiny_root / "datasets").model_dump(mode="json")
    with pytest.raises(ConfigError, match="encoder_dtype"):
        parse(Card, {**card, "encoder_dtype": dtype}, "card")

"""Lists of images with their texts: JourneyDB, LLaVA, InternVL."""

import json
import tracemalloc
from codecs import BOM_UTF8
from pathlib import Path

import pytest
import yaml
from archive_samples import card_of, download, filtered, jpeg, jsonl, put, tarred

from unifork.config import load_card
from unifork.documents.prompts import TEMPLATES, written
from unifork.errors import ConfigError, DataError
from unifork.sources import list_files
from unifork.vocabulary import TURN_END

DATASETS = Path(__file__).parent.parent.parent / "datasets"
JOURNEY = {"files": "train_anno_realease_repath.jsonl.tgz", "root": "imgs", "image": "img_path",
           "texts": {"caption": "Task2.Caption"}, "keep": {"img_path": "img_path"}}  # fmt: skip


@pytest.mark.parametrize("shape", ["archives", "unpacked"])
def test_journeydb(at, shape):
    lines = [
        {"img_path": "./000/a.jpg", "prompt": "a cat --v 5", "Task1": {}, "Task2": {"Caption": "A cat."}, "Task3": {}},
        {"img_path": "./001/b.jpg", "prompt": "b", "Task2": {"Caption": "B."}},
        b'{"img_path": "./000/c.jpg", "Task2": {"Cap',
        {"img_path": "./000/d.jpg", "prompt": "no caption", "Task2": {}},
        {"img_path": "./001/gone.jpg", "Task2": {"Caption": "gone"}},
        {"img_path": "./000/e.jpg", "Task2": {"Caption": "E."}},
        {"img_path": "../secret.jpg", "Task2": {"Caption": "outside"}},
        b"\xff\xfe",
        {"prompt": "no path", "Task2": {"Caption": "x"}},
        {"img_path": "./199/lost.jpg", "Task2": {"Caption": "no such archive"}},
    ]
    put(
        at / "train_anno_realease_repath.jsonl.tgz",
        tarred([("train_anno_realease_repath.jsonl", jsonl(lines))], "w:gz"),
    )
    put(at / "secret.jpg", jpeg("img0"))
    parts = {"000": {"a": "img0", "c": "img1", "d": "img2", "e": "img3"}, "001": {"b": "img4"}}
    for folder, names in parts.items():
        members = [(f"{folder}/{name}.jpg", jpeg(image)) for name, image in names.items()]
        if shape == "archives":
            put(at / f"imgs/{folder}.tgz", tarred(members, "w:gz"))
        else:
            for name, data in members:
                put(at / "imgs" / name, data)
    result = download(card_of("table", JOURNEY, ["caption"], columns=["img_path"]), at / "raw", shard_rows=3)
    place = "train_anno_realease_repath/00000000"
    assert {key: (row["caption"], row["image"], row["img_path"]) for key, row in result.rows.items()} == {
        f"{place}0": ("A cat.", jpeg("img0"), "./000/a.jpg"),
        f"{place}1": ("B.", jpeg("img4"), "./001/b.jpg"),
        f"{place}5": ("E.", jpeg("img3"), "./000/e.jpg"),
    }
    assert result.rejects == [
        (f"{place}2", "broken_line"), (f"{place}3", "missing_caption"), (f"{place}4", "missing_image"),
        (f"{place}6", "path_outside"), (f"{place}7", "broken_text"), (f"{place}8", "no_image"),
        (f"{place}9", "missing_image"),
    ]  # fmt: skip


def dialogue(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


LLAVA = [
    {"id": "1", "image": "coco/train2017/1.jpg", "conversations": dialogue("<image>\nIt?", "A cat.", "Sure?", "Yes.")},
    {"id": "2", "conversations": dialogue("text only", "yes")},
    {"id": "1", "image": "coco/train2017/1.jpg", "conversations": dialogue("Again\n<image>", "Same id: ü ]} \".")},
    {"id": "3", "image": ["vg/2.jpg", "coco/train2017/1.jpg"], "conversations": dialogue("Which?", "Both.")},
    {"id": "4", "image": "vg/2.jpg", "conversations": {"from": "human", "value": "no list"}},
    {"id": "5", "image": "vg/2.jpg", "conversations": [{"from": "system", "value": "Be brief."}, *dialogue("Q", "A")]},
    {"id": "6", "image": "vg/2.jpg", "conversations": []},
    {"id": "7", "image": "", "conversations": dialogue("<image>\nWhich?", "Gone.")},
]  # fmt: skip


def llava_images(folder):
    put(folder / "coco/train2017/1.jpg", jpeg("img0"))
    put(folder / "vg/2.jpg", jpeg("img1"))


@pytest.mark.parametrize(("indent", "mark"), [(None, b""), (2, BOM_UTF8)])
def test_llavas_array(at, indent, mark):
    put(at / "llava.json", mark + json.dumps(LLAVA, indent=indent, ensure_ascii=False).encode())
    llava_images(at / "images")
    options = {"files": "llava.json", "root": "images", "texts": {"conversations": "conversations"}}
    result = download(card_of("table", options, ["conversations"]), at / "raw")
    assert sorted(result.rows) == [f"llava/{number:09d}" for number in (0, 2, 5)]
    assert result.rows["llava/000000000"]["conversations"] == [
        {"role": role, "text": text}
        for role, text in zip(["user", "assistant"] * 2, ["<image>\nIt?", "A cat.", "Sure?", "Yes."], strict=True)
    ]
    assert [turn["role"] for turn in result.rows["llava/000000005"]["conversations"]] == ["system", "user", "assistant"]
    assert [reason for _, reason in result.rejects] == [
        "text_only", "several_images", "broken_dialogue", "missing_caption", "no_image",
    ]  # fmt: skip
    kept = download(card_of("table", options, ["conversations"], text_only="keep"), at / "kept")
    assert kept.rows.keys() - result.rows.keys() == {"llava/000000001"}
    row = kept.rows["llava/000000001"]
    assert [turn["text"] for turn in row["conversations"]] == ["text only", "yes"]
    assert [row[name] for name in ("image", "width", "height", "sha256")] == [None] * 4
    assert kept.rejects == [reject for reject in result.rejects if reject[1] != "text_only"]


@pytest.mark.slow
def test_a_broken_element_of_an_array_costs_no_other(at):
    """Neither does its offset: each shard begins to read at its own first element."""
    llava_images(at / "images")
    options = {"files": "llava.json", "root": "images", "texts": {"conversations": "conversations"}}
    card = card_of("table", options, ["conversations"])
    good = json.dumps(LLAVA[0]).encode()
    elements = {
        good: None, good.replace(b"Sure?", b"caf\xe9"): "broken_text", b'{"image": "\\ud83d"}': "missing_caption",
        good.replace(b"Sure?", b"\\ud83d"): "broken_text", good.replace(b"1.jpg", b"\\ud83d"): "broken_text",
        b"": "broken_line", b"[" * 100_000 + b"]" * 100_000: "broken_line", good + b"}": "broken_line",
        b'{"image": [[[1]]], "x": "]}, \\" {["}': "no_image", b"1 2": "broken_line", b'"' + b"x" * (17 << 20) + b'"':
        "broken_line", good.replace(b"Yes.", b'Say \\"[{\\\\'): None,
        good.replace(b"1.jpg", b"x" * 5000): "missing_image",
        good.replace(b"1.jpg", b"\\u0000"): "missing_image", good + b" ": None,
    }  # fmt: skip
    put(at / "llava.json", BOM_UTF8 + b" [" + b",\n".join(elements) + b"\n]\n")
    for shard_rows in (1, 4, 100):
        result = download(card, at / f"raw-{shard_rows}", shard_rows=shard_rows)
        found = dict(result.rejects) | dict.fromkeys(result.rows)
        assert [found[f"llava/{number:09d}"] for number in range(len(elements))] == list(elements.values())
    for ending in (b"]", b"", b",", b'{"image"', b'{"x": "', b"]]", b"}"):
        put(at / "llava.json", b"[" + good + b"," + good + (b"," + ending if ending[:1] == b"{" else ending))
        result = download(card, at / f"raw-{ending!r}")
        assert len(result.rows) == (1 if ending == b"}" else 2)
        assert {reason for _, reason in result.rejects} <= {"broken_list", "broken_line"}
        assert bool(result.rejects) == (ending != b"]")
    for nothing in (b'{"image": "x"}', b"", b"\xff\xfe[\0"):
        put(at / "llava.json", nothing)
        with pytest.raises(DataError, match=r"none of 1 rows is kept: 1 broken_list, the first 'llava/000000000'"):
            download(card, at / "nothing")
    put(at / "llava.json", b"[ ]")
    with pytest.raises(ConfigError, match="card sample: a 'table' source finds nothing"):
        download(card, at / "nothing")


def test_an_array_is_read_piece_by_piece(at):
    data = b'{"number": 0.5, "text": "' + b"\\\\" * 70 + b'"}'
    put(at / "long.json", b"[" + (data + b",") * 20_000 + b"broken")
    tracemalloc.start()
    with list_files.entries_of(at / "long.json") as entries:
        assert all(next(entries)[0] == data for _ in range(20_000))
        assert next(entries)[0] == b"broken"
        with pytest.raises(EOFError, match="the array does not end"):
            next(entries)
    assert tracemalloc.get_traced_memory()[1] < 1.5e6  # of a file of 3.4 MB
    tracemalloc.stop()


def test_internvls_meta_file(at):
    llava_images(at / "data/images")
    put(at / "data/a.jsonl", jsonl([LLAVA[0], b"{broken", LLAVA[2], LLAVA[5]]))
    put(at / "data/b.jsonl", jsonl([LLAVA[0], LLAVA[1]]))
    meta = {
        "half": {"root": "images/", "annotation": "a.jsonl", "data_augment": False, "repeat_time": 0.75, "length": 4},
        "twice": {"root": "images", "annotation": "b.jsonl", "data_augment": False, "repeat_time": 2, "length": 2},
    }
    put(at / "data/meta.json", json.dumps(meta).encode())
    result = download(card_of("table_meta", {"meta": "data/meta.json", "root": "data"}, ["conversations"]), at / "raw")
    assert sorted(result.rows) == ["half/000000000", "half/000000002", "twice/000000000", "twice~1/000000000"]
    assert result.rejects == [("half/000000001", "broken_line"), ("twice/000000001", "text_only"),
                            ("twice~1/000000001", "text_only")]  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "internvl_sft"])
def test_the_cards_of_instruction_tuning_keep_dialogues_without_an_image(at, name):
    """With the template that the paper's stages read them with."""
    folder = at / "archives" / name
    llava_images(folder / "images")
    if name == "llava":
        put(folder / "llava_v1_5_mix665k.json", json.dumps(LLAVA[:2]).encode())
    else:
        put(folder / "a.jsonl", jsonl(LLAVA[:2]))
        meta = {"a": {"root": "images", "annotation": "a.jsonl", "repeat_time": 1, "length": 2}}
        put(folder / "meta.json", json.dumps(meta).encode())
    card = load_card(name, DATASETS)
    result = download(card, at / "raw")
    assert result.rejects == []
    assert [row["image"] is None for _, row in sorted(result.rows.items())] == [False, True]
    kept = filtered(card, at / "raw", at / "filtered")
    assert kept.rows.keys() == result.rows.keys()
    paper = yaml.safe_load((DATASETS.parent / "experiments/paper.yaml").read_text())
    tracks = [track for stage in paper["stages"].values() for track in stage["tracks"].values()]
    entries = [entry for track in tracks for entry in track["mixture"] if entry["dataset"] == "internvl_sft"]
    assert len(entries) == 2
    for entry in entries:
        pieces = written(TEMPLATES[entry["template"]], max(result.rows.items())[1][entry["text"]], images=0)
        assert "".join(piece.text for piece in pieces if piece.supervised) == f" yes{TURN_END}"

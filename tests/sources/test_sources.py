"""Each source on small files in the exact layout of its publisher, quirks included. Nothing is lost uncounted."""

import io
import json
import shutil
import tracemalloc
from codecs import BOM_UTF8
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from archive_samples import PNG, card_of, download, filtered, gzipped, jpeg, jsonl, put, tarred
from PIL import Image

from unifork.config import load_card
from unifork.documents.prompts import TEMPLATES, written
from unifork.errors import ConfigError, DataError
from unifork.images import crop_view
from unifork.shards.task import Slice
from unifork.sources import RowError, Source, SourceOptions, list_files, plan, rows_of, source_of
from unifork.sources.imagenet import sentences
from unifork.vocabulary import TURN_END

DATASETS = Path(__file__).parent.parent.parent / "datasets"
PROMPTS = b"""
templates: ["a photo of a {}.", "itap of my {}.", "a {} in a video game."]
names: [tench, "potter's wheel", kite (bird of prey)]
"""
SYNSETS = ("n01440764", "n01443537", "n01484850")


@pytest.fixture
def at(tmp_path, monkeypatch):
    """Work in an empty folder; cards name relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---------------------------------------------------------------------------------------- ImageNet

CMYK = jpeg("img1", "CMYK")
IMAGES = {
    "n01440764": [("n01440764_18.JPEG", jpeg("img0")), ("n01440764_2.JPEG", CMYK), ("n01440764_9.JPEG", PNG["img2"])],
    "n01443537": [("n01443537_1.JPEG", jpeg("img3"))],
    "n01484850": [("n01484850_7.JPEG", jpeg("img4")), ("n01484850_8.JPEG", b"\xff\xd8 broken")],
}


def official_tar(folder):
    inner = [(f"{synset}.tar", tarred(IMAGES[synset])) for synset in reversed(SYNSETS)]
    return put(folder / "ILSVRC2012_img_train.tar", tarred(inner))


def unpacked_tars(folder):
    for synset, members in IMAGES.items():
        put(folder / "tars" / f"{synset}.tar", tarred(members))
    return folder / "tars"


def class_folders(folder):
    for synset, members in IMAGES.items():
        for name, data in members:
            put(folder / "train" / synset / name, data)
    return folder / "train"


def hub_parquet(folder):
    rows = [
        {"image": {"bytes": data, "path": name}, "label": label}
        for label, synset in enumerate(SYNSETS)
        for name, data in IMAGES[synset]
    ]
    (folder / "hub").mkdir()
    for number, part in enumerate((rows[:4], rows[4:])):
        path = folder / f"hub/train-{number:05d}-of-00002.parquet"
        pq.write_table(pa.Table.from_pylist(part), path, row_group_size=2)
    return folder / "hub"


def imagenet(path, **more):
    options = {"path": path.name, "prompts": "prompts.yaml", **more}
    return card_of("imagenet", options, ["class_prompt", "class_name"])


@pytest.mark.parametrize("layout", [official_tar, unpacked_tars, class_folders, hub_parquet])
def test_imagenet_in_all_its_forms_has_the_same_images_and_names(at, layout):
    put(at / "prompts.yaml", PROMPTS)
    card = imagenet(layout(at))
    result = download(card, at / "raw")
    assert result.rejects == []
    names = ["tench", "potter's wheel", "kite (bird of prey)"]
    expected = {data: names[SYNSETS.index(synset)] for synset, members in IMAGES.items() for _, data in members}
    assert {row["image"]: row["class_name"] for row in result.rows.values()} == expected
    for row in result.rows.values():
        assert row["class_prompt"] in {
            text.format(row["class_name"]) for text in ("a photo of a {}.", "itap of my {}.", "a {} in a video game.")
        }
        assert row["license"] == "CC0-1.0"
    kept = filtered(card, at / "raw", at / "filtered")
    assert kept.manifest.dropped == {"not_an_image": 1}
    (cmyk,) = [row for key, row in result.rows.items() if key in kept.rows and row["image"] == CMYK]
    assert Image.open(io.BytesIO(cmyk["image"])).mode == "CMYK"
    assert crop_view(Image.open(io.BytesIO(cmyk["image"])), 16, None).shape == (16, 16, 3)


def test_the_sentence_of_a_image_depends_on_its_key_and_the_seed_alone(at):
    put(at / "prompts.yaml", PROMPTS)
    card = imagenet(official_tar(at))
    texts = {}
    for shard_rows in (1, 2, 5):
        result = download(card, at / f"raw-{shard_rows}", shard_rows=shard_rows)
        texts[shard_rows] = {key: row["class_prompt"] for key, row in result.rows.items()}
    assert texts[1] == texts[2] == texts[5]
    assert {task.seed for task in plan(card, None, 2, 7)} == {7}


def test_imagenet_with_damage_loses_only_what_is_damaged(at):
    put(at / "prompts.yaml", PROMPTS)
    whole = tarred([*IMAGES["n01440764"], IMAGES["n01440764"][0]])
    cut_off = tarred(IMAGES["n01484850"])
    inner = [("n01440764.tar", whole), ("n01443537.tar", b"not a tar"), ("n01484850.tar", cut_off[:-10600])]
    put(at / "train.tar", tarred(inner))
    result = download(imagenet(at / "train.tar"), at / "raw")
    assert sorted(result.rows)[:3] == [f"n01440764/n01440764_{number}" for number in (18, 2, 9)]
    assert ("n01440764/n01440764_18", "duplicate_key") in result.rejects
    assert ("n01443537", "broken_archive") in result.rejects
    assert any(key.startswith("n01484850") and reason == "broken_archive" for key, reason in result.rejects)


def test_a_part_of_imagenet_needs_the_order_of_all_classes(at):
    put(at / "prompts.yaml", PROMPTS)
    put(at / "train/n01484850/a.JPEG", jpeg("img0"))
    with pytest.raises(ConfigError, match=r"1 classes, but 3 class names.*source\.options\.synsets"):
        download(imagenet(at / "train"), at / "raw")
    put(at / "LOC_synset_mapping.txt", "".join(f"{synset} some, names\n" for synset in SYNSETS).encode())
    result = download(imagenet(at / "train", synsets="LOC_synset_mapping.txt"), at / "raw")
    assert [row["class_name"] for row in result.rows.values()] == ["kite (bird of prey)"]


def test_the_hubs_test_split_has_no_labels(at):
    put(at / "prompts.yaml", PROMPTS)
    (at / "hub").mkdir()
    rows = [{"image": {"bytes": PNG["img0"], "path": "x"}, "label": -1}, {"image": None, "label": 1}]
    pq.write_table(pa.Table.from_pylist(rows), at / "hub/test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"none of 2 rows is kept: 1 no_label, the first 'test-.*/0000000': label -1"):
        download(imagenet(at / "hub"), at / "raw")
    pq.write_table(pa.Table.from_pylist([*rows, {**rows[0], "label": 2}]), at / "hub/test-00000-of-00001.parquet")
    result = download(imagenet(at / "hub"), at / "raw")
    assert [reason for _, reason in result.rejects] == ["no_label", "missing_image"]
    assert len(result.rows) == 1


# ------------------------------------------------------------------------------- pairs of one name


def test_webdataset_tars_keep_every_sample_whatever_the_order_of_members(at):
    put(at / "wds/dalle3/shards-00001.tar", tarred([
        ("./b.txt", b"second, text first"), ("a.jpg", jpeg("img0")), ("b.jpg", PNG["img1"]), ("a.txt", b" a cat \n"),
        ("._a.jpg", b"left by macOS"), ("c.jpg", jpeg("img2")), ("d.txt", b"no image"), ("a.txt", b"again"),
        ("e.JPG", jpeg("img3")), ("e.txt", b""), ("f.jpg", jpeg("img4")), ("f.txt", b"\xff\xfe"), ("a.json", b"{}"),
    ]))  # fmt: skip
    put(at / "wds/geneval_train/shards-00001.tar", tarred([("a.jpg", jpeg("img5")), ("a.txt", b"two dogs")]))
    card = card_of("pairs", {"files": "wds"}, ["caption"])
    result = download(card, at / "raw")
    place = "dalle3/shards-00001"
    assert {key: row["caption"] for key, row in result.rows.items()} == {
        f"{place}/a": "a cat", f"{place}/b": "second, text first", f"{place}/e": "",
        "geneval_train/shards-00001/a": "two dogs",
    }  # fmt: skip
    assert result.rejects == [
        (f"{place}/a", "duplicate_key"), (f"{place}/c", "missing_caption"),
        (f"{place}/d", "missing_image"), (f"{place}/f", "broken_text"),
    ]  # fmt: skip
    assert result.rows[f"{place}/b"]["image"] == PNG["img1"], "a PNG that is called jpg stays as it is"
    assert filtered(card, at / "raw", at / "filtered").manifest.dropped == {"no_text": 1}


@pytest.mark.parametrize("captions", ["folder", "tar.gz"])
@pytest.mark.parametrize("images", ["tar", "folder"])
def test_sa1b_joins_captions_that_lie_apart_by_name(at, captions, images):
    members = [(f"sa_{n}.jpg", jpeg(f"img{n}")) for n in range(5)] + [("sa_0.json", b'{"annotations": []}')]
    texts = [(f"captions/sa_{n}.txt", f"The image features {n}.".encode()) for n in (0, 1, 3, 4, 77)]
    if images == "tar":
        put(at / "sa/sa_000000.tar", tarred(members[:3] + members[-1:]))
        put(at / "sa/sa_000001.tar", tarred(members[3:5]))
    else:
        for number, (name, data) in enumerate(members):
            put(at / f"sa/sa_00000{int(number > 2)}" / name, data)
    if captions == "folder":
        for name, data in texts:
            put(at / name, data)
    else:
        put(at / "SA1B_caption.tar.gz", tarred(texts, "w:gz"))
    where = "captions" if captions == "folder" else "SA1B_caption.tar.gz"
    result = download(card_of("pairs", {"files": "sa", "captions": where}, ["caption"]), at / "raw")
    found = {key.rpartition("/")[2]: row["caption"] for key, row in result.rows.items()}
    assert found == {f"sa_{n}": f"The image features {n}." for n in (0, 1, 3, 4)}
    assert result.rejects == [("sa_000000/sa_2", "missing_caption")]


def test_a_tar_that_breaks_off_keeps_what_came_before(at):
    pairs = [[(f"{number}.txt", b"x"), (f"{number}.jpg", jpeg(f"img{number}"))] for number in range(7)]
    data = tarred([member for pair in pairs for member in pair])
    packed = gzipped(data)
    at_a_header = data.index(b"5.txt") + 100
    for name, cut in (
        ("plain.tar", data[: len(data) // 2]), ("header.tar", data[:at_a_header]),
        ("damaged.tar", data[:at_a_header] + b"?" * 50 + data[at_a_header + 50 :]),
        ("packed.tar.gz", packed[: len(packed) // 2]),
    ):  # fmt: skip
        put(at / name / name, cut)
        result = download(card_of("pairs", {"files": name}, ["caption"]), at / f"raw-{name}")
        assert len(result.rows) >= 1
        assert "broken_archive" in {reason for _, reason in result.rejects}


# --------------------------------------------------------------------------------- lists of images

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


# ------------------------------------------------------------------------------------ texts alone


def test_a_corpus_of_lists_and_tables(at):
    texts = [f"Text {number}." for number in range(7)]
    put(at / "corpus/a.jsonl", jsonl([{"text": texts[0]}, b"{broken", {"text": None}, {"text": texts[1], "n": 5}]))
    put(at / "corpus/b.jsonl.gz", gzipped(jsonl([{"text": texts[2]}])))
    put(at / "corpus/c.json", json.dumps([{"text": texts[3]}, {"text": "\ud83d"}]).encode())
    table = pa.table({"text": [*texts[4:], None], "n": [1, 2, 3, 4]})
    pq.write_table(table, at / "corpus/d.parquet", row_group_size=2)
    put(at / "corpus/e.parquet", b"PAR1 broken")
    options = {"files": "corpus", "texts": {"text": "text"}, "keep": {"n": "n"}}
    card = card_of("table", {"image": None, **options}, ["text"], text_only="keep", columns=["n"])
    with pytest.raises(ConfigError, match=r"d\.parquet: unknown column 'm'"):
        download(
            card_of("table", {"image": None, **options} | {"keep": {"m": "m"}}, ["text"], text_only="keep"), at / "raw"
        )
    result = download(card, at / "raw")
    assert {key: row["text"] for key, row in result.rows.items()} == {
        "a/000000000": texts[0], "a/000000003": texts[1], "b/000000000": texts[2], "c/000000000": texts[3],
        **{f"d/{number:09d}": texts[4 + number] for number in range(3)},
    }  # fmt: skip
    assert [result.rows[key]["n"] for key in ("a/000000003", "d/000000001")] == ["5", "2"]
    assert {row["image"] for row in result.rows.values()} == {None}
    assert result.rejects == [
        ("a/000000001", "broken_line"), ("a/000000002", "missing_caption"), ("c/000000001", "broken_text"),
        ("d/000000003", "missing_caption"), ("e/000000000", "broken_list"),
    ]  # fmt: skip
    measured = filtered(card, at / "raw", at / "filtered")
    assert measured.rows.keys() == result.rows.keys()


def test_dialogues_of_a_table_are_translated(at):
    pq.write_table(pa.table({"conversations": [dialogue("Q", "A"), dialogue("Q")]}), at / "sft.parquet")
    options = {"files": "sft.parquet", "texts": {"conversations": "conversations"}}
    result = download(card_of("table", {"image": None, **options}, ["conversations"], text_only="keep"), at / "raw")
    assert result.rows["sft/000000000"]["conversations"] == [
        {"role": "user", "text": "Q"}, {"role": "assistant", "text": "A"},
    ]  # fmt: skip


def test_a_corpus_whose_card_drops_texts_is_refused(at):
    put(at / "a.jsonl", jsonl([{"text": "x"}]))
    with pytest.raises(ConfigError, match="card sample: text_only: no row of its source has an image; say text_"):
        source_of(card_of("table", {"image": None, "files": "a.jsonl", "texts": {"text": "text"}}, ["text"]))


# --------------------------------------------------------------------------------------- all kinds


def test_a_new_set_with_a_known_kind_is_one_file(at):
    card = yaml.safe_load((DATASETS / "llava.yaml").read_text())
    card |= {"name": "mine", "source": {"kind": "pairs", "options": {"files": "$IMAGES/*.tar"}},
             "tasks": {"generation": {"view": "crop", "texts": ["caption"]}}}  # fmt: skip
    shutil.copytree(DATASETS, at / "datasets")
    (at / "datasets/mine.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ConfigError, match=r"card mine: .*the environment variable IMAGES is not set"):
        download(load_card("mine"), at / "raw")


def test_rows_limits_what_is_read_and_a_file_at_the_end_adds_its_shard_alone(at):
    for number in range(3):
        put(at / f"wds/{number}.tar", tarred([("a.jpg", jpeg(f"img{number}")), ("a.txt", b"x")]))
    card = card_of("pairs", {"files": "wds"}, ["caption"])
    assert len(download(card, at / "two", rows=2).manifest.shards) == 2
    before = download(card, at / "raw").manifest
    put(at / "wds/3.tar", tarred([("a.jpg", jpeg("img3")), ("a.txt", b"x")]))
    job = download(card, at / "raw").manifest
    assert [s.inputs for s in job.shards[:3]] == [s.inputs for s in before.shards]
    assert len(job.shards) == 4


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_what_variables_hold_reaches_no_file_and_no_message(at, monkeypatch, capsys, name):
    put(at / "private-7731/wds/a.tar", tarred([("a.jpg", jpeg("img0")), ("a.txt", b"x")]))
    monkeypatch.setenv("IMAGES", "private-7731")
    monkeypatch.setenv(name, "private-7731")
    download(card_of("pairs", {"files": "${IMAGES}/wds", "access": "ask"}, ["caption"]), at / "raw")
    with pytest.raises(ConfigError, match=f"must not hold .{name}") as refused:
        download(card_of("pairs", {"files": f"${name}/wds"}, ["caption"]), at / "raw2")
    contents = [path.read_bytes() for path in (at / "raw").rglob("*") if path.is_file()]
    assert contents
    assert not any(b"7731" in data for data in contents)
    assert "7731" not in str(refused.value) + "".join(capsys.readouterr())


def test_options_are_checked_and_missing_files_say_where_they_are(at):
    with pytest.raises(ConfigError, match=r"card sample: .*nowhere.*no such file.*Where it is: ask the makers"):
        download(card_of("pairs", {"files": "nowhere", "access": "ask the makers"}, ["caption"]), at / "raw")
    unknown = r"card sample: source\.options: unknown key 'file'\. Did you mean 'files'\? Known: access, captions"
    with pytest.raises(ConfigError, match=unknown):
        source_of(card_of("pairs", {"files": ".", "file": "x"}, ["caption"]))
    with pytest.raises(ConfigError, match=r"card sample: source\.options\.files: Field required"):
        source_of(card_of("pairs", {}, ["caption"]))
    with pytest.raises(ConfigError, match=r"unknown kind of source 'pair'\. Did you mean 'pairs'\?.*it is: ask them"):
        source_of(card_of("pair", {"access": "ask them"}, ["caption"]))


def test_how_a_person_gets_the_files_is_part_of_no_fingerprint():
    options = [source_of(card_of("pairs", {"files": "x", **more}, ["caption"]))[1] for more in ({}, {"access": "ask"})]
    assert options[0].fingerprint() == options[1].fingerprint()


@pytest.mark.parametrize(
    ("kind", "options", "name", "reader"),
    [
        ("pairs", {"files": "a.parquet"}, "a.parquet", "read by table"),
        ("pairs", {"files": "folder"}, "folder/a.jsonl", "read by table"),
        ("table", {"files": "*.tar", "root": ".", "texts": {"caption": "c"}}, "a.tar", "read by pairs"),
    ],
)
def test_a_file_of_another_kind_says_who_reads_it(at, kind, options, name, reader):
    put(at / name, b"x")
    with pytest.raises(ConfigError, match=rf"card sample: {Path(name).name}: this kind reads \.\w+, .*{reader}"):
        plan(card_of(kind, options, ["caption"]), None, 2, 0)


def test_a_source_without_entries_is_an_error(at):
    put(at / "a.jsonl", b"")
    card = card_of("table", {"files": "a.jsonl", "root": ".", "texts": {"caption": "c"}}, ["caption"])
    with pytest.raises(ConfigError, match="card sample: a 'table' source finds nothing"):
        plan(card, None, 2, 0)


def test_another_seed_makes_only_what_depends_on_it_anew(at):
    put(at / "wds/a.tar", tarred([("a.jpg", jpeg("img0")), ("a.txt", b"x")]))
    pairs, world = card_of("pairs", {"files": "wds"}, ["caption"]), load_card("shapes", DATASETS)
    assert plan(pairs, None, 2, 1) == plan(pairs, None, 2, 2)
    assert plan(world, 5, 2, 1) != plan(world, 5, 2, 2)
    assert [task.rows for task in plan(world, 5, 2, 1)] == [2, 2, 1]
    with pytest.raises(ConfigError, match=r"card shapes: .* endless; say how many rows"):
        plan(world, None, 2, 1)


class Numbers(SourceOptions):
    first: int = 0


NUMBERS = Source(
    Numbers,
    lambda options, shard_rows: iter([Slice(options.first, options.first + shard_rows)]),
    lambda options, piece, seed: (
        RowError(str(number), "no_image", "a number") for number in range(piece.start, piece.stop)
    ),
)


def test_anybodys_code_is_a_source(at):
    card = card_of(f"{__name__}:NUMBERS", {"first": 3}, ["caption"])
    (task,) = plan(card, None, 2, 0)
    assert [fault.key for fault in rows_of(card, task)] == ["3", "4"]
    with pytest.raises(ConfigError, match="is a function, not a Source"):
        source_of(card_of(f"{__name__}:jsonl", {}, ["caption"]))


def test_openais_sentences_are_part_of_the_package():
    shipped = sentences(None)
    assert (len(shipped.names), len(set(shipped.templates))) == (1000, 80)
    assert (shipped.names[0], shipped.names[999]) == ("tench", "toilet paper")


def test_wrong_sentences_are_named(at):
    put(at / "prompts.yaml", b"names: [tench]\ntemplates: ['a photo of {c}.']\n")
    with pytest.raises(ConfigError, match=r"prompts\.yaml: templates\.0: .*a photo of \{c\}"):
        sentences("prompts.yaml")

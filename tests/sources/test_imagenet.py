"""ImageNet in all its forms."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import PNG, card_of, download, filtered, jpeg, put, tarred
from PIL import Image

from unifork.errors import ConfigError, DataError
from unifork.images import crop_view
from unifork.sources import plan

PROMPTS = b"""
templates: ["a photo of a {}.", "itap of my {}.", "a {} in a video game."]
names: [tench, "potter's wheel", kite (bird of prey)]
"""
SYNSETS = ("n01440764", "n01443537", "n01484850")
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

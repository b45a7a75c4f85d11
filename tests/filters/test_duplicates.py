"""Near duplicates: hashes, which of them stay, and benchmarks that nothing may resemble."""

import io
import random
import shutil

import pytest
import yaml
from archive_samples import PNG, card_of, download, filtered, measured_beside, put, tarred
from PIL import Image, ImageEnhance
from tiny import REPOSITORY, run_here

from unifork.config import load_card
from unifork.errors import ConfigError, DataError
from unifork.filters import duplicates as dedup
from unifork.filters.measure import Measure, measure_job
from unifork.filters.worker import filter_job
from unifork.images import measure
from unifork.shards.manifest import read_manifest
from unifork.shards.task import ShardTask


def variants(name):
    """The same bytes, a JPEG of it, a darker and a smaller one."""
    whole = Image.open(io.BytesIO(PNG[name])).convert("RGB").resize((64, 64))
    out = {}
    for kind, image in (
        ("png", whole),
        ("darker", ImageEnhance.Brightness(whole).enhance(0.8)),
        ("smaller", whole.resize((48, 48))),
    ):
        data = io.BytesIO()
        image.save(data, "PNG")
        out[kind] = data.getvalue()
    return out


def test_the_difference_hash_stays_when_a_image_is_changed_a_little():
    values = {}
    for name in ("img1", "img3"):
        hashes = [measure(data).phash for data in variants(name).values()]
        values[name] = hashes[0]
        assert max((hashes[0] ^ other).bit_count() for other in hashes) <= 4
    assert (values["img1"] ^ values["img3"]).bit_count() > 12
    flat = io.BytesIO()
    Image.new("RGB", (50, 50), "white").save(flat, "PNG")
    assert measure(flat.getvalue()).phash is None


def shards(folder, images, count):
    """Image-text shards of (name, bytes, caption) in `count` tars."""
    step = -(-len(images) // count)
    for number in range(count):
        members = [
            member
            for name, data, text in images[number * step : (number + 1) * step]
            for member in ((f"{name}.png", data), (f"{name}.txt", text.encode()))
        ]
        put(folder / f"{number}.tar", tarred(members))
    return folder


def sign(card, raw, folder, shuffle=None):
    measured = measured_beside(raw)
    run_here([measure_job(card, raw, measured)], Measure(card))
    job, worker = dedup.sign_job(card, measured, folder), dedup.Sign(card)
    order = job.missing()
    random.Random(shuffle).shuffle(order)
    for task in order:
        job.add(worker(task))
    job.finish()
    return folder


def duplicate_card(name, files, *rules):
    return card_of("pairs", {"files": str(files)}, ["caption"], name=name, filters=list(rules))


@pytest.mark.parametrize("rows_at_once", [1, 10**6])
def test_duplicates_go_whatever_the_shards_and_their_order(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(dedup, "BUCKET_ROWS", rows_at_once)
    img1, img3, img4 = variants("img1"), variants("img3"), variants("img4")
    own = [
        ("a", img1["png"], "first"), ("b", img3["png"], ""), ("c", img1["png"], "again"),
        ("d", img3["png"], "stays: b has no text"), ("e", img1["darker"], "looks like a"),
        ("f", img4["smaller"], "in the other set"), ("g", img4["png"], "also"),
    ]  # fmt: skip
    theirs = shards(tmp_path / "first", [("x", img4["png"], "the other set")], 1)
    first = duplicate_card("first", theirs)
    download(first, tmp_path / "raw-first")
    signed = {"first": sign(first, tmp_path / "raw-first", tmp_path / "signed-first")}
    found = []
    for count, shuffle in ((1, 0), (2, 1), (7, 2)):
        rule = {"rule": "duplicates", "options": {"by": ["sha256", "phash"], "distance": 4, "against": ["first"]}}
        card = duplicate_card("second", shards(tmp_path / f"second-{count}", own, count), rule)
        raw = tmp_path / f"raw-{count}"
        download(card, raw, shard_rows=3)
        signatures = sign(card, raw, tmp_path / f"signed-{count}", shuffle)
        with pytest.raises(ConfigError, match="duplicates looks at other rows"):
            filter_job(card, measured_beside(raw), tmp_path / "never")
        target = tmp_path / f"filtered-{count}"
        result = filtered(card, raw, target, dedup.decide(card, signatures, signed, target))
        found.append([key.rpartition("/")[2] for key in result.rows])
        assert result.manifest.dropped == {"duplicates": 4, "no_text": 1}
        details = {key.rpartition("/")[2]: detail for key, detail in result.details.items()}
        assert "0/a" in details["c"]
        assert "0/x" in details["f"]
        assert "0/x" in details["g"]
    assert found == [["a", "d"]] * 3


def test_the_filter_program_signs_decides_and_drops(tmp_path, monkeypatch):
    from pipelines import filter as program

    monkeypatch.chdir(tmp_path)
    shutil.copytree(REPOSITORY / "clusters", "clusters")
    img1, img3 = variants("img1"), variants("img3")
    cards = {
        "left": duplicate_card("left", shards(tmp_path / "left", [("x", img1["png"], "theirs")], 1)),
        "right": duplicate_card(
            "right", shards(tmp_path / "right", [("a", img3["png"], "own"), ("b", img1["png"], "shared")], 2),
            {"rule": "duplicates", "options": {"against": ["left"]}},
        ),
    }  # fmt: skip
    for name, card in cards.items():
        put(tmp_path / f"datasets/{name}.yaml", yaml.safe_dump(card.model_dump(mode="json")).encode())
        download(card, tmp_path / "data/raw" / name)
    for _ in range(2):
        program.main("right")
        manifest = read_manifest(tmp_path / "data/filtered/right")
        assert (manifest.rows, manifest.dropped) == (1, {"duplicates": 1})


def test_two_sets_cannot_both_leave_it_to_the_other(tmp_path):
    left, right = (
        duplicate_card(name, tmp_path, {"rule": "duplicates", "options": {"against": [against]}})
        for name, against in (("left", "right"), ("right", "left"))
    )
    with pytest.raises(ConfigError, match="each is `against` the other"):
        dedup.check_order(left, [right])
    assert dedup.compared_with(left) == ["right"]
    assert not dedup.looks_around(load_card("shapes"))


def test_near_duplicates_of_a_benchmark_go(tmp_path):
    img1, img3 = variants("img1"), variants("img3")
    put(tmp_path / "bench/q.png", img1["png"])
    rule = {"rule": "near_benchmark", "options": {"files": str(tmp_path / "bench"), "distance": 4}}
    own = [("a", img3["png"], "x"), ("b", img1["darker"], "y"), ("c", img1["smaller"], "z")]
    card = duplicate_card("own", shards(tmp_path / "own", own, 2), rule)
    download(card, tmp_path / "raw")
    target = tmp_path / "filtered"
    drops = dedup.decide(card, sign(card, tmp_path / "raw", tmp_path / "signed"), {}, target)
    result = filtered(card, tmp_path / "raw", target, drops)
    assert [key.rpartition("/")[2] for key in result.rows] == ["a"]
    assert result.manifest.dropped == {"near_benchmark": 2}
    assert all("q.png" in detail for detail in result.details.values())
    put(tmp_path / "filtered/duplicates/part-00000.parquet", b"changed")
    from unifork.filters.worker import duplicates_of

    with pytest.raises(DataError, match="changed since it was decided"):
        duplicates_of(ShardTask(output=str(target / "part-00000.parquet"), duplicates="another"))


def test_bands_find_what_comparing_all_pairs_finds():
    import numpy as np

    generator = np.random.default_rng(0)
    base = generator.integers(0, 2**63, 40, dtype=np.uint64)
    flips = generator.integers(0, 64, (40, 3))
    near = base.copy()
    for column in flips.T:
        near ^= np.uint64(1) << column.astype(np.uint64)
    values = generator.permutation(np.concatenate([base, near]))
    numbers = np.arange(len(values))
    expected = {i for i in range(80) if any((int(values[i]) ^ int(values[j])).bit_count() <= 3 for j in range(i))}
    found = set()
    for band in range(4):
        part = (values >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        for group in dedup.groups(values, numbers, part):
            found |= {row for row, _ in dedup.nearest_duplicates(*group, 3)}
    assert found == expected
    assert len(found) >= 35

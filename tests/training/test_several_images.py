"""Rows of several images: each measured and encoded, in order, where its mark stands; dropped where one is broken."""

import hashlib

import numpy as np
import pytest
import yaml
from archive_samples import PNG, filtered, jsonl, put
from stage_runs import job, weights
from test_text_only import HEAD, dropped, make, opened, rows_in
from tiny import CHANGES, copy_of, prepare, run_here, write_experiment
from typer.testing import CliRunner

from unifork.batch import BEGIN_IMAGE, IMAGE, TEXT
from unifork.cli import app
from unifork.config import load_card
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.filters.duplicates import Sign, decide, sign_job
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.layout import Layout
from unifork.publish.card import Offer
from unifork.publish.publication import build, fetch
from unifork.publish.stores import open_store
from unifork.shards.job import read_table
from unifork.shards.manifest import read_manifest
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

NAMES = sorted(PNG)
CARD = HEAD | {
    "name": "several", "text_only": "keep", "several_images": "keep",
    "source": {"kind": "table", "options": {"files": "archives/list.jsonl", "root": "archives/images", "texts":
               {"conversations": "conversations", "caption": "caption"}}},
    "tasks": {"generation": {"view": "crop", "texts": ["caption"]},
              "understanding": {"view": "pad", "texts": ["conversations"]}},
    "filters": [{"rule": "min_side", "options": {"pixels": 8}}],
}  # fmt: skip
ANSWER = {"dataset": "several", "task": "understanding", "text": "conversations", "template": "answers-plain",
          "weight": 0.8}  # fmt: skip
DRAW = {"dataset": "several", "task": "generation", "text": "caption", "template": "generate", "weight": 0.2}
IMAGES_OF = {n: [NAMES[(n + k) % len(NAMES)] for k in range(n % 4)] for n in range(16)}
"""Row -> its images, in order: none to three."""


def entry(names: list[str], number: int) -> dict:
    question = " and ".join(f"<image> {n}" for n in range(len(names))) or "Nothing"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"image": [f"{name}.png" for name in names], "conversations": turns, "caption": f"Caption {number}."}


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    root = copy_of(tiny_root, tmp_path_factory.mktemp("several") / "root")
    for name in ("experiments/tiny.yaml", "params.yaml"):
        (root / name).unlink()
    small = PNG[NAMES[0]][:60]  # begins as an image does
    bad = [["small"], [NAMES[1], "small", NAMES[2]], [NAMES[1], NAMES[2], "gone"], [NAMES[0]] * 65]
    rows = [entry(names, n) for n, names in IMAGES_OF.items()] + [entry(names, 16 + n) for n, names in enumerate(bad)]
    rows.append({**entry(NAMES[:2], 20), "conversations": entry(NAMES[:1], 20)["conversations"]})
    put(root / "archives/list.jsonl", jsonl(rows))
    for name, data in (PNG | {"small": small}).items():
        put(root / f"archives/images/{name}.png", data)
    put(root / "datasets/several.yaml", yaml.safe_dump(CARD).encode())
    changes = {"datasets": CHANGES["datasets"] | {"several": {"shard_rows": 6}},
               "stages": {"s2-pretrain": {"tracks": {"joint": {"mixture": [ANSWER, DRAW]}}}}}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        experiment = write_experiment(root, changes)
        make(root, "several", 6)
        prepare(root, experiment)
    return root


def key(number: int) -> str:
    return f"list/{number:09d}"


def test_each_image_is_measured_and_one_that_cannot_be_used_costs_its_row(root):
    layout = Layout(root)
    raw, measured = rows_in(layout.raw("several")), rows_in(layout.measured("several"))
    for number, names in IMAGES_OF.items():
        row = raw[key(number)]
        images = [image for image in (row, *(row["more_images"] or ())) if image["image"]]
        assert [image["image"] for image in images] == [PNG[name] for name in names]
        hashes = [hashlib.sha256(PNG[name]).hexdigest() for name in names]
        assert [image["sha256"] for image in images] == hashes
        looked_at = [measured[key(number)], *(measured[key(number)]["more_images"] or ())]
        assert [image["sha256"] for image in looked_at if image["sha256"]] == hashes
        assert all(image["phash"] is not None and image["bytes"] > 0 for image in looked_at[: len(names)])
        assert not any("image" in image for image in looked_at)
    assert dropped(layout.raw("several")) == {"missing_image": 1, "several_images": 1}
    details = quarantine(layout.raw("several")) | quarantine(layout.filtered("several"))
    assert details[key(18)][1].startswith("image 3 of 3: 'gone.png'")
    assert details[key(19)] == ("several_images", "65 images, at most 64 are read")
    assert details[key(17)][0] == details[key(16)][0]
    assert details[key(17)][1] == f"image 2 of 3: {details[key(16)][1]}"
    assert rows_in(layout.filtered("several")).keys() == {key(n) for n in (*IMAGES_OF, 20)}


def quarantine(folder) -> dict:
    import pyarrow.parquet as pq

    rows = [row for path in folder.glob("quarantine/*.parquet") for row in pq.read_table(path).to_pylist()]
    return {row["key"]: (row["reason"], row["detail"]) for row in rows}


def test_codes_are_those_of_each_image_alone_and_stand_at_their_marks(root):
    encoder = CodeEncoder(root / "tokenizers/image", "pad", (255, 255, 255), 64)
    alone = {name: encoder.encode_images([PNG[name]]).reshape(36, 4) for name in NAMES}
    part, tokenizer = opened(root, ANSWER), TextTokenizer(root / "tokenizers/text")
    assert sorted(part.key(n) for n in range(len(part))) == [key(n) for n in IMAGES_OF]
    assert dropped(part.folder) == {"broken_dialogue": 1}
    assert quarantine(part.folder)[key(20)][1] == "image markers: 1, images: 2"
    for index in range(len(part)):
        document = part.document(index)
        names = IMAGES_OF[int(document.key[-9:])]
        assert (document.codes_ND == np.concatenate([np.zeros((0, 4)), *(alone[name] for name in names)])).all()
        assert len(document) == part.length(index)
        text, begun = "", 0
        for kind, number in zip(document.kinds_T, document.text_ids_T, strict=True):
            text += tokenizer.decode([int(number)]) if kind == TEXT else "<image>" if kind == BEGIN_IMAGE else ""
            begun += kind == BEGIN_IMAGE
        question = " and ".join(f"<image> {n}" for n in range(len(names))) or "Nothing"
        question = "<image>\n0" if len(names) == 1 else question  # in front of it, as always
        assert text == f"{question}Answer {document.key[-9:].lstrip('0') or '0'}."
        assert (begun, (document.kinds_T == IMAGE).sum()) == (len(names), 36 * len(names))
        supervised = tokenizer.decode(document.text_ids_T[document.loss_mask_T].tolist())
        assert supervised == text.removeprefix(question)
    drawn = opened(root, DRAW)
    assert {drawn.key(n) for n in range(len(drawn))} == {key(n) for n, names in IMAGES_OF.items() if len(names) == 1}
    assert dropped(drawn.folder) == {"several_images": 9, "no_image": 4}


def test_a_stage_trains_on_them(root, tmp_path):
    stage_job = job(copy_of(root, tmp_path / "root"), steps=6)
    train_stage(stage_job, WorkerContext())
    assert weights(stage_job)


def test_a_rule_is_asked_for_every_image_and_names_its_number(root, tmp_path):
    card = load_card("several", root / "datasets")
    rows = rows_in(root / "data/measured/several")
    most = sorted(rows[key(n)]["bytes"] for n in IMAGES_OF if IMAGES_OF[n])[8]
    rule = card.filters[0].model_copy(update={"rule": "max_bytes", "options": {"most": most}})
    result = filtered(card.model_copy(update={"filters": (rule,)}), root / "data/raw/several", tmp_path / "filtered")
    fits = {n for n, names in IMAGES_OF.items() if all(len(PNG[name]) <= most for name in names)}
    assert result.rows.keys() - {key(20)} == {key(n) for n in fits}
    for number in IMAGES_OF.keys() - fits:
        first = next(n for n, name in enumerate(IMAGES_OF[number], 1) if len(PNG[name]) > most)
        count = len(IMAGES_OF[number])
        assert result.details[key(number)].startswith(f"image {first} of {count}: " if count > 1 else "{'most'")


def test_rows_that_share_any_image_are_duplicates_and_no_row_is_its_own(root, tmp_path):
    card = load_card("several", root / "datasets")
    rule = card.filters[0].model_copy(update={"rule": "duplicates", "options": {"by": ["sha256"]}})
    card = card.model_copy(update={"filters": (rule,)})
    (signed,) = run_here([sign_job(card, root / "data/measured/several", tmp_path / "signatures")], Sign(card))
    assert signed.rows == 4 + sum(map(len, IMAGES_OF.values())) + 2
    lists = decide(card, tmp_path / "signatures", {}, tmp_path / "filtered")
    result = filtered(card, root / "data/raw/several", tmp_path / "filtered", lists)
    seen, kept = set(), set()
    for number, names in [*IMAGES_OF.items(), (20, NAMES[:2])]:
        if not seen & set(names):
            kept.add(key(number))
        seen |= set(names)
    assert result.rows.keys() == kept


def test_a_withdrawn_hash_takes_the_row_whichever_image_it_is_of(root, tmp_path, monkeypatch):
    copy = copy_of(root, tmp_path / "root")
    monkeypatch.chdir(copy)
    put(copy / "gone.txt", f"sha256 {hashlib.sha256(PNG[IMAGES_OF[3][2]]).hexdigest()}\n".encode())
    CliRunner().invoke(app, ["takedown", "several", "gone.txt"], catch_exceptions=False)
    left = {key(n) for n, names in IMAGES_OF.items() if IMAGES_OF[3][2] not in names}
    for folder in ("raw", "measured", "filtered", "codes"):
        place = copy / "data" / folder / "several" / ("pad" if folder == "codes" else "")
        assert rows_in(place).keys() & {key(n) for n in IMAGES_OF} == left


def test_a_publication_has_all_images_and_comes_back_byte_for_byte(root, tmp_path, monkeypatch):
    copy = copy_of(root, tmp_path / "root")
    monkeypatch.chdir(copy)
    build("several", Layout(), copy / "out", None, Offer("unifork"))
    fetch(open_store(str(copy / "out")), "again", Layout())
    for shard in read_manifest(copy / "data/codes/several/pad").shards:
        there, here = (copy / f"data/codes/{name}/pad/{shard.path}" for name in ("several", "again"))
        assert there.read_bytes() == here.read_bytes()
    published = rows_in(copy / "out/pad")
    assert {n: len(published[key(n)]["codes"]) for n in IMAGES_OF} == {n: len(names) for n, names in IMAGES_OF.items()}


def test_people_see_each_image(root, tmp_path, monkeypatch):
    copy = copy_of(root, tmp_path / "root")
    monkeypatch.chdir(copy)
    done = CliRunner().invoke(app, ["inspect", "--stage", "s2-pretrain", "--documents", "99"], catch_exceptions=False)
    assert "[image 36x4 codes] 0 and [image 36x4 codes] 1 and [image 36x4 codes] 2" in done.output


def test_a_card_that_drops_them_counts_them(root, monkeypatch):
    from unifork.sources import Materialize, download_job

    monkeypatch.chdir(root)
    card = load_card("several", root / "datasets").model_copy(update={"several_images": "drop"})
    (manifest,) = run_here([download_job(card, None, 6, 0, root / "data/raw-dropped")], Materialize(card))
    assert manifest.dropped["several_images"] == 8 + 1 + 2
    assert "more_images" not in read_table(root / "data/raw-dropped", manifest.shards[0]).column_names

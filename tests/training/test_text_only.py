"""Rows of texts alone, from a corpus and from a list of both kinds: the same rows in every folder, then trained on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from archive_samples import PNG, filtered, jsonl, put
from stage_runs import job, weights
from tiny import CHANGES, copy_of, filter_here, prepare, run_here, write_experiment
from typer.testing import CliRunner

from unifork.batch import IMAGE, TEXT
from unifork.cli import app
from unifork.config import MixtureEntry, load_card
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import CodesIdentity, MixturePart
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.image_tokenizer.samples import sample_views
from unifork.layout import Layout
from unifork.publish.card import Offer
from unifork.publish.publication import build, fetch
from unifork.publish.stores import open_store
from unifork.report.images import sample_rows
from unifork.shards.job import KeptRows, read_table
from unifork.shards.manifest import present, read_manifest
from unifork.sources import Materialize, download_job
from unifork.training.history import VALIDATION, read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

HEAD = {"title": "t", "homepage": "h", "license": "CC0-1.0", "attribution": "a", "redistribute_codes": True}
TEXTS = [f"Plain text number {n}, which mentions <image> and <|im_end|> as letters." for n in range(40)]
CORPUS = HEAD | {
    "name": "corpus", "text_only": "keep", "held_out": 0.2,
    "source": {"kind": "table", "options": {"image": None, "files": "archives/corpus", "texts": {"text": "text"}}},
    "tasks": {"understanding": {"view": "pad", "texts": ["text"]}},
    "filters": [{"rule": "min_side", "options": {"pixels": 4000}},
                {"rule": "text_length", "options": {"column": "text", "least": 5, "most": 1000}},
                {"rule": "duplicates", "options": {"by": ["sha256", "phash"]}}],
}  # fmt: skip
MIXED = HEAD | {
    "name": "mixed", "text_only": "keep",
    "source": {"kind": "table", "options": {"files": "archives/mixed.jsonl", "root": "archives/images", "texts":
               {"conversations": "conversations", "caption": "caption"}}},
    "tasks": {"generation": {"view": "crop", "texts": ["caption"]},
              "understanding": {"view": "pad", "texts": ["conversations"]}},
    "filters": [{"rule": "min_side", "options": {"pixels": 8}}],
}  # fmt: skip
ANSWER, SPEAK, DRAW = mixture = [
    {"dataset": "mixed", "task": "understanding", "text": "conversations", "template": "answers-plain", "weight": 0.5},
    {"dataset": "corpus", "task": "understanding", "text": "text", "template": "text", "weight": 0.3},
    {"dataset": "mixed", "task": "generation", "text": "caption", "template": "generate", "weight": 0.2},
]


def entries() -> list:
    """Rows 0 to 23: two thirds with an image, one third without; then one of each kind that is left out."""
    names = sorted(PNG)

    def turns(number: int, mark: bool) -> list:
        return [{"from": "human", "value": f"{'<image>' * mark}\nQuestion {number}?"},
                {"from": "gpt", "value": f"Answer {number}."}]  # fmt: skip

    rows: list = [
        {"image": f"{names[n % len(names)]}.png", "conversations": turns(n, True), "caption": f"Caption {n}."}
        if n % 3
        else {"conversations": turns(n, False), "caption": f"A caption of nothing {n}." if n % 2 else None}
        for n in range(24)
    ]
    return [
        *rows,
        {"conversations": turns(24, True)},
        {"image": "gone.png", "conversations": turns(25, True)},
        {"image": [f"{names[0]}.png", f"{names[1]}.png"], "conversations": turns(26, True)},
        {"image": 7, "conversations": turns(27, False)},
        b"{broken",
    ]


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory):
    """A root with both sets, prepared."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("texts") / "root")
    for name in ("experiments/tiny.yaml", "params.yaml"):
        (root / name).unlink()
    put(
        root / "archives/corpus/a.jsonl", jsonl([{"text": text} for text in TEXTS[:25]] + [{"text": ""}, {"text": "x"}])
    )
    put(root / "archives/corpus/b.json", json.dumps([{"text": text} for text in TEXTS[25:]]).encode())
    put(root / "archives/mixed.jsonl", jsonl(entries()))
    for name, data in PNG.items():
        put(root / f"archives/images/{name}.png", data)
    for card in (CORPUS, MIXED):
        put(root / f"datasets/{card['name']}.yaml", yaml.safe_dump(card).encode())
    tracks = {"tracks": {"joint": {"mixture": mixture}}}
    sets = {"corpus": {"shard_rows": 20}, "mixed": {"shard_rows": 10}}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        changes = {"datasets": CHANGES["datasets"] | sets, "stages": {"s2-pretrain": tracks}}
        experiment = write_experiment(root, changes)
        for name, use in sets.items():
            make(root, name, use["shard_rows"])
        prepare(root, experiment)
    return root


def make(root: Path, name: str, shard_rows: int) -> None:
    """The way of a set to its codes, in this process."""
    layout, card = Layout(root), load_card(name, root / "datasets")
    run_here([download_job(card, None, shard_rows, 0, layout.raw(name))], Materialize(card))
    filter_here(card, layout.raw(name), layout.measured(name), layout.filtered(name), {})
    kept, tokenizer = KeptRows(layout, name), root / "tokenizers/image"
    jobs = [encode_job(card, t, kept, layout.codes / name / use.view, tokenizer) for t, use in card.tasks.items()]
    run_here(jobs, Encode(card, tokenizer, "cpu"))


def rows_in(folder: Path) -> dict:
    return {r["key"]: r for s in present(folder).shards for r in read_table(folder, s).to_pylist()}


def dropped(folder: Path) -> dict:
    return read_manifest(folder).dropped


MIXED_KEYS = {f"mixed/{n:09d}": n % 3 != 0 for n in range(24)}
"""Key -> whether the row has an image."""
CORPUS_KEYS = {f"a/{n:09d}": n for n in range(25)} | {f"b/{n:09d}": 25 + n for n in range(15)}


def test_the_same_rows_are_in_every_folder(root):
    layout = Layout(root)
    raw = rows_in(layout.raw("mixed"))
    assert {key: row["image"] is not None for key, row in raw.items()} == MIXED_KEYS
    assert dropped(layout.raw("mixed")) == {
        "broken_line": 1, "missing_image": 1, "no_image": 2, "several_images": 1,
    }  # fmt: skip
    empty = [raw[key] for key, has_image in MIXED_KEYS.items() if not has_image]
    assert {(row["width"], row["height"], row["sha256"], row["url"]) for row in empty} == {(None, None, None, "")}
    measured = rows_in(layout.measured("mixed"))
    for key, has_image in MIXED_KEYS.items():
        values = [measured[key][name] for name in ("bytes", "scans", "frames", "phash", "width")]
        assert all(value is not None for value in values) if has_image else set(values) == {None}
    assert rows_in(layout.filtered("mixed")).keys() == MIXED_KEYS.keys()
    for view, texts in (("pad", MIXED_KEYS), ("crop", {k: i for k, i in MIXED_KEYS.items() if raw[k]["caption"]})):
        codes = rows_in(layout.codes / "mixed" / view)
        assert {key: len(row["codes"]) for key, row in codes.items()} == texts
    assert rows_in(layout.prepared / "mixed-conversations-answers-plain").keys() == MIXED_KEYS.keys()
    drawn = rows_in(layout.prepared / "mixed-caption-generate")
    assert drawn.keys() == {key for key, has_image in MIXED_KEYS.items() if has_image}
    assert dropped(layout.prepared / "mixed-caption-generate") == {"no_image": 4}
    assert dropped(layout.raw("corpus")) == {"missing_caption": 1}
    assert dropped(layout.filtered("corpus")) == {"text_length": 1}  # no rule about images
    for folder in (layout.filtered("corpus"), layout.codes / "corpus/pad", layout.prepared / "corpus-text-text"):
        assert rows_in(folder).keys() == CORPUS_KEYS.keys()
    assert all(row["codes"] == [] for row in rows_in(layout.codes / "corpus/pad").values())


def test_documents_are_exactly_the_texts(root):
    tokenizer = TextTokenizer(root / "tokenizers/text")
    part, held = (opened(root, SPEAK, held_out=held_out) for held_out in (False, True))
    card = load_card("corpus", root / "datasets")
    assert 0 < len(held) < len(part)
    for documents, is_held_out in ((part, False), (held, True)):
        for index in range(len(documents)):
            document = documents.document(index)
            assert card.holds_out(document.key) == is_held_out
            assert set(document.kinds_T) == {TEXT}
            assert document.codes_ND.shape == (0, 4)
            assert document.text_ids_T.tolist() == [
                tokenizer.id_of("<|im_start|>"), *tokenizer.encode(TEXTS[CORPUS_KEYS[document.key]]),
                tokenizer.id_of("<|im_end|>"),
            ]  # fmt: skip
            assert document.loss_mask_T.tolist() == [False] + [True] * (len(document) - 1)
            assert documents.length(index) == len(document)
            assert documents.supervised(index) == len(document) - 1
    answers = opened(root, ANSWER)
    for index in range(len(answers)):
        document = answers.document(index)
        number, has_image = int(document.key[-9:]), MIXED_KEYS[document.key]
        assert (document.kinds_T == IMAGE).sum() == len(document.codes_ND) == 36 * has_image
        supervised = tokenizer.decode(document.text_ids_T[document.loss_mask_T].tolist())
        assert supervised == f"Answer {number}."
        if has_image:
            row = rows_in(root / "data/codes/mixed/pad")[document.key]
            assert (document.codes_ND == np.frombuffer(row["codes"][0], "<u2").reshape(36, 4)).all()


def identity_of(root):
    lineage = read_manifest(root / "data/codes/shapes/pad").lineage
    return CodesIdentity(36, 4, lineage["codebook_id"], lineage["encoder_id"])


def opened(root, entry, context=400, held_out=False):
    tokenizer, entry = TextTokenizer(root / "tokenizers/text"), MixtureEntry.model_validate(entry)
    return MixturePart(entry, Layout(root), tokenizer, identity_of(root), context, held_out=held_out)


def test_a_long_text_is_left_out_whole_and_counted(root):
    whole = opened(root, SPEAK)
    lengths = sorted(map(whole.length, range(len(whole))))
    short = opened(root, SPEAK, context=lengths[3])
    assert max(short.length(n) for n in range(len(short))) <= lengths[3]
    (reason,) = short.quarantined
    assert reason == f"longer than the context of {lengths[3]} tokens"


def test_a_stage_trains_on_them_and_validates(root, tmp_path):
    stage_job = job(copy_of(root, tmp_path / "root"), steps=12)
    track = stage_job.stage.tracks["joint"]
    tokenizer = TextTokenizer(root / "tokenizers/text")
    loader = TrackLoader("joint", track, Layout(root), tokenizer, identity_of(root), seed=stage_job.seed,
                         context=stage_job.stage.context, row_tokens=384, rows_per_microbatch=1)  # fmt: skip
    plans = [loader.plan(step, 1) for step in range(12)]
    for plan in plans:
        batches = list(loader.batches(plan, 0))
        assert sum(len(batch.text_target_S) for batch in batches) == plan.text_targets
        assert sum(len(batch.image_target_MD) for batch in batches) == plan.image_targets
    served = [plan.keys[n] for plan in plans for n in range(8) if plan.slots[n].part == 0]
    first_pass = served[:24]
    assert sorted(first_pass) == sorted(MIXED_KEYS)  # every row once, with and without image
    train_stage(stage_job, WorkerContext())
    assert weights(stage_job)
    last = read(stage_job.run_folder)[-1]
    seen = {name: last[name] for name in last if name in loader.seen(12)}
    assert seen == loader.seen(12)
    assert seen == {
        "documents_understanding_mixed": len(served), "documents_understanding_corpus": 29,
        "documents_generation_mixed": 96 - 29 - len(served),
    }  # fmt: skip
    losses = {row["part"]: row for row in read(stage_job.run_folder, VALIDATION)}
    assert losses.keys() == {"corpus-text-text"}
    assert losses["corpus-text-text"]["text_loss"] > 0
    assert losses["corpus-text-text"]["image_loss"] is None


def test_a_card_that_drops_them_says_so(root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    card = load_card("mixed", root / "datasets").model_copy(update={"text_only": "drop"})
    (manifest,) = run_here([download_job(card, None, 10, 0, tmp_path / "raw")], Materialize(card))
    assert manifest.dropped == {
        "text_only": 8, "no_image": 2, "broken_line": 1, "missing_image": 1, "several_images": 1,
    }  # fmt: skip
    assert manifest.rows == 16


def test_a_publication_comes_back_byte_for_byte(root, tmp_path, monkeypatch):
    copy = copy_of(root, tmp_path / "root")
    monkeypatch.chdir(copy)
    for name, count in (("mixed", 16), ("corpus", 0)):
        build(name, Layout(), Path(f"out-{name}"), None, Offer("unifork"))
        fetch(open_store(f"out-{name}"), f"{name}-again", Layout())
        for path in Path(f"data/codes/{name}").rglob("*.parquet"):
            again = Path(f"data/codes/{name}-again") / path.relative_to(f"data/codes/{name}")
            if "quarantine" not in path.parts:
                assert again.read_bytes() == path.read_bytes()
        tables = [pq.read_table(path).to_pylist() for path in Path(f"out-{name}/pad").glob("*.parquet")]
        assert sum(len(row["codes"]) for table in tables for row in table) == count
        assert {len(image) for table in tables for row in table for image in row["codes"]} <= {36 * 4}


def test_a_row_without_an_image_is_taken_down_by_key(root, tmp_path, monkeypatch):
    copy = copy_of(root, tmp_path / "root")
    monkeypatch.chdir(copy)
    Path("gone.txt").write_text("key mixed/mixed/000000003\nhost example.org\n")
    done = CliRunner().invoke(app, ["takedown", "mixed", "gone.txt"], catch_exceptions=False)
    assert done.output.count(": 1 rows removed") == 6  # raw, measured, filtered, codes of two views, dialogues
    for folder in ("raw/mixed", "filtered/mixed", "codes/mixed/pad", "prepared/mixed-conversations-answers-plain"):
        assert rows_in(copy / "data" / folder).keys() == MIXED_KEYS.keys() - {"mixed/000000003"}


def test_people_see_them_as_texts(root, tmp_path, monkeypatch):
    copy = copy_of(root, tmp_path / "root")
    monkeypatch.chdir(copy)
    done = CliRunner().invoke(app, ["inspect", "--stage", "s2-pretrain", "--documents", "99"], catch_exceptions=False)
    assert r"<|im_start|>[[Plain text number" in done.output
    assert r"\<|im_end|> as letters." in done.output
    assert "[image 36x4 codes" in done.output


def test_the_filter_finds_no_duplicates_among_them(root, tmp_path):
    """Two passes of the real program would compare signatures; those of texts are null."""
    from unifork.filters.duplicates import Sign, decide, sign_job

    card = load_card("corpus", root / "datasets")
    measured = root / "data/measured/corpus"
    (signed,) = run_here([sign_job(card, measured, tmp_path / "signatures")], Sign(card))
    assert signed.rows == 40
    assert decide(card, tmp_path / "signatures", {}, tmp_path / "filtered") == {}
    shutil.rmtree(tmp_path / "filtered", ignore_errors=True)
    result = filtered(card.model_copy(update={"filters": card.filters[:2]}), root / "data/raw/corpus", tmp_path / "f")
    assert result.rows.keys() == CORPUS_KEYS.keys()


def test_the_report_and_image_tokenizers_look_at_rows_with_an_image(root):
    layout = Layout(root)
    card, kept = load_card("mixed", root / "datasets"), KeptRows(layout, "mixed")
    assert sample_rows(KeptRows(layout, "corpus"), load_card("corpus", root / "datasets")) == []
    assert {MIXED_KEYS[row["key"]] for row in sample_rows(kept, card)} == {True}
    assert {view: len(images) for view, images in sample_views(kept, card, 24, 0).items()} == {"crop": 16, "pad": 16}

"""Held-out rows: never trained on, in no order; their losses, answers and images, and what does not depend on them."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from distributed_testing import run_distributed
from stage_runs import RESOURCES, assert_equal, job, killed, weights, worker
from tiny import copy_of, hold_out, prepare

from unifork.batch import pack
from unifork.config import load_card
from unifork.config.experiment import Validation
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import CodesIdentity
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.inference import Engine
from unifork.layout import Layout
from unifork.models.modeling import load_model
from unifork.training.history import VALIDATION, read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage
from unifork.training.validation import Validation as HeldOut
from unifork.training.validation import spread, token_f1

pytestmark = pytest.mark.slow

SHARE = 0.15
OFTEN = Validation(every=3, documents=5, answers=4, prompts=3)


@pytest.fixture(scope="module")
def held_root(tiny_root, tmp_path_factory):
    root = copy_of(tiny_root, tmp_path_factory.mktemp("held") / "root")
    hold_out(root, SHARE)
    shutil.rmtree(root / "data" / "prepared")
    prepare(root, job(root).experiment)
    return root


@pytest.fixture
def root(held_root, tmp_path):
    return copy_of(held_root, tmp_path / "root")


@pytest.fixture(scope="module")
def finished(held_root, tmp_path_factory):
    stage_job = job(copy_of(held_root, tmp_path_factory.mktemp("finished") / "root"), validation=OFTEN)
    train_stage(stage_job, WorkerContext())
    return stage_job


def parts_of(root, *, held_out):
    stage_job = job(root)
    tokenizer = TextTokenizer(root / "models/unifork-init/text_tokenizer")
    config = load_model(root / "models/unifork-init").config
    identity = CodesIdentity(config.grid**2, config.depth, config.codebook_id, config.encoder_id, config.codebook_size)
    (track,) = stage_job.stage.tracks.values()
    sizes = {"context": stage_job.stage.context, "row_tokens": 384, "rows_per_microbatch": 1}
    return TrackLoader("joint", track, Layout(root), tokenizer, identity, seed=0, **sizes, held_out=held_out)


def test_the_hash_of_the_key_decides_and_no_order_holds_a_held_out_row(held_root):
    card = load_card("shapes", held_root / "datasets")
    trained, held = parts_of(held_root, held_out=False), parts_of(held_root, held_out=True)
    for part, other in zip(trained.parts, held.parts, strict=True):
        seen, unseen = ({p.key(n) for n in range(len(p))} for p in (part, other))
        assert seen
        assert unseen
        assert {key for key in seen | unseen if card.holds_out(key)} == unseen
    served = {key for step in range(60) for key in trained.plan(step, 1).keys}
    assert not any(card.holds_out(key) for key in served)
    share = np.mean([card.holds_out(f"key-{n}") for n in range(4000)])
    assert share == pytest.approx(SHARE, abs=4 * math.sqrt(SHARE * (1 - SHARE) / 4000))
    larger = card.model_copy(update={"held_out": 0.4})
    assert all(larger.holds_out(key) for key in map(str, range(2000)) if card.holds_out(key))


def test_losses_are_those_of_the_held_out_documents_one_by_one(finished):
    rows = [row for row in read(finished.run_folder, VALIDATION) if row["finished_steps"] == 8]
    model = load_model(finished.model_folder)
    documents = parts_of(finished.layout.root, held_out=True)
    assert [row["part"] for row in rows] == [part.entry.prepared for part in documents.parts]
    for row, part in zip(rows, documents.parts, strict=True):
        text, image, words, codes = 0.0, 0.0, 0, 0
        indices = spread(len(part), OFTEN.documents)
        assert row["documents"] == len(indices)
        for index in indices:
            document = part.document(index, documents.supervised_positions)
            batch = pack([[document]], len(document), model.config.depth)
            with torch.no_grad():
                losses = model(batch)
            text, image = text + float(losses.text_loss_sum), image + float(losses.image_loss_sum_D.sum())
            words, codes = words + len(batch.text_target_S), codes + batch.image_target_MD.numel()
        assert row["text_loss"] == (pytest.approx(text / words, rel=1e-5) if words else None)
        assert row["image_loss"] == (pytest.approx(image / codes, rel=1e-5) if codes else None)


def test_they_are_taken_before_the_first_step_in_between_and_after_the_last(finished):
    rows = read(finished.run_folder, VALIDATION)
    assert sorted({row["finished_steps"] for row in rows}) == [0, 3, 6, 8]
    assert {row["track"] for row in rows} == {"joint"}
    with open(finished.model_folder / "training" / "validation.csv") as handle:
        table = list(csv.DictReader(handle))
    assert [row["part"] for row in table] == [row["part"] for row in rows]
    log = (finished.run_folder / "log.txt").read_text()
    assert f"held-out losses after step 8: {rows[-2]['part']}" in log


def test_weights_do_not_depend_on_validation(root, finished):
    """Nor the history, nor the order."""
    stage_job = job(root, validation=Validation(every=1000, documents=1, answers=0, prompts=0))
    assert stage_job.fingerprint() == finished.fingerprint()
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), weights(finished))
    assert read(stage_job.run_folder) == read(finished.run_folder)


def test_another_share_is_another_run(root, finished):
    hold_out(root, 0.3)
    prepare(root, finished.experiment)
    assert job(root, validation=OFTEN).fingerprint() != finished.fingerprint()


@pytest.mark.parametrize("where", ["before the update", "between latest and the metrics"])
def test_after_a_kill_the_record_is_the_same(root, finished, where):
    stage_job = job(root, validation=OFTEN)
    killed(stage_job, where, 5 if "update" in where else 2)
    train_stage(stage_job, WorkerContext())
    assert read(stage_job.run_folder, VALIDATION) == read(finished.run_folder, VALIDATION)
    assert_equal(weights(stage_job), weights(finished))


@pytest.mark.parametrize("shard", ["none", "all"])
def test_two_workers_find_the_same_losses(root, finished, shard):
    stage_job = job(root, resources=RESOURCES.model_copy(update={"shard": shard}), validation=OFTEN)
    run_distributed(worker, 2, stage_job.model_dump(mode="json"))
    for row, other in zip(read(stage_job.run_folder, VALIDATION), read(finished.run_folder, VALIDATION), strict=True):
        assert row.keys() == other.keys()
        for name, value in row.items():
            assert value == (pytest.approx(other[name], rel=1e-3) if "loss" in name and value else other[name]), name


def test_a_finished_stage_says_what_its_model_makes_of_them(finished):
    folder = finished.model_folder / "training"
    found, images = json.loads((folder / "held_out.json").read_text()), np.load(folder / "held_out.npz")
    documents = parts_of(finished.layout.root, held_out=True)
    texts = [part for part in documents.parts if part.task == "understanding"]
    assert [row["part"] for row in found["scores"]] == [part.entry.prepared for part in texts]
    for part, score in zip(texts, found["scores"], strict=True):
        rows = [row for row in found["answers"] if row["part"] == part.entry.prepared]
        assert score["answers"] == len(rows) == min(OFTEN.answers, len(part))
        assert score["token_f1"] == pytest.approx(np.mean([token_f1(row["answer"], row["expected"]) for row in rows]))
        assert all(row["expected"] for row in rows)
    assert len(found["prompts"]) == OFTEN.prompts
    (part,) = [part for part in documents.parts if part.task == "generation"]
    chosen = spread(len(part), OFTEN.prompts)
    assert np.array_equal(images["codes"], [part.codes(index) for index in chosen])
    assert images["drawn"].shape == images["codes"].shape
    tokenizer = TextTokenizer(finished.model_folder / "text_tokenizer")
    for row, index in zip(found["prompts"], chosen, strict=True):
        assert tokenizer.encode(row["prompt"])
        document = part.document(index)
        assert row["prompt"] in tokenizer.decode(document.text_ids_T.tolist())
        assert "USER" not in row["prompt"]


def test_without_held_out_rows_nothing_is_measured(root, finished):
    hold_out(root, None)
    prepare(root, finished.experiment)
    stage_job = job(root, validation=OFTEN, steps=3)
    train_stage(stage_job, WorkerContext())
    assert read(stage_job.run_folder, VALIDATION) == []
    assert not (stage_job.model_folder / "training" / "held_out.json").exists()


def test_a_perfect_model_is_right(finished, monkeypatch):
    """Answers that continue every document as it stands give 1."""
    original = Engine.answer_documents

    def perfect(self, begun, most):
        documents = parts_of(finished.layout.root, held_out=True)
        right = {}
        for part in documents.parts:
            for index in range(len(part)):
                document = part.document(index)
                start = int(document.loss_mask_T.argmax())
                ids = document.text_ids_T[start:][document.loss_mask_T[start:]]
                right[document.key, start] = self.tokenizer.decode(ids.tolist())
        assert len(original(self, begun, most)) == len(begun)
        return [right[document.key, len(document)] for document in begun]

    monkeypatch.setattr(Engine, "answer_documents", perfect)
    documents = {"joint": parts_of(finished.layout.root, held_out=True)}
    engine = Engine.load(finished.model_folder)
    words, _ = HeldOut(finished.stage.model_copy(update={"validation": OFTEN}), documents).examine(engine)
    assert words["scores"]
    assert all(score["exact_match"] == score["token_f1"] == 1.0 for score in words["scores"])


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("a red circle", "A red circle.", 1.0),
        ("a circle", "a red circle", 0.8),
        ("a a a", "a", 0.5),
        ("", "yes", 0.0),
        ("", "", 1.0),
        ("square", "circle", 0.0),
        ("红色的圆", "红色圆", 6 / 7),
    ],
)
def test_token_f1(answer, expected, value):
    assert token_f1(answer, expected) == pytest.approx(value)

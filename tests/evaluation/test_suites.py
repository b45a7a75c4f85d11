"""Every understanding benchmark: its layouts give the same items, and known answerers land on known scores."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from benchmark_files import NAMES, OFFICIAL, card_of, hub, items_of, png, table, write

from unifork.errors import ConfigError, DataError, UniForkError
from unifork.evaluation.answers import EXPORTS, join, origin_of, read_answers
from unifork.evaluation.archive import Archive, table_rows
from unifork.evaluation.items import AT_ONCE, identity, read_items, selected, write_items
from unifork.evaluation.scoring import NO_COUNT, NO_ERROR, score_answers
from unifork.evaluation.suites import Answer, suite_of
from unifork.shards.job import read_table
from unifork.shards.manifest import read_manifest

FIRST = {
    "pope": ("all", "pope"), "mme": ("all", "existence"), "seed": ("image", "accuracy"), "vqav2": ("all", "accuracy"),
    "gqa": ("all", "accuracy"), "mmbench_dev": ("all", "circular"),
}  # fmt: skip
MOST = {"mme": 200.0, "vqav2": 100.0}
CONSTANT = {
    "pope": ("Yes", 2 / 3),  # precision a half, recall 1
    "mme": ("Yes", 50.0),  # half of the questions, no image
    "seed": ("A", 2 / 7),
    "vqav2": ("yes", 50.0),
    "gqa": ("yes", 4 / 8),
    "mmbench_dev": ("A", 0.0),  # no question whose right letter moves
}
CHANCE = {
    "pope": 0.5, "mme": 75.0, "seed": 0.25, "vqav2": 100.0, "gqa": 6 / 8,
    "mmbench_dev": ((1 / 4) ** 4 + (1 / 3) ** 3 + (1 / 2) ** 2) / 3,
}  # fmt: skip
"""Of a coin or a letter at random, or of the most common answer of each kind of question."""


@pytest.fixture(params=NAMES)
def suite(request, tmp_path):
    """Name, card and items of a benchmark from its official files."""
    OFFICIAL[request.param](tmp_path)
    card, _, items = items_of(request.param, tmp_path)
    return request.param, card, selected(card, items)


def archive_of(name, folder):
    card = card_of(name)
    return Archive(card, suite_of(card)[1], folder)


def right_answer(name, item):
    return item.truth[0] if name == "vqav2" else item.truth


def scores_of(card, items, text_of):
    answers = {item.id: Answer(item.id, text_of(item)) for item in items}
    scores, lines = score_answers(card, items, answers, origin_of(Path("test")))
    return {(score.split, score.name): score for score in scores}, lines


def test_perfect_constant_and_empty_answers_score_what_is_known(suite):
    name, card, items = suite
    first, most = FIRST[name], MOST.get(name, 1.0)
    found, lines = scores_of(card, items, lambda item: right_answer(name, item))
    for (_, score), row in found.items():
        expected = 0.5 if "yes_ratio" in score else most
        assert row.value == pytest.approx(row.items and expected), score
        assert (row.missing, row.unread) == (0, 0.0)
    assert found[first].interval[1] == pytest.approx(most)
    assert all(line["verdicts"][rule]["right"] == 1.0 for line in lines for rule in card.score.rules)
    text, value = CONSTANT[name]
    assert scores_of(card, items, lambda item: text)[0][first].value == pytest.approx(value)
    empty, _ = scores_of(card, items, lambda item: "")
    assert empty[first].value == pytest.approx(2 / 3 if name == "pope" else 0.0)  # POPE reads nothing as yes
    assert empty[first[0], f"{first[1]}_strict"].value == 0.0
    assert empty[first[0], f"{first[1]}_strict"].unread == 1.0


@pytest.mark.parametrize("text", ["No", "Yes"])
def test_no_positives_nothing_predicted_and_one_cluster_are_defined_with_a_note(tmp_path, text):
    OFFICIAL["pope"](tmp_path)
    card, _, items = items_of("pope", tmp_path)
    negative = [item for item in items if item.truth == "no" and item.cluster == items[0].cluster]
    assert len({item.split for item in negative}) == 3
    scores, _ = scores_of(card, negative, lambda item: text)
    for (split, name), score in scores.items():
        assert (score.clusters, score.standard_error) == (1, None)
        of_nothing = name.startswith(("precision", "recall", "f1", "pope") if text == "No" else "recall")
        assert (NO_COUNT in score.note) == of_nothing, (split, name)
        assert NO_ERROR in score.note
        if of_nothing:
            assert score.value == 0.0
    assert all(score.note == "" for score in scores_of(card, items, lambda item: item.truth)[0].values())


def test_random_answers_score_chance_by_the_benchmarks_own_measure(suite):
    name, card, items = suite
    rng, values, pick = np.random.default_rng(0), [], {}
    for item in items:
        pick[item.id] = list(item.about.get("options", ("yes", "no")))
    common = {"vqav2": {"yes/no": "yes", "number": "2"}, "gqa": {"verify": "yes", "query": "table"}}.get(name)
    for _ in range(1 if common else 400):
        answer = (lambda item: common[item.about["type"]]) if common else (lambda item: rng.choice(pick[item.id]))
        found, _ = scores_of(card.model_copy(update={"score": card.score.model_copy(update={"rules": ("official",)})}),
                             items, answer)  # fmt: skip
        values.append(found[FIRST[name]].value)
    score = found[FIRST[name]]
    assert score.chance == pytest.approx(CHANCE[name])
    slack = 0.0 if common else 4 * np.std(values) / 20 + (0.02 if name == "pope" else 0)  # F1 is no mean of items
    assert np.mean(values) == pytest.approx(score.chance, abs=slack + 1e-9)


def test_the_hubs_tables_hold_the_same_items(suite, tmp_path):
    name, _, items = suite
    hub(name, tmp_path / "hub", tmp_path)
    card, archive, others = items_of(name, tmp_path / "hub")
    assert [item.question for item in selected(card, others)] == [item.question for item in items]
    assert identity(selected(card, others)) == identity(items)
    chosen, _ = suite_of(card)
    _, files, _ = items_of(name, tmp_path)
    for item, other in zip(items, selected(card, others), strict=True):
        assert chosen.image(archive, other.image) == chosen.image(files, item.image)


def test_a_table_gives_its_items_back_and_holds_each_image_once(suite, tmp_path):
    name, card, items = suite
    _, archive, _ = items_of(name, tmp_path)
    chosen, _ = suite_of(card)
    manifest = write_items(
        card, items, lambda image: chosen.image(archive, image), tmp_path / "table", {"revision": ""}
    )
    assert read_items(tmp_path / "table") == items
    assert manifest.lineage["items"] == identity(items)
    for shard in read_manifest(tmp_path / "table").shards:
        rows = read_table(tmp_path / "table", shard).to_pylist()
        assert len(rows) <= AT_ONCE
        held = [row["sha256"] for row in rows if row["bytes"]]
        assert len(held) == len(set(held)) == len({row["sha256"] for row in rows})
        numbers = [[row["sha256"] for row in rows].index(row["sha256"]) for row in rows]
        assert sorted(set(numbers)) == sorted(number for number, row in enumerate(rows) if row["bytes"])


@pytest.mark.parametrize("form", ["llava", "mme", "vqa", "gqa", "seed"])
def test_exports_are_read_back_with_the_same_verdicts(form, tmp_path):
    name = {"llava": "pope", "vqa": "vqav2"}.get(form, form)
    OFFICIAL[name](tmp_path / "files")
    card, _, items = items_of(name, tmp_path / "files")
    texts = ["Yes", "no.", "\n\tYes, it's\r\na \\n thing", "A", "", "two", "\\", "red,white\u2028x"]
    answers = {item.id: Answer(item.id, texts[number % len(texts)]) for number, item in enumerate(items)}
    for file, text in EXPORTS.find(form, "test")(card, [(item, answers[item.id]) for item in items]).items():
        write(tmp_path / "out" / file, text)
        if form == "mme":
            assert all(line.count("\t") == 3 for line in text.rstrip("\n").split("\n"))
    place = tmp_path / "out" if form == "mme" else next((tmp_path / "out").iterdir())
    back = join(card, items, read_answers(place), "test")
    for item in selected(card, items):
        rule = suite_of(card)[0].rules["official"]
        assert rule(item, back[item.id]) == rule(item, answers[item.id]), item


def test_a_submission_has_an_entry_for_every_test_question_and_no_scores(tmp_path):
    OFFICIAL["vqav2"](tmp_path)
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    part = json.loads(questions.read_text())["questions"][:3]
    write(tmp_path / "dev.json", {"questions": part})
    options = {"questions": questions.name, "annotations": None, "subset": "dev.json", "images": "test2015"}
    card, _, items = items_of("vqav2_test", tmp_path, options=options)
    questions = selected(card, items)
    assert (len(items), len(questions)) == (8, 3)
    answers = {item.id: Answer(item.id, "Yes, 1,000") for item in questions}
    assert score_answers(card, questions, answers, origin_of(Path("test")))[0] == []
    (text,) = EXPORTS.find("vqa", "test")(card, [(item, answers.get(item.id)) for item in items]).values()
    rows = json.loads(text)
    assert [row["answer"] for row in rows] == ["yes 1000"] * 3 + [""] * 5
    assert [row["question_id"] for row in rows] == [10 * number for number in range(8)]


def test_a_question_that_comes_again_under_its_id_is_another_item(tmp_path):
    OFFICIAL["seed"](tmp_path)
    card, _, items = items_of("seed", tmp_path)
    assert [item.id for item in items][:3] == ["101", "101#2", "102"]
    rows = [Answer(item.about["question_id"], str(n), None, item.question) for n, item in enumerate(items)]
    found = join(card, items, rows[::-1], "test")
    assert [found[item.id].text for item in items] == [str(number) for number in range(8)]


def test_the_sheet_that_is_sent_to_mmbench_is_read(tmp_path):
    OFFICIAL["mmbench_dev"](tmp_path)
    card, _, items = items_of("mmbench_dev", tmp_path)
    rows = ["index\tprediction", *(f"{item.id}\t{item.truth}." for item in items)]
    write(tmp_path / "sheet" / "answers.tsv", "\n".join(rows) + "\n")
    found = join(card, items, read_answers(tmp_path / "sheet" / "answers.tsv"), "test")
    assert scores_of(card, items, lambda item: found[item.id].text)[0]["all", "circular"].value == 1.0


def test_only_the_dimension_of_rotations_differs_between_the_two_scores_of_mmbench(tmp_path):
    OFFICIAL["mmbench_dev"](tmp_path)
    card, _, items = items_of("mmbench_dev", tmp_path)
    found, _ = scores_of(card, items, lambda item: "Z" if item.id == "241" else item.truth)
    assert found["all", "accuracy"].value == pytest.approx(8 / 9)
    assert found["all", "circular"].value == pytest.approx(2 / 3)
    assert (found["all", "circular"].items, found["all", "circular"].clusters) == (9, 3)


# ------------------------------------------------------------------------------------------ bad files


def changed(path, change):
    """A file of JSON, or of JSON lines, after a change of its content."""
    text = path.read_text()
    plain = (
        json.loads(text) if path.name != "coco_pope_random.json" else [json.loads(line) for line in text.splitlines()]
    )
    change(plain)
    write(path, plain)


def set_in(*keys, **values):
    """A change of what lies below some keys; None takes a key away."""

    def change(plain):
        for key in keys:
            plain = plain[key]
        for name, value in values.items():
            plain.pop(name) if value is None else plain.update({name: value})

    return change


SEED, VQA, PEOPLE = (
    "SEED-Bench.json",
    "v2_OpenEnded_mscoco_val2014_questions.json",
    "v2_mscoco_val2014_annotations.json",
)


@pytest.mark.parametrize(
    ("name", "file", "change", "problem"),
    [
        ("pope", "coco_pope_random.json", set_in(0, label=None), r"pope: .*no 'label' in \{.*wanted: coco_"),
        ("pope", "coco_pope_random.json", set_in(0, label="maybe"), r"random/1: its truth is 'maybe', allowed are yes"),
        ("pope", "coco_pope_random.json", set_in(0, text=3), r"random/1: its question is 3, a text is needed"),
        ("seed", SEED, set_in(questions=None), r"no 'questions' in \{\}"),
        ("seed", SEED, set_in("questions", 2, answer="c"), r"102: its truth is 'c', allowed are A, B, C, D"),
        ("seed", SEED, set_in("questions", 2, answer="E", choice_e="fifth"), r"its truth is 'E', allowed are A, B"),
        ("seed", SEED, set_in("questions", 2, choice_a=""), r"no choices in \{'answer': 'C'"),
        ("seed", SEED, set_in("questions", 2, data_type="Image"), r"unknown data_type 'Image'\. Did you mean 'image'"),
        ("seed", SEED, set_in("questions", 2, question_type_id=0), r"question 102: unknown question_type_id '0'"),
        ("vqav2", VQA, set_in("questions", 2, question_id=99), r"val2014_annotations.json: 1 questions .*: 99"),
        ("vqav2", PEOPLE, set_in("annotations", 2, answers=[]), r"vqav2: .*1 items lack a truth: 20"),
        ("gqa", "testdev_balanced_questions.json", set_in("02", imageId=7), r"02: its cluster is 7, a text is needed"),
    ],
)  # fmt: skip
def test_questions_that_nobody_can_answer_are_refused(tmp_path, name, file, change, problem):
    OFFICIAL[name](tmp_path)
    changed(tmp_path / file, change)
    archive = archive_of(name, tmp_path)
    suite, options = suite_of(archive.card)
    with pytest.raises(UniForkError, match=problem):
        suite.items_of(archive, options, 0)


def test_tables_with_another_category_or_damage_are_refused(tmp_path):
    OFFICIAL["mme"](tmp_path / "files")
    hub("mme", tmp_path / "hub", tmp_path / "files")
    archive = archive_of("mme", tmp_path / "hub")
    suite, options = suite_of(archive.card)
    (first, second) = sorted((tmp_path / "hub" / "data").iterdir())
    rows = pq.read_table(first).to_pylist()
    table(first, [{**row, "category": row["category"].upper()} for row in rows])
    with pytest.raises(UniForkError, match="parquet#0: unknown category 'EXISTENCE'"):
        suite.items_of(archive, options, 0)
    write(first, second.read_bytes()[:-9])
    table_rows.cache_clear()
    with pytest.raises(UniForkError, match=r"mme: .*hub: ArrowInvalid: .*wanted: MME_Benchmark_release_version"):
        suite.items_of(archive, options, 0)


def test_a_choice_of_seed_that_is_called_none_is_a_choice(tmp_path):
    OFFICIAL["seed"](tmp_path)
    changed(tmp_path / SEED, set_in("questions", 2, choice_a="None", choice_b="NA"))
    _, _, items = items_of("seed", tmp_path)
    assert items[2].about["options"] == {"A": "None", "B": "NA", "C": "thing c", "D": "thing d"}
    assert items[2].chance == 0.25


def test_a_table_of_mmbench_may_have_five_choices(tmp_path):
    head, row = (
        ["index", "question", "hint", *"ABCDE", "answer", "category", "image"],
        ["7", "Which?", "", *"vwxyz", "E", "c", "aGk="],
    )
    write(tmp_path / "mmbench_dev.tsv", "\ufeff" + "\t".join(head) + "\r\n" + "\t".join(row) + "\r\n")
    _, _, (item,) = items_of("mmbench_dev", tmp_path)
    assert (item.truth, item.question.splitlines()[-1], item.chance) == ("E", "E. z", 0.2)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-500]), "truncated|cut|broken"),
        (lambda path: path.write_bytes(b"<html>"), "no image of a known format"),
        (lambda path: path.write_bytes(png(side=1) * 0), "no bytes"),
    ],
    ids=["missing", "truncated", "another file", "empty"],
)
def test_images_that_cannot_be_used_are_counted_before_any_network_runs(tmp_path, damage, problem):
    OFFICIAL["pope"](tmp_path)
    card, archive, items = items_of("pope", tmp_path)
    damage(tmp_path / "val2014" / "COCO_val2014_red.jpg")
    with pytest.raises(DataError, match=rf"pope: 1 images cannot be used: COCO_val2014_red\.jpg: .*({problem})"):
        write_items(card, items, archive.image, tmp_path / "table", {})
    assert not (tmp_path / "table" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "link.png"])
def test_no_name_and_no_link_leads_out_of_an_archive(tmp_path, name):
    write(tmp_path / "secret.png", png())
    (tmp_path / "archive" / "val2014").mkdir(parents=True)
    (tmp_path / "archive" / "val2014" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"outside|leads out|leaves"):
        archive_of("pope", tmp_path / "archive").image(name)


def test_files_of_another_revision_and_ids_that_repeat_are_refused(tmp_path):
    OFFICIAL["gqa"](tmp_path)
    file = "testdev_balanced_questions.json"
    card, archive, items = items_of("gqa", tmp_path, rows=12578, sha256={file: "0" * 64}, revision="1.2")
    with pytest.raises(DataError, match=rf"{file}: sha256 is [0-9a-f]+, the card gqa wants 0000"):
        archive.check()
    with pytest.raises(DataError, match=r"gqa: 8 items; its card wants 12578 \(1\.2\)"):
        selected(card, items)
    with pytest.raises(DataError, match="gqa: 1 ids that come again: 00"):
        selected(card, [*items, items[0]])


def test_an_archive_that_is_not_there_says_what_to_put_where(tmp_path):
    archive = archive_of("mme", tmp_path / "nowhere")
    assert archive.absent.startswith("put MME_Benchmark_release_version/ as its makers send it")
    assert str(tmp_path / "nowhere") in archive.absent
    write(tmp_path / "some" / "file.txt", "x")
    with pytest.raises(DataError, match=r"no .*testdev_balanced_questions\.json: put"):
        items_of("gqa", tmp_path / "some")


def test_unknown_suites_rules_and_options_name_what_there_is():
    card = card_of("pope")
    for change, message in {
        "suite": r"card pope: items\.suite: unknown suite 'popes'.*Did you mean 'pope'",
        "options": r"card pope: items\.options: unknown key 'image'",
    }.items():
        wrong = {"suite": "popes"} if change == "suite" else {"options": {"image": "x"}}
        with pytest.raises(ConfigError, match=message):
            suite_of(card_of("pope", **wrong))
    wrong = card.model_copy(update={"score": card.score.model_copy(update={"rules": ("lenient",)})})
    with pytest.raises(ConfigError, match=r"score\.rules: unknown rule 'lenient'.*official, strict"):
        suite_of(wrong)

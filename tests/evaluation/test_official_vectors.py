"""The rules of GenEval, POPE, MME, VQAv2, SEED-Bench and GQA give what the official scorers gave on the same inputs."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from unifork.evaluation.generation.geneval import Clause, Found, judge, relations
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, binary, mean, share, value
from unifork.evaluation.suites import Answer
from unifork.evaluation.understanding import gqa, mme, seed, vqa
from unifork.evaluation.understanding.answers import mme_yes, normalized, pope_yes, strict_yes

VECTORS = json.loads((Path(__file__).parents[1] / "fixtures" / "score_vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["pope_answer_parse"], ids=lambda vector: repr(vector["answer"]))
def test_popes_reading_of_an_answer(vector):
    assert pope_yes(vector["answer"]) == (vector["official_label"] == "yes")


@pytest.mark.parametrize("vector", VECTORS["pope_metrics"], ids=["right", "never yes", "mixed"])
def test_popes_metrics(vector):
    labels = np.array([label == "yes" for label in vector["labels"]], dtype=float)
    yes = np.array([pope_yes(answer) for answer in vector["answers"]], dtype=float)
    ratios = binary(yes, labels, (yes == labels) * 1.0, np.ones(len(yes), dtype=bool))
    if "error" in vector["official"]:  # the official scorer divides by zero
        assert value([ratios["f1"]]) == 0.0
        return
    names = {"acc": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1", "yes_ratio": "yes_ratio"}
    for official, ours in names.items():
        assert value([ratios[ours]]) == pytest.approx(vector["official"][official])


@pytest.mark.parametrize("vector", VECTORS["mme_answer_parse"], ids=lambda vector: repr(vector["pred_field"]))
def test_mmes_reading_of_an_answer(vector):
    assert {True: "yes", False: "no", None: "other"}[mme_yes(vector["pred_field"])] == vector["official_label"]


@pytest.mark.parametrize("case", VECTORS["mme_scores"], ids=lambda case: case["case"])
def test_mmes_scores(case):
    items, answers = [], []
    for task in mme.TASKS:
        for number, row in enumerate(case["rows_per_task"].get(task, case["rows_per_task"]["*"])):
            image, question, truth, answer = row
            items.append(Item(f"{task}/{number}", question, truth.lower(), f"{task}/{image}", about={"task": task}))
            answers.append(answer)
    right = [mme.SUITE.rules["official"](*pair).right for pair in zip(items, map(answered, answers), strict=True)]
    found = {
        measure.name: value(measure.ratios) for measure in mme.measures(items, np.array(right), np.zeros(len(items)))
    }
    if "error" in case["official"]:  # a tab in an answer breaks the official scorer's lines, not the rule
        assert found["perception"] == 2000.0
    else:
        assert {name: found[name] for name in case["official"]} == pytest.approx(case["official"])


@pytest.mark.parametrize("vector", VECTORS["vqa_normalisation"], ids=lambda vector: repr(vector["input"]))
def test_vqas_texts(vector):
    plain = vector["input"].replace("\n", " ").replace("\t", " ").strip()
    assert vqa.words(vqa.unmarked(plain)) == vector["vqa_official_normalised"]
    assert vqa.processed(vector["input"]) == vector["llava_evalai_processor"]


@pytest.mark.parametrize("vector", VECTORS["vqa_accuracy"], ids=lambda vector: repr(vector["response"]))
def test_vqas_accuracy(vector):
    percent = 100 * vqa.accuracy(vector["response"], vector["answers"])
    assert round(percent, 2) == vector["official_accuracy_pct"]


def test_seeds_accuracies():
    vector = VECTORS["seed"]
    options = dict.fromkeys("ABCD", "something")
    items = [
        Item(name, "?", truth, name, "video" if name.startswith("v") else "image", "", 0.25, {"type": kind})
        for (name, truth), kind in zip(vector["answers"].items(), vector["types"].values(), strict=True)
    ]
    for item in items:
        item.about["options"] = options
    rule = seed.SUITE.rules["official"]
    right = [rule(item, answered(vector["predictions"][item.id])).right for item in items]
    found = {(m.split, m.name): value(m.ratios) for m in seed.measures(items, np.array(right), np.zeros(len(right)))}
    stated = dict(re.findall(r"(.*): ([\d.]+)%", vector["official_stdout"]))
    for split in ("image", "video"):
        assert f"{100 * found[split, 'accuracy']:.2f}" == stated[f"{split} accuracy"]
    assert f"{100 * found['image', 'scene_understanding']:.2f}" == stated["Scene Understanding"]
    assert f"{100 * found['image', 'instance_identity']:.2f}" == stated["Instance Identity"]


@pytest.mark.parametrize("vector", VECTORS["gqa_llava_prediction_text"], ids=lambda vector: repr(vector["model_text"]))
def test_gqas_conversion(vector):
    assert gqa.converted(answered(vector["model_text"])) == vector["llava_prediction"]
    assert gqa.converted(Answer("", "As It Is.", converted=True)) == "As It Is."


def answered(text):
    return Answer("", text)


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [("Yes.", True), (" no ", False), ("NO", False), ("", None), ("yes, it is", None), ("nope", None), ("no..", None)],
)
def test_the_strict_reading_takes_the_bare_word_only(answer, meaning):
    assert strict_yes(answer) is meaning


def test_normalized_answers():
    assert normalized("  Left \n of.") == "left of"


def clause(plain):
    position = plain.get("position")
    return Clause(plain["class"], plain["count"], plain.get("color"), tuple(position) if position else None)


@pytest.mark.parametrize("case", VECTORS["geneval_cases"], ids=lambda case: case["case"])
def test_genevals_verdicts(case):
    """The thresholds on confidence belong to its detector: above 0.3, above 0.9 for counting."""
    metadata = case["metadata"]
    least = 0.9 if metadata["tag"] == "counting" else 0.3
    objects = []
    for name, boxes in case["boxes_x0y0x1y1_score"].items():
        kept = sorted((box for box in boxes if box[4] > least), key=lambda box: -box[4])
        colors = (case["stub_colors_in_confidence_order"] or {}).get(name, [""] * len(kept))
        objects += [Found(name, color, tuple(box[:4])) for box, color in zip(kept, colors, strict=True)]
    faults = judge(*(list(map(clause, metadata.get(part, []))) for part in ("include", "exclude")), objects)
    assert (not faults) == case["official_correct"]
    assert len(faults) == len(case["official_reason"].splitlines())


def test_genevals_overall_is_the_mean_of_the_kinds_not_of_the_images():
    rows = VECTORS["geneval_summary"]["rows"]
    right, kinds = np.array([row["correct"] for row in rows], dtype=float), np.array([row["tag"] for row in rows])
    measures = [Measure(kind, (share(right, kinds == kind),), kinds == kind) for kind in dict.fromkeys(kinds)]
    assert f"{value(mean('overall', measures).ratios):.5f}" in VECTORS["geneval_summary"]["official_stdout"]


def test_neighbours_on_the_lattice_stand_in_the_relation_people_see():
    here, target = (1, 17, 15, 31), (17, 17, 31, 31)
    assert relations(here, target) == {"left of"}
    assert relations(target, here) == {"right of"}
    assert relations((17, 1, 31, 15), target) == {"above"}
    assert relations((1, 1, 15, 15), target) == {"left of", "above"}
    assert relations(target, target) == set()


def test_colors_are_looked_for_among_the_surest_objects_only():
    red, blue = Found("circle", "red", (1, 1, 15, 15)), Found("circle", "blue", (17, 1, 31, 15))
    assert not judge([Clause("circle", 1, "red")], [], [red, blue])
    assert judge([Clause("circle", 1, "red")], [], [blue, red])

"""GenEval's and POPE's rules give what the official scorers gave on the same inputs."""

import json
from pathlib import Path

import pytest

from unifork.evaluation.generation.geneval import Clause, Found, judge, relations
from unifork.evaluation.statistics import Score, binary, mean, proportion
from unifork.evaluation.understanding.answers import normalized, pope_yes, strict_yes

VECTORS = json.loads((Path(__file__).parents[1] / "fixtures" / "score_vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["pope_answer_parse"], ids=lambda vector: repr(vector["answer"]))
def test_popes_reading_of_an_answer(vector):
    assert pope_yes(vector["answer"]) == (vector["official_label"] == "yes")


@pytest.mark.parametrize("vector", VECTORS["pope_metrics"], ids=["right", "never yes", "mixed"])
def test_popes_metrics(vector):
    labels = [label == "yes" for label in vector["labels"]]
    metrics = binary([pope_yes(answer) for answer in vector["answers"]], labels)
    if "error" in vector["official"]:  # the official scorer divides by zero
        assert metrics["f1"].value == 0.0
        return
    names = {"acc": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1", "yes_ratio": "yes_ratio"}
    for official, ours in names.items():
        assert metrics[ours].value == pytest.approx(vector["official"][official])


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
    verdict = judge(*(list(map(clause, metadata.get(part, []))) for part in ("include", "exclude")), objects)
    assert verdict.correct == case["official_correct"]
    assert len(verdict.faults) == len(case["official_reason"].splitlines())


def test_genevals_overall_is_the_mean_of_the_kinds_not_of_the_images():
    rows = VECTORS["geneval_summary"]["rows"]
    kinds = dict.fromkeys(row["tag"] for row in rows)
    right = [[row["correct"] for row in rows if row["tag"] == kind] for kind in kinds]
    scores = [Score(kind, *proportion(r), 0.0, len(r), 0, "all") for kind, r in zip(kinds, right, strict=True)]
    assert f"{mean('overall', scores).value:.5f}" in VECTORS["geneval_summary"]["official_stdout"]


def test_neighbours_on_the_lattice_stand_in_the_relation_people_see():
    here, target = (1, 17, 15, 31), (17, 17, 31, 31)
    assert relations(here, target) == {"left of"}
    assert relations(target, here) == {"right of"}
    assert relations((17, 1, 31, 15), target) == {"above"}
    assert relations((1, 1, 15, 15), target) == {"left of", "above"}
    assert relations(target, target) == set()


def test_colors_are_looked_for_among_the_surest_objects_only():
    red, blue = Found("circle", "red", (1, 1, 15, 15)), Found("circle", "blue", (17, 1, 31, 15))
    assert judge([Clause("circle", 1, "red")], [], [red, blue]).correct
    assert not judge([Clause("circle", 1, "red")], [], [blue, red]).correct

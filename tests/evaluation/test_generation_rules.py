"""GenEval, DPG-Bench and MJHQ-30K as functions of files: vectors of the official scorers and known answerers."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from benchmark_files import lines, write
from generation_files import PROMPTS, benchmark

from unifork.errors import DataError, UniForkError
from unifork.evaluation.answers import join, origin_of, read_answers
from unifork.evaluation.archive import Archive
from unifork.evaluation.generation import dpg, geneval_suite
from unifork.evaluation.generation.frechet import distances
from unifork.evaluation.items import Item, selected
from unifork.evaluation.scoring import score_answers
from unifork.evaluation.statistics import value
from unifork.evaluation.suites import Answer, suite_of

VECTORS = json.loads((Path(__file__).parents[1] / "fixtures" / "score_vectors.json").read_text())


def distance(mean, covariance, *other):
    (found,) = distances(mean, covariance, [other])
    return found


def scores_of(card, items, text_of):
    found, lines_of = score_answers(
        card, items, {item.id: Answer(item.id, text_of(item)) for item in items}, origin_of(Path("x"))
    )
    return {score.name: score for score in found}, lines_of


# ----------------------------------------------------------------------------------------------- GenEval


@pytest.mark.parametrize("case", VECTORS["geneval_cases"], ids=lambda case: case["case"])
def test_genevals_rule_reads_detections_as_the_official_scorer(case):
    plain, rows = case["metadata"], []
    for name, boxes in case["boxes_x0y0x1y1_score"].items():
        least = 0.9 if plain["tag"] == "counting" else 0.3
        ordered = sorted(boxes, key=lambda box: -box[4])
        colors = iter((case["stub_colors_in_confidence_order"] or {}).get(name, []))
        rows += [[name, next(colors, "") if box[4] > least else "", box[:4], box[4]] for box in ordered]
    truth = {part: plain.get(part, []) for part in ("include", "exclude")}
    item = Item("0", plain["prompt"], truth, "0", about={"kind": plain["tag"]})
    verdict = geneval_suite.official(item, Answer("0", json.dumps(rows)))
    assert bool(verdict.right) == case["official_correct"]
    assert len(verdict.faults) == len(case["official_reason"].splitlines())


def test_at_most_sixteen_objects_of_a_class_count():
    item = Item("0", "?", {"include": [{"class": "dog", "count": 17}], "exclude": []}, "0", about={"kind": "colors"})
    rows = [["dog", "", [0, 0, 9, 9], 0.5]] * 17
    assert geneval_suite.official(item, Answer("0", json.dumps(rows))).right == 0.0


def test_genevals_summary_from_the_official_results(tmp_path):
    """Overall is the mean over kinds; rows in any order, samples numbered with any digits."""
    rows = VECTORS["geneval_summary"]["rows"]
    prompts = {row["metadata"]: {"tag": row["tag"], "include": [], "prompt": row["metadata"]} for row in rows}
    write(tmp_path / "evaluation_metadata.jsonl", lines(prompts.values()))
    numbers, seen = {name: number for number, name in enumerate(prompts)}, Counter()
    results = []
    for row in rows:
        name = f"images/{numbers[row['metadata']]:05d}/samples/{seen[row['metadata']]:05d}.png"
        seen[row["metadata"]] += 1
        results.append({"filename": name, "tag": row["tag"], "prompt": row["metadata"], "correct": row["correct"]})
    write(tmp_path / "results.jsonl", lines(results[::-1]))
    from benchmark_files import items_of

    card, _, items = items_of("geneval", tmp_path)
    found = join(card, items, read_answers(tmp_path / "results.jsonl"), "test")
    scores = {score.name: score for score in score_answers(card, items, found, origin_of(Path("x")))[0]}
    stated = VECTORS["geneval_summary"]["official_stdout"]
    assert f"{scores['overall'].value:.5f}" in stated
    for kind in ("single_object", "counting", "color_attr"):
        assert f"{100 * scores[kind].value:.2f}%" in re.search(rf"{kind} .*", stated)[0]
    assert (scores["overall"].items, scores["overall"].clusters) == (24, 6)
    write(tmp_path / "results.jsonl", lines(results[1:]))
    with pytest.raises(DataError, match="1 items have no answer: 00000/0000"):
        join(card, items, read_answers(tmp_path / "results.jsonl"), "test")


def test_published_counts_give_the_published_mean(tmp_path):
    right = {"single_object": (314, 320), "two_object": (349, 396), "counting": (245, 320), "colors": (328, 376),
             "position": (158, 400), "color_attr": (226, 400)}  # fmt: skip
    items, marks = [], []
    for kind, (good, every) in right.items():
        items += [Item(f"{kind}{n}", "", {}, f"{kind}{n // 4}", about={"kind": kind}) for n in range(every)]
        marks += [1.0] * good + [0.0] * (every - good)
    overall, *_ = geneval_suite.measures(items, np.array(marks), np.zeros(len(marks)))
    assert f"{value(overall.ratios):.5f}" == "0.74342"


def perfect_objects(item):
    rows = []
    for clause in item.truth["include"]:
        for number in range(clause["count"]):
            left = 0 if clause.get("position") else 300 + 100 * number
            rows.append([clause["class"], clause.get("color", ""), [left, 100, left + 50, 150], 0.95])
    return json.dumps(rows)


def test_answerers_of_geneval(tmp_path):
    card, items = benchmark("geneval", tmp_path)
    assert (len(items), len({item.cluster for item in items})) == (4 * len(PROMPTS), len(PROMPTS))
    assert card.answer.form(items[0].question) == "a photo of a dog."
    scores, _ = scores_of(card, items, perfect_objects)
    assert {score.value for score in scores.values()} == {1.0}
    assert {score.value for score in scores_of(card, items, lambda _: "[]")[0].values()} == {0.0}
    half = scores_of(card, items, lambda item: str(item.id.endswith(("0", "1"))))[0]
    assert {score.value for score in half.values()} == {0.5}
    assert half["overall"].standard_error == 0.0  # all prompts agree
    unread = scores_of(card, items, lambda _: "a dog")[0]["overall"]
    assert (unread.value, unread.unread) == (0.0, 1.0)


def test_the_card_counts_four_images_of_every_official_prompt():
    from benchmark_files import ROOT

    from unifork.config import load_eval

    counts = VECTORS["geneval_prompt_counts"]
    assert load_eval("geneval", ROOT / "datasets" / "evals").items.rows == 4 * counts["total"] == 2212


@pytest.mark.parametrize(("name", "rows"), [("geneval", 2212), ("mjhq", 30000), ("dpg", 4260)])
def test_another_number_of_rows_than_the_card_is_refused(name, rows, tmp_path):
    card, items = benchmark(name, tmp_path, rows=rows)
    with pytest.raises(DataError, match=rf"{name}: {len(items)} items; its card wants {rows}"):
        selected(card, items)


# --------------------------------------------------------------------------------------------- DPG-Bench


def reference_dpg(questions, answers):
    """What the official script does, in the order of the file: zeroing by parents, the first row left out."""
    scores = {}
    for name in dict.fromkeys(row[0] for row in questions[1:]):
        rows = [row for row in questions[1:] if row[0] == name]
        yes = {row[1]: float(answers[name][str(row[1])] == "yes") for row in rows}
        try:
            for _, number, dependency in rows:
                for parent in map(int, dependency.split(",")):
                    if parent and yes[parent] == 0:
                        yes[number] = 0.0
        except KeyError:
            continue
        scores[name] = sum(yes.values()) / len(yes)
    return 100 * sum(scores.values()) / len(scores)


@pytest.mark.parametrize("seed", range(8))
def test_dpgs_official_rule_is_the_published_script(seed, tmp_path):
    from generation_files import QUESTIONS

    card, items = benchmark("dpg", tmp_path)
    rng = np.random.default_rng(seed)
    answers = {name: {str(row[1]): str(rng.choice(["yes", "no", "Yes"])) for row in QUESTIONS if row[0] == name}
               for name in ("first", "second", "30")}  # fmt: skip
    scores, _ = scores_of(card, items, lambda item: json.dumps(answers[item.cluster]))
    assert scores["dpg"].value == pytest.approx(reference_dpg(QUESTIONS, answers))


def test_a_wrong_answer_takes_what_depends_on_it_along(tmp_path):
    _, items = benchmark("dpg", tmp_path)
    only_first_wrong = {"second": {"1": "no", "2": "yes", "3": "yes", "4": "yes"}}
    item = next(item for item in items if item.cluster == "second")
    answer = Answer(item.id, json.dumps(only_first_wrong["second"]))
    assert dpg.corrected(item, answer).right == 0.0
    assert dpg.official(item, answer).right == 1 / 4  # question 2 is looked at before its parent is taken along


def test_the_official_script_loses_the_first_question_and_what_names_it_as_parent(tmp_path):
    questions = [("a", 1, "0"), ("a", 2, "1"), ("b", 1, "0"), ("c", 1, "0"), ("b", 2, "0")]
    from benchmark_files import items_of
    from generation_files import dpg as write_dpg

    write_dpg(tmp_path, questions)
    card, _, items = items_of("dpg", tmp_path)
    text = {"a": {"1": "yes", "2": "yes"}, "b": {"1": "no", "2": "yes"}, "c": {"1": "no"}}
    scores, rows = scores_of(card, items, lambda item: json.dumps(text[item.cluster]))
    assert scores["dpg"].value == 100 * (1 + 0) / 2  # a fails, of b the last rows alone are left
    assert scores["dpg"].clusters == 2
    assert scores["dpg_corrected"].value == pytest.approx(100 * (1 + 0.5 + 0) / 3)
    assert [row["verdicts"]["official"]["right"] for row in rows][:4] == [None] * 4
    assert json.loads(json.dumps(rows[0]))["verdicts"]["official"]["faults"]


def test_answerers_of_dpg(tmp_path):
    card, items = benchmark("dpg", tmp_path)
    says = {word: scores_of(card, items, lambda item, word=word: json.dumps(dict.fromkeys(item.truth, word)))[0]
            for word in ("yes", "no", "Yes", "yes.")}  # fmt: skip
    assert {word: found["dpg"].value for word, found in says.items()} == {
        "yes": 100.0,
        "no": 0.0,
        "Yes": 0.0,
        "yes.": 0.0,
    }
    rng, values = np.random.default_rng(0), []
    for _ in range(300):
        coin = scores_of(card, items, lambda item: json.dumps({q: str(rng.choice(["yes", "no"])) for q in item.truth}))
        values.append(coin[0]["dpg_corrected"].value)
    chance = coin[0]["dpg_corrected"].chance
    assert np.mean(values) == pytest.approx(chance, abs=4 * np.std(values) / np.sqrt(300))
    lacking = scores_of(card, items, lambda item: json.dumps({"1": "yes"}))[0]
    assert lacking["dpg_corrected"].unread == 1.0
    assert scores_of(card, items, lambda _: "")[0]["dpg"].unread == 1.0 - 0.0


def test_a_question_that_depends_on_none_of_its_prompt_is_refused(tmp_path):
    from benchmark_files import items_of
    from generation_files import dpg as write_dpg

    write_dpg(tmp_path, [("a", 1, "0"), ("b", 1, "7")])
    with pytest.raises(DataError, match=r"1 prompts have questions that depend on no question of theirs: b"):
        items_of("dpg", tmp_path)
    (tmp_path / "prompts" / "a.txt").unlink()
    write_dpg(tmp_path, [("b", 1, "0")])
    write(tmp_path / "dpg_bench.csv", (tmp_path / "dpg_bench.csv").read_text() + "a,t,,1,0,e,w,e (x),q\n")
    with pytest.raises(DataError, match=r"no prompts/a\.txt: put"):
        items_of("dpg", tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tag": "Counting"}, "prompt 00000: unknown tag 'Counting'. Did you mean 'counting'"),
        ({"include": [{"class": "dog"}]}, "no 'count' in {'class': 'dog'}; wanted: evaluation_metadata"),
        ({"include": [{"count": 1}]}, "no 'class' in {'count': 1}"),
        (
            {"include": [{"class": "dog", "count": 1, "position": ["left of", 1]}]},
            "prompt 00000: position ['left of', 1] names no clause before its own",
        ),
    ],
)
def test_prompts_of_geneval_that_no_image_can_meet_are_refused(tmp_path, change, problem):
    from benchmark_files import card_of

    write(tmp_path / "evaluation_metadata.jsonl", lines([PROMPTS[0] | change, *PROMPTS[1:]]))
    suite, options = suite_of(card := card_of("geneval"))
    with pytest.raises(UniForkError, match=re.escape(problem)):
        suite.items_of(Archive(card, options, tmp_path), options, 0)


@pytest.mark.parametrize("box", [[0, 0, 1], ["left", 0, 1, 1], None])
def test_what_is_no_box_is_not_read(tmp_path, box):
    card, items = benchmark("geneval", tmp_path)
    scores, _ = scores_of(card, items, lambda _: json.dumps([["dog", "red", box, 0.95]]))
    assert (scores["overall"].value, scores["overall"].unread) == (0.0, 1.0)


def test_an_answer_to_dpg_that_is_no_text_is_not_read(tmp_path):
    card, items = benchmark("dpg", tmp_path)
    scores, _ = scores_of(card, items, lambda item: json.dumps(dict.fromkeys(item.truth, True)))
    assert (scores["dpg"].value, scores["dpg"].unread) == (0.0, 1.0)


def test_results_of_geneval_are_true_or_false(tmp_path):
    write(tmp_path / "results.jsonl", lines([{"filename": "0/samples/0.png", "correct": 1}]))
    with pytest.raises(DataError, match="values of 'correct' are not true or false: 0/samples/0"):
        read_answers(tmp_path / "results.jsonl")


def test_images_are_not_scored_before_networks_have_looked_at_them(tmp_path):
    card, items = benchmark("geneval", tmp_path)
    answers = {item.id: Answer(item.id, "", b"png") for item in items}
    with pytest.raises(DataError, match=r"geneval: these are images; `unifork answers examine` says what is in them"):
        score_answers(card, items, answers, origin_of(Path("x")))


def test_scoring_needs_no_torch():
    code = ("import sys; import unifork.evaluation.scoring, unifork.evaluation.examining; "
            "from unifork.evaluation.suites import SUITES; [SUITES.find(n, '') for n in SUITES.addresses]; "
            "print('torch' in sys.modules, 'transformers' in sys.modules)")  # fmt: skip
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False", "False"]

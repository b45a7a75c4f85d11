"""All answers of a published model to POPE and MME give the published values, with errors, from the command line."""

import json
import re

import pytest
from benchmark_files import lines, real_mme, real_pope, write
from typer.testing import CliRunner

from unifork.cli import app
from unifork.errors import DataError

POPE = {
    "adversarial": (0.844587, 0.00690), "popular": (0.862459, 0.00683), "random": (0.871360, 0.00667),
}  # fmt: skip
MME = {
    "existence": 185.0, "count": 155.0, "position": 133.3333, "color": 170.0, "posters": 160.5442,
    "celebrity": 152.9412, "scene": 161.25, "landmark": 170.5, "artwork": 117.75, "OCR": 125.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Answers and official files of both benchmarks, and what `unifork score` writes of them."""
    root = tmp_path_factory.mktemp("real")
    for name, prepare in {"pope": real_pope, "mme": real_mme}.items():
        answers = prepare(root / name)
        write(root / f"{name}.jsonl", lines(reversed(answers)))
        result = score(root, name)
        assert result.exit_code == 0, result.output
    return root


def score(root, name, *more, archive=None):
    answers = ("--answers", str(root / f"{name}.jsonl"), "--archive", str(archive or root / name))
    return CliRunner().invoke(app, ["score", name, *answers, "--out", str(root / "scores" / name), *more])


def metrics(root, name):
    return json.loads((root / "scores" / name / "metrics.json").read_text())


def test_pope(real):
    found = metrics(real, "pope")
    for split, (value, error) in POPE.items():
        assert round(found[split]["f1"]["value"], 6) == value
        assert round(found[split]["f1"]["standard_error"], 5) == error
    mean = found["all"]["pope"]
    assert (round(mean["value"], 6), round(mean["standard_error"], 5)) == (0.859469, 0.00657)
    assert (mean["items"], mean["clusters"], mean["missing"], mean["unread"]) == (8910, 500, 0, 0.0)
    assert mean["chance"] == pytest.approx((0.5 + 0.5 + 1500 / (1500 + 2910 / 2)) / 3)
    assert (mean["rule"], mean["model"]) == ("official", str(real / "pope.jsonl"))
    ratios = [found[split]["yes_ratio"] for split in POPE]
    assert sum(round(ratio["value"] * ratio["items"]) for ratio in ratios) == 3753


def test_mme(real):
    found = metrics(real, "mme")["all"]
    assert found["perception"]["value"] == pytest.approx(1531.3187274909965, abs=1e-9)
    assert round(found["perception"]["standard_error"], 2) == 31.43
    assert found["cognition"]["value"] == pytest.approx(295.3571428571429, abs=1e-9)
    assert {task: round(found[task]["value"], 4) for task in MME} == MME
    assert (found["perception"]["chance"], found["perception"]["items"]) == (750.0, 2114)
    assert (found["perception"]["clusters"], found["OCR"]["clusters"]) == (1057, 20)
    assert found["perception_strict"]["rule"] == "strict"


def test_answers_to_other_questions_are_refused(real, tmp_path):
    """Of today's POPE (9,000 questions, a typo mended) no file of answers to the old one is taken."""
    for split in POPE:
        old = (real / "pope" / f"coco_pope_{split}.json").read_text()
        write(tmp_path / f"coco_pope_{split}.json", old.replace("a snowboard in the image?", "a snow board there?"))
    result = score(real, "pope", archive=tmp_path)
    assert result.exit_code == 1
    assert "another prompt" in str(result.exception)
    assert "a snow board there?" in str(result.exception)
    assert "66 items have no answer: adversarial/1, adversarial/54" in str(result.exception)
    extra = (real / "pope" / "coco_pope_random.json").read_text()
    write(tmp_path / "coco_pope_random.json", extra + extra.splitlines()[0] + "\n")
    assert "8911 items; its card wants 8910 (e3e3926)" in str(score(real, "pope", archive=tmp_path).exception)
    result = score(real, "mme", archive=real / "pope")
    assert "0 items; its card wants 2374" in str(result.exception)


@pytest.mark.slow
def test_two_files_of_answers_are_compared_pairwise(real, tmp_path):
    """One model answers as the other but for fifty items: the difference is surer than two errors say."""
    answers = [json.loads(line) for line in (real / "pope.jsonl").read_text().splitlines()]
    for answer in answers[:50]:
        answer["text"] = "No" if answer["text"] == "Yes" else "Yes"
    write(tmp_path / "pope.jsonl", lines(answers))
    assert score(tmp_path, "pope", archive=real / "pope").exit_code == 0
    names = [str(root / "scores" / "pope") for root in (real, tmp_path)]
    result = CliRunner().invoke(app, ["score", "compare", *names])
    line = next(line for line in result.output.splitlines() if line.startswith("all pope:"))
    assert line.startswith("all pope: 0.859469 - 0.8")
    assert float(line.split("+- ")[1].split()[0]) < 0.002
    result = CliRunner().invoke(app, ["score", "compare", names[0], str(real / "scores" / "mme")])
    assert "one benchmark is needed" in str(result.exception)
    file = tmp_path / "scores" / "pope" / "verdicts.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    result = CliRunner().invoke(app, ["score", "compare", *names])
    assert "1 items are not the same in both: adversarial/1" in str(result.exception)


@pytest.mark.slow
def test_verdicts_of_another_version_or_form_are_not_compared(real, tmp_path):
    """A rule that has changed reads the same answers in another way."""
    ours = real / "scores" / "pope"
    rows = [json.loads(line) for line in (ours / "verdicts.jsonl").read_text().splitlines()]
    changes = {
        "of the versions 2 and [0-9]+; score both again": {"version": 2},
        "no verdicts of one form: .*unexpected keyword": {"verdicts": {"official": {"says": "yes"}}},
        "no verdicts of items by rule 'official'": {"verdicts": {}},
    }
    for problem, change in changes.items():
        write(tmp_path / "verdicts.jsonl", lines([row | change for row in rows]))
        result = CliRunner().invoke(app, ["score", "compare", str(ours), str(tmp_path)])
        assert isinstance(result.exception, DataError)
        assert re.search(problem, str(result.exception))
    write(tmp_path / "verdicts.jsonl", lines([{key: row[key] for key in row if key != "chance"} for row in rows]))
    result = CliRunner().invoke(app, ["score", "compare", str(ours), str(tmp_path)])
    assert "no verdicts of one form: no 'chance' in {'benchmark': 'pope'" in str(result.exception)


def test_another_benchmarks_layout_and_a_file_in_the_way_are_one_line(real):
    place = ("--answers", str(real / "pope.jsonl"), "--archive", str(real / "pope"))
    result = CliRunner().invoke(
        app, ["answers", "export", "pope", "--format", "mme", *place, "--out", str(real / "out")]
    )
    assert str(result.exception) == "--format mme: not of pope: KeyError: 'file'"
    under = ("--out", str(real / "pope.jsonl" / "out"))
    for command in (["answers", "export", "pope", "--format", "llava"], ["score", "pope"]):
        result = CliRunner().invoke(app, [*command, *place, *under])
        assert "cannot be written: Not a directory" in str(result.exception)

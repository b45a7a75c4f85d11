"""Files of answers: what does not fit the items is refused by name; what a model may write is kept."""

import json

import pytest
from benchmark_files import OFFICIAL, TAIL, items_of, lines, write

from unifork.errors import DataError
from unifork.evaluation.answers import join, read_answers
from unifork.evaluation.items import selected
from unifork.evaluation.scoring import Origin, score_answers, write_scores


@pytest.fixture
def pope(tmp_path):
    OFFICIAL["pope"](tmp_path / "files")
    card, _, items = items_of("pope", tmp_path / "files")
    rows = [
        {"question_id": item.about["question_id"], "prompt": item.question + TAIL, "text": item.truth} for item in items
    ]
    return card, items, rows


def joined(pope, rows, tmp_path, **options):
    card, items, _ = pope
    write(tmp_path / "answers.jsonl", lines(rows))
    return join(card, items, read_answers(tmp_path / "answers.jsonl"), "answers.jsonl", **options)


def test_order_does_not_matter(pope, tmp_path):
    assert joined(pope, pope[2][::-1], tmp_path) == joined(pope, pope[2], tmp_path)


def test_answers_that_moved_without_their_prompts_are_refused(pope, tmp_path):
    rows = pope[2]
    pairs = zip(rows, rows[1:] + rows[:1], strict=True)
    moved = [{**row, "prompt": other["prompt"], "text": other["text"]} for row, other in pairs]
    with pytest.raises(DataError, match=r"to another prompt: 1 has 'Is there a adv.*', the item 'Is there a r"):
        joined(pope, moved, tmp_path)
    other_tail = [{**row, "prompt": row["prompt"].replace("single", "short")} for row in rows]
    with pytest.raises(DataError, match=r"18 answers are to another prompt: 1 has .*short word.*single word"):
        joined(pope, other_tail, tmp_path)


def test_missing_doubled_and_unknown_answers_are_counted_and_the_first_named(pope, tmp_path):
    rows = pope[2]
    with pytest.raises(DataError, match=r"7 items have no answer: (adversarial/\d, ){4}adversarial/5 and 2 more"):
        joined(pope, rows[7:], tmp_path)
    with pytest.raises(DataError, match=r"answers\.jsonl: 1 answers come twice: 1$"):
        joined(pope, [*rows, rows[0]], tmp_path)
    with pytest.raises(DataError, match=r"1 answers are to no item: 77$"):
        joined(pope, [*rows, {**rows[0], "question_id": 77}], tmp_path)


def test_a_part_is_scored_when_asked_for_and_every_score_says_so(pope, tmp_path):
    card, items, rows = pope
    found = joined(pope, rows[2:], tmp_path, partial=True)
    scores, _ = score_answers(card, selected(card, items), found, Origin("test"))
    assert {score.missing for score in scores} == {2}
    assert all("PARTIAL: 2 missing" in str(score) for score in scores)


def test_whatever_a_model_writes_is_kept_and_counted(pope, tmp_path):
    card, items, rows = pope
    texts = ["a\nb\tc\r\n", "\x00\x1b[31m", "x" * 100_000, "", "\u2028yes", None]
    for row, text in zip(rows, texts, strict=False):
        row["text"] = text
    write(tmp_path / "answers.jsonl", lines(rows).encode() + b"\n")
    data = (tmp_path / "answers.jsonl").read_bytes().replace(b'"xxx', b'"\xff\xfe')
    write(tmp_path / "answers.jsonl", data)
    found = join(card, items, read_answers(tmp_path / "answers.jsonl"), "test")
    assert [found[item.id].text for item in items[:2]] == texts[:2]
    assert len(found[items[2].id].text) == 99_999
    scores, kept = score_answers(card, items, found, Origin("test"))
    write_scores(tmp_path / "scores", card, scores, kept)
    verdicts = [json.loads(line) for line in (tmp_path / "scores" / "verdicts.jsonl").read_text().split("\n") if line]
    assert [verdict["answer"] for verdict in verdicts[:2]] == texts[:2]
    assert [verdict["verdicts"]["strict"]["reading"] for verdict in verdicts[:6]] == [None] * 4 + ["yes", None]
    strict = next(score for score in scores if score.name == "accuracy_strict" and score.split == "adversarial")
    assert strict.unread == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no answers"),
        ("[]", "no answers"),
        ('{"question": "a", "answer": "b"}', "every entry needs the keys question_id, text or question_id, answer"),
        ('[{"question_id": 1, "text": "a"}, 3]', "no answers"),
        ('{"question_id": 1, "te', "neither JSON nor a JSON value per line"),
    ],
)
def test_a_file_without_answers_is_refused_by_name(tmp_path, content, problem):
    write(tmp_path / "answers.jsonl", content)
    with pytest.raises(DataError, match=rf"answers\.jsonl: .*{problem}"):
        read_answers(tmp_path / "answers.jsonl")


def test_a_line_of_mmes_tool_with_a_tab_in_its_answer_is_refused(tmp_path):
    write(tmp_path / "existence.txt", "a.jpg\tIs it?\tYes\tYes\tindeed\n")
    with pytest.raises(DataError, match=r"existence\.txt, line 1: 5 fields"):
        read_answers(tmp_path)

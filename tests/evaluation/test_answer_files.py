"""Files of answers: what does not fit the items is refused by name; what a model may write is kept."""

import json
from pathlib import Path

import pytest
from benchmark_files import OFFICIAL, TAIL, items_of, lines, write
from typer.testing import CliRunner

from unifork.cli import app
from unifork.errors import DataError
from unifork.evaluation.answers import join, origin_of, read_answers
from unifork.evaluation.archive import table_rows
from unifork.evaluation.items import selected, write_items
from unifork.evaluation.scoring import score_answers, write_scores


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
    scores, _ = score_answers(card, selected(card, items), found, origin_of(Path("test")))
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
    scores, kept = score_answers(card, items, found, origin_of(Path("test")))
    write_scores(tmp_path / "scores", card, scores, kept)
    verdicts = [json.loads(line) for line in (tmp_path / "scores" / "verdicts.jsonl").read_text().split("\n") if line]
    assert [verdict["answer"] for verdict in verdicts[:2]] == texts[:2]
    assert [verdict["verdicts"]["strict"]["reading"] for verdict in verdicts[:6]] == [None] * 4 + ["yes", None]
    strict = next(score for score in scores if score.name == "accuracy_strict" and score.split == "adversarial")
    assert strict.unread == pytest.approx(5 / 6)


@pytest.mark.parametrize(("name", "form"), [("pope", "llava"), ("mme", "mme")])
def test_exports_keep_whatever_a_model_wrote(tmp_path, name, form):
    OFFICIAL[name](tmp_path / "files")
    card, _, items = items_of(name, tmp_path / "files")
    texts = ["a\nb\tc\r\n", "\x00\x1b[31m", "x" * 100_000, "", "\u2028yes \\n", "\udcff\udcfe"]
    written = {item.id: texts[number % len(texts)] for number, item in enumerate(items)}
    rows = [
        {"question_id": item.about["question_id"], "prompt": item.question + TAIL, "text": written[item.id]}
        for item in items
    ]
    raw = b"".join(json.dumps(row).replace("\\udcff\\udcfe", "\udcff\udcfe").encode(errors="surrogateescape") + b"\n"
                   for row in rows)  # fmt: skip
    assert b'"\xff\xfe"' in raw
    write(tmp_path / "answers.jsonl", raw)
    out = tmp_path / "out"
    words = ("--answers", tmp_path / "answers.jsonl", "--archive", tmp_path / "files", "--format", form, "--out", out)
    done = CliRunner().invoke(app, ["answers", "export", name, *map(str, words)])
    assert done.exit_code == 0, (done.output, done.exception)
    back = join(card, items, read_answers(out if form == "mme" else out / "llava.jsonl"), "back")
    assert {key: answer.text for key, answer in back.items()} == written


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


def test_a_file_in_any_unicode_with_any_line_ends_is_read(pope, tmp_path):
    plain = lines(pope[2])
    wanted = joined(pope, pope[2], tmp_path)
    for data in (plain.encode("utf-8-sig"), plain.encode("utf-16"), plain.replace("\n", "\r\n").encode()):
        write(tmp_path / "answers.jsonl", data)
        assert join(*pope[:2], read_answers(tmp_path / "answers.jsonl"), "test") == wanted
    table = "index\tprediction\n" + "".join(f"{row['question_id']}\t{row['text']}\n" for row in pope[2])
    for encoding in ("utf-8-sig", "utf-16"):
        write(tmp_path / "answers.tsv", table.encode(encoding))
        table_rows.cache_clear()
        found = join(*pope[:2], read_answers(tmp_path / "answers.tsv"), "test")
        assert [answer.text for answer in found.values()] == [answer.text for answer in wanted.values()]


@pytest.mark.parametrize("value", [2, 2.0, True, float("nan"), ["no"], {"text": "no"}], ids=repr)
def test_an_answer_that_is_no_text_is_refused_and_not_read_as_yes(pope, tmp_path, value):
    with pytest.raises(DataError, match=r"1 values of 'text' are not a text, or null where it is empty: 1 has "):
        joined(pope, [{**pope[2][0], "text": value}, *pope[2][1:]], tmp_path)


def test_a_file_of_questions_is_not_taken_for_answers(pope, tmp_path):
    rows = [{"question_id": row["question_id"], "image": "a.jpg", "text": row["prompt"]} for row in pope[2]]
    with pytest.raises(DataError, match="these are questions: entries have an `image` and no `prompt`"):
        joined(pope, rows, tmp_path)


def test_answers_without_prompts_are_not_joined_by_place(tmp_path):
    """Both questions about an image of MME have one id."""
    OFFICIAL["mme"](tmp_path / "files")
    card, _, items = items_of("mme", tmp_path / "files")
    rows = [{"question_id": item.about["question_id"], "answer": item.truth} for item in items]
    write(tmp_path / "answers.json", rows)
    with pytest.raises(
        DataError, match="12 answers lack a prompt, and their id is that of several items: existence/blue"
    ):
        join(card, items, read_answers(tmp_path / "answers.json"), "test")
    write(tmp_path / "answers.json", [{**row, "answer": "Yes"} for row in rows])
    assert len(join(card, items, read_answers(tmp_path / "answers.json"), "test")) == 12


def test_a_folder_of_another_kind_is_refused(tmp_path):
    OFFICIAL["pope"](tmp_path / "files")
    card, archive, items = items_of("pope", tmp_path / "files")
    write_items(card, items, archive.image, tmp_path / "items", {})
    with pytest.raises(DataError, match="items: holds items, not answers"):
        read_answers(tmp_path / "items")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', r"line 2: Unterminated string"),
        ("a.jsonl", '{"question_id": 1, "text": "a"}\n{"question_id": 2}', r"; of 2 entries 1 lack them: entry 2"),
        ("a.tsv", "index\tprediction\n1\ta\n2\n", r"1 rows have not as many fields as the first line: row 2"),
        ("a.tsv", "index\tprediction\n1\ta\tb\n", r"1 rows have not as many fields as the first line: row 1"),
        ("a.jsonl.gz", "no gzip", "Not a gzipped file"),
        ("nothing.tsv", None, "No such file"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_with_its_place(tmp_path, name, content, problem):
    if content is not None:
        write(tmp_path / name, content)
    table_rows.cache_clear()
    with pytest.raises(DataError, match=rf"{name}: .*{problem}"):
        read_answers(tmp_path / name)


def test_a_line_of_mmes_tool_with_a_tab_in_its_answer_is_refused(tmp_path):
    write(tmp_path / "existence.txt", "a.jpg\tIs it?\tYes\tYes\tindeed\n")
    with pytest.raises(DataError, match=r"existence\.txt, line 1: 5 fields"):
        read_answers(tmp_path)

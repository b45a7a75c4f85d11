"""VQAv2: open questions, ten people's answers each; an answer counts by how many of nine others give it.

Files: `v2_OpenEnded_*_questions.json` and `v2_*_annotations.json` (none for the test questions, whose answers go to a
server), or the Hub's Parquet. The makers' rule normalizes texts only where the ten disagree, and deletes at most 32
full stops. What models write goes through LLaVA's own processor first, as papers of its kind do before they submit.
"""

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from unifork.config import EvalCard, StrictModel
from unifork.errors import DataError
from unifork.evaluation.answers import Rows
from unifork.evaluation.archive import Archive, Row
from unifork.evaluation.items import Item, faults
from unifork.evaluation.suites import Answer, Suite, Verdict
from unifork.evaluation.understanding.answers import by_type, commonest, normalized

MARKS = ';/[]"{}()=+\\_-><@`,?!'
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_FULL_STOPS = 32
DIGITS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(n) for n, word in enumerate(DIGITS.split())}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in Path(__file__).with_name("contractions.txt").read_text().split()
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}
"""Words that lack an apostrophe, and what they become (the last is a slip of the makers)."""


class Options(StrictModel):
    """Of its card."""

    images: str = "val2014"
    """Folder of the images, below that of the files; their names begin with COCO_ and its name."""
    questions: str = "v2_OpenEnded_mscoco_val2014_questions.json"
    annotations: str | None = "v2_mscoco_val2014_annotations.json"
    """None: the answers are not public."""
    subset: str | None = None
    """Questions of another file, whose ids make the split `test-dev` of these."""


def read(archive: Archive, options: Options, _: int) -> list[Item]:
    """All questions; the truth is the ten answers."""
    rows = list(archive.table())
    if not rows:
        questions = archive.json(f"**/{options.questions}")["questions"]
        people = archive.json(f"**/{options.annotations}")["annotations"] if options.annotations else []
        by_id = {str(row["question_id"]): row for row in people}
        merged = [Row({**row, **by_id.get(str(row["question_id"]), {})}) for row in questions]
        if people and (without := [str(row["question_id"]) for row in merged if "answers" not in row]):
            raise DataError(f"{options.annotations}: {faults('questions have no answers there', without)}")
        rows = [(f"COCO_{options.images}_{int(row['image_id']):012d}.jpg", row) for row in merged]
    subset = archive.json(f"**/{options.subset}")["questions"] if options.subset else []
    dev = {row["question_id"] for row in subset}
    truths = [[str(people["answer"]) for people in row["answers"]] if row.get("answers") else None for _, row in rows]
    kinds = [str(row.get("answer_type") or "all") for _, row in rows]
    common = commonest(kinds, [str(row.get("multiple_choice_answer")) for _, row in rows])
    return [
        Item(
            str(row["question_id"]), row["question"], truth, str(row["image_id"]),
            "test-dev" if row["question_id"] in dev else "all", place,
            accuracy(common[kind], truth) if truth else 0.0, {"type": kind},
        )
        for (place, row), truth, kind in zip(rows, truths, kinds, strict=True)
    ]  # fmt: skip


def accuracy(response: str, answers: Sequence[str]) -> float:
    """The makers' accuracy of a response, 0 to 1: over the ten, min(1, equal answers among the other nine / 3)."""
    response, *truths = (text.replace("\n", " ").replace("\t", " ").strip() for text in (response, *answers))
    if len(set(truths)) > 1:
        response, *truths = (plain(text) for text in (response, *truths))
    equal = [truth == response for truth in truths]
    return sum(min(1.0, (sum(equal) - here) / 3) for here in equal) / len(equal)


@lru_cache(2**16)  # people give the same answers over and over
def plain(text: str) -> str:
    """A text as the makers compare it."""
    return words(unmarked(text))


def unmarked(text: str) -> str:
    """Without punctuation: a mark goes where it touches a space or digits have a comma, else it becomes a space."""
    joined, changed = re.search(r"\d,\d", text), text
    for mark in MARKS:
        gone = joined or f"{mark} " in text or f" {mark}" in text
        changed = changed.replace(mark, "" if gone else " ")
    return FULL_STOP.sub("", changed, count=MOST_FULL_STOPS)


def words(text: str) -> str:
    """Lower case, number words as digits, no articles, apostrophes put back."""
    numbered = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def processed(text: str) -> str:
    """LLaVA's processor of answers before they are submitted: `it's` becomes `it 's`, which nobody ever answers."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain(text.replace("\n", " ").replace("\t", " ").strip())


def converted(answer: Answer) -> str:
    """What a submission holds."""
    return answer.text if answer.converted else processed(answer.text)


def official(item: Item, answer: Answer) -> Verdict:
    """The makers' accuracy of what would be submitted."""
    reading = converted(answer)
    return Verdict(reading, accuracy(reading, item.truth))


def strict(item: Item, answer: Answer) -> Verdict:
    """Their accuracy of the text as it is, all normalized alike: capitals and a full stop at the end are no matter."""
    reading = normalized(answer.text)
    return Verdict(reading or None, accuracy(reading, [normalized(truth) for truth in item.truth]))


def export(_: EvalCard, rows: Rows) -> dict[str, str]:
    """A submission: every question, with an empty answer where there is none."""
    entries = [{"question_id": int(item.id), "answer": converted(answer) if answer else ""} for item, answer in rows]
    return {"vqa.json": json.dumps(entries)}


RULES = {"official": official, "strict": strict}
SUITE = Suite(read, RULES, lambda items, right_I, _: by_type(items, right_I, weight=100.0), Options)

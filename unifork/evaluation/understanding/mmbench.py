"""MMBench: questions with up to four choices, each asked again with the choices rotated.

Files: the TSV of the dev split (index, question, hint, A to D, answer, category, image), or the Hub's Parquet. An index
above 10^6 is a rotation of the question with the same rest. `circular` counts a question as right where all of its
rotations are; `accuracy` counts rows, which is several points more on the same answers.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from unifork.config import StrictModel
from unifork.evaluation.archive import Archive, Row
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, accuracy, together
from unifork.evaluation.suites import Suite
from unifork.evaluation.understanding.answers import LETTERS, choices, letter, strict_letter, with_choices

NONE = {"", "nan", "NaN", "None", "none", "null", "NULL", "N/A", "NA", "n/a", "<NA>"}
"""What pandas takes for an empty field, as the makers' and LLaVA's scripts do."""
ROTATION = 1_000_000
MARKS = re.compile(r"[.()\[\],:;!*#{}]")


def read(archive: Archive, _: StrictModel, __: int) -> list[Item]:
    """All rows; those of one question are a cluster."""
    items = []
    for place, given in [*archive.table("**/*.parquet"), *archive.table("**/*.tsv")]:
        row = Row({name: None if str(value) in NONE else value for name, value in given.items()})
        index, options, hint = int(row["index"]), choices(row, LETTERS), row.get("hint")
        question = with_choices(f"{hint}\n{row['question']}" if hint else row["question"], options)
        truth, group = row.get("answer"), str(index % ROTATION)
        about = {"options": options}
        items.append(Item(str(index), question, truth, group, "all", place, 1 / len(options), about))
    return items


def lone_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The only choice whose letter stands alone as a word, or else the only one whose text the answer contains.

    The matching by rules of MMBench's makers. What it cannot read they give to a language model, then to chance; here
    it is unread.
    """
    words = MARKS.sub(" ", answer).split()
    marks = [mark for mark in options if mark in words]
    if len(marks) == 1:
        return marks[0]
    texts = [mark for mark, text in options.items() if text.lower() in answer.lower()]
    return texts[0] if len(texts) == 1 else None


def measures(items: Sequence[Item], right_I: np.ndarray, _: np.ndarray) -> list[Measure]:
    """Share of questions right in all rotations, share of rows."""
    all_I, groups = np.ones(len(items), dtype=bool), [item.cluster for item in items]
    return [Measure("circular", (together(right_I, groups, all_I),), all_I), accuracy("accuracy", right_I, all_I)]


SUITE = Suite(read, {"official": letter(lone_letter), "strict": letter(strict_letter)}, measures)

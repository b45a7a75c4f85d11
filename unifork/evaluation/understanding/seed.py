"""SEED-Bench: questions with four choices; the image part is what papers call SEED-I.

Files: `SEED-Bench.json` (questions with answer, choice_a to choice_d, data_id, question_type_id), or the Hub's Parquet.
LLaVA's way, which UniFork takes, lets the model write a letter; the makers' own ranks choices by likelihood.
"""

import json
from collections import Counter
from collections.abc import Sequence

import numpy as np

from unifork.config import EvalCard, StrictModel
from unifork.errors import one_of
from unifork.evaluation.answers import Rows
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, accuracy, mean
from unifork.evaluation.suites import Suite
from unifork.evaluation.understanding.answers import LABELS, choices, exact_letter, letter, strict_letter, with_choices

COLUMNS = ("choice_a", "choice_b", "choice_c", "choice_d")
TYPES: list[str] = LABELS["seed"]
"""By question_type_id, from 1; the last three are of videos."""
SPLITS = ("image", "video")
NUMBERS = [str(number) for number in range(1, len(TYPES) + 1)]


class Options(StrictModel):
    """Of its card."""

    images: str = "SEED-Bench-image"
    """Folder of the images, below that of the file."""


def read(archive: Archive, _: Options, __: int) -> list[Item]:
    """All questions, of videos too, whose split is `video`. An id that comes again is told apart by a number."""
    rows = list(archive.table())
    if not rows:
        rows = [(str(row["data_id"]), row) for row in archive.json("**/SEED-Bench*.json")["questions"]]
    items, seen = [], Counter[str]()
    for place, row in rows:
        name = str(row["question_id"])
        seen[name] += 1
        own, options = name if seen[name] == 1 else f"{name}#{seen[name]}", choices(row, COLUMNS)
        kind = int(one_of("question_type_id", str(row["question_type_id"]), NUMBERS, f"question {name}"))
        split = one_of("data_type", str(row["data_type"]), SPLITS, name)
        text, about = with_choices(row["question"], options), {"question_id": name, "type": kind, "options": options}
        items.append(Item(own, text, row["answer"], str(row["data_id"]), split, place, 1 / len(options), about))
    return items


def export(_: EvalCard, rows: Rows) -> dict[str, str]:
    """A submission: an object a line. Where an id comes again, its lines have a prompt, too."""
    times = Counter(item.about["question_id"] for item, _ in rows)
    lines = [
        {"question_id": (name := item.about["question_id"]), "prediction": answer.text}
        | ({"prompt": item.question} if times[name] > 1 else {})
        for item, answer in rows
        if answer
    ]
    return {"seed.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}


def measures(items: Sequence[Item], right_I: np.ndarray, _: np.ndarray) -> list[Measure]:
    """Accuracy over questions (SEED-I), its mean over types, and that of each type, by image and video."""
    splits_I, types_I = np.array([item.split for item in items]), np.array([item.about["type"] for item in items])
    found = []
    for split in sorted({*splits_I.tolist()}):
        members_I = splits_I == split
        kinds = [
            accuracy(TYPES[number - 1], right_I, members_I & (types_I == number), split)
            for number in sorted({*types_I[members_I].tolist()})
        ]
        found += [accuracy("accuracy", right_I, members_I, split), mean("mean_of_types", kinds), *kinds]
    return found


SUITE = Suite(read, {"official": letter(exact_letter), "strict": letter(strict_letter)}, measures, Options)

"""Questions about the world `shapes`: images and questions go out, answers come back, scores come out.

Yes/no questions are balanced exactly and have hard negatives; they are scored by POPE's own reading
of an answer (rule `official`) and by a strict one. Questions about color, number and
position and the caption of the whole image are scored by exact match. Held-out questions are about
held-out compositions, none of which training names, not even to deny it.

Chance is measured: it is what the right answers to other questions of the same kind and split score.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count, product
from typing import Literal, get_args

import numpy as np
from pydantic import PositiveInt

from unifork.config import StrictModel
from unifork.documents.prompts import INSTRUCTION
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, binary, share
from unifork.evaluation.suites import Rule, Suite
from unifork.evaluation.understanding.answers import exact, pope_yes, strict_yes, yes_no
from unifork.images import png
from unifork.shapes.language import full_caption
from unifork.shapes.questions import Question, pick_question
from unifork.shapes.world import ASKED_SPLITS, Draws, Scene, Split, draw, scene

Kind = Literal["yes_no", "color", "count", "position", "caption"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHANCE_QUESTIONS = 500
"""Other questions of each kind and split, whose answers make the chance level."""
CHANCE_START = 1_000_000
"""Number of the first scene they are about, far from those of any data set."""


class Options(StrictModel):
    """Of its card."""

    samples: PositiveInt = 200
    """Questions for each kind and split."""


def read(_: Archive, options: Options, seed: int) -> list[Item]:
    """`samples` questions for each kind and split, yes and no in turn."""
    items = []
    for split, kind in product(ASKED_SPLITS, KINDS):
        for number, (this, (question, answer)) in enumerate(_questions(kind, split, options.samples, seed)):
            shown, chance = f"{split}-{this.index}", _other_answers(kind, split, seed).get(answer, 0.0)
            name, image_name = f"{split}/{kind}/{number}", f"{seed}/{split}/{this.index}"
            items.append(Item(name, question, answer, shown, split, image_name, chance, {"kind": kind}))
    return items


def image(_: Archive, name: str) -> bytes:
    """The image of a name."""
    seed, split, index = name.split("/")
    return png(draw(scene(int(seed), int(index), "seen" if split == "seen" else "held_out")))


def rule(read_yes: Callable[[str], bool | None]) -> Rule:
    """Yes and no by a reading, everything else by exact match."""
    decided = yes_no(read_yes)
    return lambda item, answer: (decided if item.about["kind"] == "yes_no" else exact)(item, answer)


def measures(items: Sequence[Item], right_I: np.ndarray, yes_I: np.ndarray) -> list[Measure]:
    """Five yes/no scores and four exact matches for each split."""
    names = np.array([(item.split, item.about["kind"]) for item in items])
    labels_I = np.array([item.truth == "yes" for item in items], dtype=np.float64)
    found = []
    for split in ASKED_SPLITS:
        for kind in KINDS:
            members_I = (names == (split, kind)).all(axis=1)
            ratios = {"exact": share(right_I, members_I)}
            if kind == "yes_no":
                ratios = binary(yes_I, labels_I, right_I, members_I)
            found += [Measure(f"{kind}_{name}", (ratio,), members_I, split) for name, ratio in ratios.items()]
    return found


def _questions(kind: Kind, split: Split, samples: int, seed: int, start: int = 0) -> list[tuple[Scene, Question]]:
    """The first questions of a kind that the scenes of a split allow."""
    found: list[tuple[Scene, Question]] = []
    numbers = count(start)
    while len(found) < samples:
        this = scene(seed, next(numbers), split)
        wanted = ("yes", "no")[len(found) % 2] if kind == "yes_no" else None
        if question := _question(this, kind, wanted):
            found.append((this, question))
    return found


def _question(this: Scene, kind: Kind, wanted: str | None) -> Question | None:
    if kind == "caption":
        return Question(INSTRUCTION, full_caption(this))
    return pick_question(this, kind, Draws("benchmark", this.seed, this.split, this.index, kind), wanted)


@cache
def _other_answers(kind: Kind, split: Split, seed: int) -> dict[str, float]:
    """How often each answer is right, among other questions of a kind and split."""
    counts = Counter(other.answer for _, other in _questions(kind, split, CHANCE_QUESTIONS, seed, CHANCE_START))
    return {answer: number / CHANCE_QUESTIONS for answer, number in counts.items()}


SUITE = Suite(read, {"official": rule(pope_yes), "strict": rule(strict_yes)}, measures, Options, image)

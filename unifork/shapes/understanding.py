"""Questions about the world `shapes`: images and questions go out, answers come back, scores come out.

Yes/no questions are balanced exactly and have hard negatives; they are scored by POPE's own reading
of an answer (`yes_no_*`) and by a strict one (`yes_no_strict_*`). Questions about color, number and
position and the caption of the whole image are scored by exact match. Held-out questions are about
held-out compositions, none of which training names, not even to deny it.

Chance is measured: it is what the right answers to other questions of the same kind and split score.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from typing import Any, Literal, NamedTuple, get_args

from PIL import Image

from unifork.config import Benchmark
from unifork.documents.prompts import INSTRUCTION
from unifork.evaluation.benchmarks import Model, Program
from unifork.evaluation.statistics import Estimate, Score, binary, proportion
from unifork.evaluation.understanding.answers import normalized, pope_yes, strict_yes
from unifork.shapes.language import full_caption
from unifork.shapes.questions import Question, pick_question
from unifork.shapes.world import ASKED_SPLITS, Draws, Scene, Split, draw, scene

Kind = Literal["yes_no", "color", "count", "position", "caption"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHANCE_QUESTIONS = 500
"""Other questions of each kind and split, whose answers make the chance level."""
CHANCE_START = 1_000_000
"""Number of the first scene they are about, far from those of any data set."""
IMAGE_NAME = re.compile(r"(seen|held_out)-(\d{8})")


class Item(NamedTuple):
    """One question about one image."""

    scene: Scene
    kind: Kind
    question: str
    answer: str


def prepare(config: Benchmark, seed: int) -> list[Item]:
    """`samples` questions for each kind and split, yes and no in turn."""
    return [item for split in ASKED_SPLITS for kind in KINDS for item in _items(kind, split, config.samples, seed)]


def run(items: Sequence[Item], model: Model) -> list[str]:
    """The answers a model gives to the items; it makes its own view of the images."""
    return model.answer([draw(item.scene) for item in items], [item.question for item in items])


def record(item: Item, answer: str) -> dict[str, Any]:
    """What is worth keeping of one sample, as plain data."""
    return {
        "image": f"{item.scene.split}-{item.scene.index:08d}",
        "kind": item.kind,
        "split": item.scene.split,
        "question": item.question,
        "expected": item.answer,
        "answer": answer,
        "correct": _right(item, answer),
    }


def image(name: str, seed: int) -> Image.Image | None:
    """The image that a record names."""
    found = IMAGE_NAME.fullmatch(name)
    return draw(scene(seed, int(found[2]), "seen" if found[1] == "seen" else "held_out")) if found else None


def score(items: Sequence[Item], answers: Sequence[str]) -> list[Score]:
    """Ten yes/no scores and four exact matches for each split."""
    scores, seed = [], items[0].scene.seed
    for split in ASKED_SPLITS:
        for kind in KINDS:
            both = zip(items, answers, strict=True)
            pairs = [pair for pair in both if (pair[0].scene.split, pair[0].kind) == (split, kind)]
            judged = _yes_no if kind == "yes_no" else _exact
            for name, estimate, chance in judged(pairs, _other_answers(kind, split, seed)):
                scores.append(Score(f"{kind}_{name}", *estimate, chance, len(pairs), seed, split))
    return scores


def _yes_no(pairs: Sequence[tuple[Item, str]], others: Mapping[str, float]) -> Iterator[tuple[str, Estimate, float]]:
    """Scores of yes/no questions with their chances. others: how often each answer is right to other questions."""
    labels = [item.answer == "yes" for item, _ in pairs]
    chances = _coin(others["yes"], sum(labels) / len(labels))
    for prefix, read in {"": pope_yes, "strict_": strict_yes}.items():
        for name, estimate in binary([read(answer) for _, answer in pairs], labels).items():
            yield prefix + name, estimate, chances[name]


def _exact(pairs: Sequence[tuple[Item, str]], others: Mapping[str, float]) -> Iterator[tuple[str, Estimate, float]]:
    """Exact match of other questions."""
    chance = sum(others.get(item.answer, 0.0) for item, _ in pairs) / len(pairs)
    yield "exact", proportion([_right(*pair) for pair in pairs]), chance


def _coin(says_yes: float, is_yes: float) -> dict[str, float]:
    """What a coin that says yes with one probability scores on questions of which another share is yes."""
    return {
        "accuracy": says_yes * is_yes + (1 - says_yes) * (1 - is_yes),
        "precision": is_yes,
        "recall": says_yes,
        "f1": 2 * says_yes * is_yes / (says_yes + is_yes) if says_yes + is_yes else 0.0,
        "yes_ratio": says_yes,
    }


def _right(item: Item, answer: str) -> bool:
    """Whether an answer is right, read strictly."""
    return normalized(answer) == item.answer


def _items(kind: Kind, split: Split, samples: int, seed: int, start: int = 0) -> list[Item]:
    """The first questions of a kind that the scenes of a split allow."""
    found: list[Item] = []
    numbers = count(start)
    while len(found) < samples:
        this = scene(seed, next(numbers), split)
        wanted = ("yes", "no")[len(found) % 2] if kind == "yes_no" else None
        question = _question(this, kind, wanted)
        if question is not None:
            found.append(Item(this, kind, *question))
    return found


def _question(this: Scene, kind: Kind, wanted: str | None) -> Question | None:
    if kind == "caption":
        return Question(INSTRUCTION, full_caption(this))
    return pick_question(this, kind, Draws("benchmark", this.seed, this.split, this.index, kind), wanted)


@cache
def _other_answers(kind: Kind, split: Split, seed: int) -> dict[str, float]:
    """How often each answer is right, among other questions of a kind and split."""
    counts = Counter(item.answer for item in _items(kind, split, CHANCE_QUESTIONS, seed, CHANCE_START))
    return {answer: number / CHANCE_QUESTIONS for answer, number in counts.items()}


BENCHMARK = Program(
    prepare,
    run,
    score,
    record,
    splits=ASKED_SPLITS,
    first_scores=tuple(f"yes_no_{name}" for name in ("accuracy", "f1", "precision", "recall", "yes_ratio")),
    headlines={"yes_no_accuracy": "Yes/no questions, accuracy"},
    image=image,
)

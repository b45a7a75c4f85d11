"""Questions about a whole image with short answers, alone or as a dialogue.

In: a scene and a kind of question. Every question that a scene allows is listed with a mark that says
whether it is about a held-out composition. Scenes of `held_out` are only asked the marked ones, other
scenes only the others, so that training never names a held-out composition, not even to deny it, and
so that held-out scores speak of held-out compositions alone.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import permutations, product
from typing import Literal, NamedTuple

from unifork.shapes.language import NUMBERS, noun, phrase
from unifork.shapes.world import (
    COLORS,
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    SHAPES,
    Draws,
    Scene,
    relation,
)

QuestionKind = Literal["yes_no", "color", "count", "position"]
DIALOGUE: tuple[QuestionKind, ...] = ("yes_no", "yes_no", "yes_no", "yes_no", "position", "color", "count", "count")
"""Half of the questions of a dialogue are yes/no."""


class Question(NamedTuple):
    """A question and its only right answer, in lower case without a full stop."""

    text: str
    answer: str


class Candidate(NamedTuple):
    """A possible question; of a group one is asked, so that groups, not their sizes, decide what is asked."""

    group: str
    held_out: bool
    question: Question


def conversations(scene: Scene) -> list[dict[str, str]]:
    """Up to eight questions about the image with very short answers, half of them yes/no (each by a fair coin).

    Many, because they cost little beside the image. In the split `train` no text names a held-out composition either.
    """
    draws = Draws("conversation", scene.seed, scene.split, scene.index)
    questions: list[Question] = []
    for kind in DIALOGUE:
        if question := pick_question(scene, kind, draws, earlier=questions):
            questions.append(question)
    return [
        turn
        for question in draws.shuffled(questions)
        for turn in ({"role": "user", "text": question.text}, {"role": "assistant", "text": question.answer})
    ]


def pick_question(
    scene: Scene, kind: QuestionKind, draws: Draws, answer: str | None = None, earlier: Collection[Question] = ()
) -> Question | None:
    """One question of a kind not asked yet, with the wanted answer if one is given; None when there is none.

    Without a wanted answer, yes or no is decided by a fair coin. Half of the colored shapes that
    are asked for and not there are made of a color and a shape that are, on different objects.
    """
    if kind == "yes_no" and answer is None:
        answer = draws.pick(("yes", "no"))
    groups: dict[str, list[Question]] = {}
    for group, held_out, question in LISTS[kind](scene):
        if held_out == (scene.split == "held_out") and answer in (None, question.answer) and question not in earlier:
            groups.setdefault(group, []).append(question)
    if not groups:
        return None
    names = sorted(groups)
    if "shape" in names and len(names) > 1:  # a quarter of the yes/no questions name no color, whatever the answer
        names = ["shape"] if draws.below(4) == 0 else [name for name in names if name != "shape"]
    return draws.pick(groups[draws.pick(names)])


def _yes_no(scene: Scene) -> Iterator[Candidate]:
    """Is it there?"""
    colors, shapes = {thing.color for thing in scene.objects}, {thing.shape for thing in scene.objects}
    for shape, color, number in _named(scene):
        parts = "both parts" if color in colors and shape in shapes else "one part"
        group = "shape" if color is None else "there" if number else parts
        question = Question(f"Is there {phrase(shape, color)} in the image?", "yes" if number else "no")
        yield Candidate(group, (color, shape) in HELD_OUT_COLORS, question)


def _count(scene: Scene) -> Iterator[Candidate]:
    """How many are there, of all objects too?

    What is not there is asked for too: the answer zero teaches what "no" means, long before yes and no do.
    """
    yield Candidate("objects", False, Question("How many objects are there?", NUMBERS[len(scene.objects)]))
    for shape, color, number in _named(scene):
        group = ("shape" if color is None else "colored shape") + (" there" if number else " not there")
        held_out = (color, shape) in HELD_OUT_COLORS or (shape, number) in HELD_OUT_COUNTS
        yield Candidate(group, held_out, Question(f"How many {noun(shape, color, 2)} are there?", NUMBERS[number]))


def _named(scene: Scene) -> Iterator[tuple[str, str | None, int]]:
    """How often every shape, and every colored shape of which at least a part is there, is there."""
    shapes = Counter(thing.shape for thing in scene.objects)
    colors = {thing.color for thing in scene.objects}
    pairs = Counter((thing.color, thing.shape) for thing in scene.objects)
    yield from ((shape, None, shapes[shape]) for shape in SHAPES)
    for color, shape in product(COLORS, SHAPES):
        if color in colors or shape in shapes:
            yield shape, color, pairs[color, shape]


def _color(scene: Scene) -> Iterator[Candidate]:
    """For every shape that has one color: which?"""
    for shape, count in Counter(thing.shape for thing in scene.objects).items():
        color, *others = {thing.color for thing in scene.objects if thing.shape == shape}
        if not others:
            text = f"What color {'is' if count == 1 else 'are'} the {noun(shape, None, count)}?"
            yield Candidate("color", (color, shape) in HELD_OUT_COLORS, Question(text, color))


def _position(scene: Scene) -> Iterator[Candidate]:
    """For every two objects in one row or column whose shapes occur once: how do they lie?"""
    counts = Counter(thing.shape for thing in scene.objects)
    for a, b in permutations([thing for thing in scene.objects if counts[thing.shape] == 1], 2):
        if answer := relation(a, b):
            text = f"Is the {a.shape} left of, right of, above or below the {b.shape}?"
            yield Candidate("position", {a.shape, b.shape} in HELD_OUT_PAIRS, Question(text, answer))


LISTS = {"yes_no": _yes_no, "color": _color, "count": _count, "position": _position}

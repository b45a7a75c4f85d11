"""Questions about a whole picture: a scene and a kind go in, a question with its short answer comes out.

Every question that a scene allows is listed with a mark that says whether it is about a held-out
composition. Scenes of `held_out` are only asked the marked ones, other scenes only the others, so
that training never names a held-out composition, not even to deny it, and so that held-out scores
speak of held-out compositions alone.
"""

from collections import Counter
from collections.abc import Collection
from itertools import permutations, product
from typing import Literal, NamedTuple

from unifork.shapes.words import NUMBERS, noun, phrase
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


class Question(NamedTuple):
    """A question and its only right answer, in lower case without a full stop."""

    text: str
    answer: str


class _Candidate(NamedTuple):
    """A possible question; of a group one is asked, so that groups, not their sizes, decide what is asked."""

    group: str
    held_out: bool
    question: Question


def pick_question(
    scene: Scene, kind: QuestionKind, draws: Draws, answer: str | None = None, asked: Collection[Question] = ()
) -> Question | None:
    """One question of a kind not asked yet, with the wanted answer if one is given; None when there is none.

    Without a wanted answer, yes or no is decided by a fair coin. Half of the coloured shapes that
    are asked for and not there are made of a colour and a shape that are, on different objects.
    """
    if kind == "yes_no" and answer is None:
        answer = draws.pick(("yes", "no"))
    listed = _LISTS[kind](scene)
    usable = [
        candidate
        for candidate in listed
        if candidate.held_out == (scene.split == "held_out")
        and answer in (None, candidate.question.answer)
        and candidate.question not in asked
    ]
    groups = sorted({candidate.group for candidate in usable})
    if not groups:
        return None
    if "shape" in groups and len(groups) > 1:  # a quarter of the yes/no questions name no colour, whatever the answer
        groups = ["shape"] if draws.below(4) == 0 else [group for group in groups if group != "shape"]
    group = draws.pick(groups)
    return draws.pick([candidate.question for candidate in usable if candidate.group == group])


def _yes_no(scene: Scene) -> list[_Candidate]:
    """For every shape and every coloured shape of which at least a part is there: is it there?"""
    there = {(thing.color, thing.shape) for thing in scene.objects}
    colors, shapes = {color for color, _ in there}, {shape for _, shape in there}
    found = [_Candidate("shape", False, _is_there(phrase(shape), shape in shapes)) for shape in SHAPES]
    for color, shape in product(COLORS, SHAPES):
        parts = (color in colors) + (shape in shapes)
        if parts:
            group = "there" if (color, shape) in there else ("one part", "both parts")[parts - 1]
            question = _is_there(phrase(shape, color), (color, shape) in there)
            found.append(_Candidate(group, (color, shape) in HELD_OUT_COLORS, question))
    return found


def _is_there(what: str, answer: bool) -> Question:
    return Question(f"Is there {what} in the image?", "yes" if answer else "no")


def _color(scene: Scene) -> list[_Candidate]:
    """For every shape that has one colour: which?"""
    found = []
    for shape, count in Counter(thing.shape for thing in scene.objects).items():
        colors = {thing.color for thing in scene.objects if thing.shape == shape}
        if len(colors) == 1:
            (color,) = colors
            question = Question(f"What color {'is' if count == 1 else 'are'} the {noun(shape, None, count)}?", color)
            found.append(_Candidate("color", (color, shape) in HELD_OUT_COLORS, question))
    return found


def _count(scene: Scene) -> list[_Candidate]:
    """For all objects, every shape, and every coloured shape of which at least a part is there: how many?

    What is not there is asked for too: the answer zero teaches what "no" means, long before yes and no do.
    """
    shapes = Counter(thing.shape for thing in scene.objects)
    pairs = Counter((thing.color, thing.shape) for thing in scene.objects)
    colors = {color for color, _ in pairs}
    found = [_Candidate("objects", False, Question("How many objects are there?", NUMBERS[len(scene.objects)]))]
    for shape in SHAPES:
        held_out = (shape, shapes[shape]) in HELD_OUT_COUNTS
        found.append(_how_many("shape", held_out, noun(shape, None, 2), shapes[shape]))
    for color, shape in product(COLORS, SHAPES):
        if color in colors or shape in shapes:
            held_out = (color, shape) in HELD_OUT_COLORS or (shape, pairs[color, shape]) in HELD_OUT_COUNTS
            found.append(_how_many("colored shape", held_out, noun(shape, color, 2), pairs[color, shape]))
    return found


def _how_many(what: str, held_out: bool, named: str, count: int) -> _Candidate:
    group = f"{what} there" if count else f"{what} not there"
    return _Candidate(group, held_out, Question(f"How many {named} are there?", NUMBERS[count]))


def _position(scene: Scene) -> list[_Candidate]:
    """For every two objects in one row or column whose shapes occur once: how do they lie?"""
    counts = Counter(thing.shape for thing in scene.objects)
    single = [thing for thing in scene.objects if counts[thing.shape] == 1]
    found = []
    for a, b in permutations(single, 2):
        answer = relation(a, b)
        if answer is not None:
            text = f"Is the {a.shape} left of, right of, above or below the {b.shape}?"
            found.append(_Candidate("position", {a.shape, b.shape} in HELD_OUT_PAIRS, Question(text, answer)))
    return found


_LISTS = {"yes_no": _yes_no, "color": _color, "count": _count, "position": _position}

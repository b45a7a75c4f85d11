"""Texts about scenes: captions of the crop and of the whole picture, class names, prompts, and dialogues.

In: a scene of `world`, or the kind and split of prompts wanted. Out: short texts of few words, so
that a byte-level BPE of a few hundred entries holds them all, and for prompts also what a picture
must show, in the clauses of GenEval's metadata. Generation learns from crops, so `crop_caption`
speaks of the crop only; everything else speaks of the whole picture.
"""

from dataclasses import dataclass
from itertools import permutations, product

from unifork.evaluation.generation.geneval import Clause
from unifork.shapes.questions import Question, QuestionKind, pick_question
from unifork.shapes.words import noun, phrase
from unifork.shapes.world import (
    COLORS,
    RELATIONS,
    SHAPES,
    SINGLE_KINDS,
    Draws,
    Kind,
    Scene,
    Split,
    crop_objects,
    held_out,
    relation,
)

PHOTO = "a photo of "
"""How every evaluation prompt and most captions of crops begin, as in GenEval."""


@dataclass(frozen=True)
class Prompt:
    """A text to paint, and what the picture must and must not show for it."""

    text: str
    kind: Kind
    split: Split
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


# --------------------------------------------------------------------------------------- captions


def crop_caption(scene: Scene) -> str:
    """What the centre crop shows, in one of a few wordings; exact, but colours are often left unsaid as in GenEval."""
    draws = Draws("caption", scene.seed, scene.split, scene.index)
    start = draws.pick((PHOTO, PHOTO, PHOTO, ""))
    with_color = scene.kind in ("colors", "color_attr") or (scene.kind in ("counting", "position") and draws.below(2))
    things = list(crop_objects(scene))
    names = [phrase(thing.shape, thing.color if with_color else None) for thing in things]
    if scene.kind in SINGLE_KINDS:
        return start + names[0]
    if scene.kind == "counting":
        return start + phrase(things[0].shape, things[0].color if with_color else None, len(things))
    first, second = draws.shuffled((0, 1))
    middle = (scene.kind == "position" and relation(things[first], things[second])) or "and"
    return f"{start}{names[first]} {middle} {names[second]}"


def full_caption(scene: Scene) -> str:
    """Everything in the picture, equal objects counted together, in reading order: one text per picture.

    Exact match with it is a fair score, since a picture determines it.
    """
    in_order = sorted(scene.objects, key=lambda thing: (thing.box[1], thing.box[0]))
    groups = [(thing.shape, thing.color) for thing in in_order]
    names = [phrase(shape, color, groups.count((shape, color))) for shape, color in dict.fromkeys(groups)]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def class_name(scene: Scene) -> str | None:
    """The class of a picture with one object, with its colour in scenes about colour; None for other pictures."""
    if len(scene.objects) != 1:
        return None
    (thing,) = scene.objects
    return noun(thing.shape, thing.color if scene.kind == "colors" else None)


# --------------------------------------------------------------------------------------- dialogues


def conversations(scene: Scene) -> list[dict[str, str]]:
    """Up to eight questions about the picture with very short answers, half of them yes/no (each by a fair coin).

    Many, because they cost little beside the picture. In the split `train` no text names a held-out composition either.
    """
    draws = Draws("conversation", scene.seed, scene.split, scene.index)
    asked: list[Question] = []
    kinds: list[QuestionKind] = ["yes_no", "yes_no", "yes_no", "yes_no", "position", "color", "count", "count"]
    for kind in kinds:
        answer = draws.pick(("yes", "no")) if kind == "yes_no" else None
        question = pick_question(scene, kind, draws, answer, asked)
        if question is not None:
            asked.append(question)
    return [
        turn
        for question in draws.shuffled(asked)
        for turn in ({"role": "user", "text": question.text}, {"role": "assistant", "text": question.answer})
    ]


# ----------------------------------------------------------------------------------------- prompts


def prompts(kind: Kind, split: Split, count: int, seed: int) -> list[Prompt]:
    """`count` evaluation prompts: every possible one once, in a seeded order, before any comes again.

    Those of `held_out` ask for a held-out composition, those of other splits for none. A single
    object without a colour is no composition: its prompts are the same in all splits.
    """
    possible = _possible(kind, split)
    draws = Draws("prompts", seed, split, kind)
    result: list[Prompt] = []
    while len(result) < count:
        result += draws.shuffled(possible)
    return result[:count]


def _possible(kind: Kind, split: Split) -> list[Prompt]:
    """Every prompt of a kind and split. The clauses come in GenEval's order: for positions the second object first."""
    pairs = list(permutations(SHAPES, 2))
    found: list[tuple[str, tuple[Clause, ...]]]
    match kind:
        case "single_object":
            found = [(phrase(shape), (Clause(shape),)) for shape in SHAPES]
        case "colors":
            found = [(phrase(shape, color), (Clause(shape, 1, color),)) for color, shape in product(COLORS, SHAPES)]
        case "counting":
            found = [(phrase(shape, None, n), (Clause(shape, n),)) for shape, n in product(SHAPES, (2, 3, 4))]
        case "two_object":
            found = [(f"{phrase(a)} and {phrase(b)}", (Clause(a), Clause(b))) for a, b in pairs]
        case "position":
            found = [
                (f"{phrase(a)} {name} {phrase(b)}", (Clause(b), Clause(a, position=(name, 0))))
                for (a, b), name in product(pairs, RELATIONS)
            ]
        case "color_attr":
            found = [
                (f"{phrase(a, c)} and {phrase(b, d)}", (Clause(a, 1, c), Clause(b, 1, d)))
                for (a, b), (c, d) in product(pairs, permutations(COLORS, 2))
            ]
    asked = []
    for text, include in found:
        exclude = tuple(Clause(one.name, one.count + 1) for one in include) if kind == "counting" else ()
        shown = [(one.name, one.color, None) for one in include for _ in range(one.count)]
        if kind == "single_object" or held_out(shown) == (split == "held_out"):
            asked.append(Prompt(PHOTO + text, kind, split, include, exclude))
    return asked

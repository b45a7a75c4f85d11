"""Texts about scenes: captions of the crop and of the whole image, class names, and prompts.

In: a scene of `world`, or the kind and split of prompts wanted. Out: short texts of few words, so
that a byte-level BPE of a few hundred entries holds them all, and for prompts also what an image
must show, in the clauses of GenEval's metadata. Generation learns from crops, so `crop_caption`
speaks of the crop only; everything else speaks of the whole image.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations, product

from unifork.evaluation.generation.geneval import Clause
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
NUMBERS = ("zero", "one", "two", "three", "four")
"""Numbers as they are spoken; an image never holds more than four objects."""


def noun(shape: str, color: str | None = None, count: int = 1) -> str:
    """`red circle`, `crosses`."""
    ending = "" if count == 1 else "es" if shape.endswith("s") else "s"
    return f"{color} {shape}{ending}" if color else shape + ending


def phrase(shape: str, color: str | None = None, count: int = 1) -> str:
    """`a red circle`, `two crosses`."""
    return f"{'a' if count == 1 else NUMBERS[count]} {noun(shape, color, count)}"


@dataclass(frozen=True)
class Prompt:
    """A text to generate_images, and what the image must and must not show for it."""

    text: str
    kind: Kind
    split: Split
    seed: int
    """Of the order in which prompts are drawn."""
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


# --------------------------------------------------------------------------------------- captions


def crop_caption(scene: Scene) -> str:
    """What the center crop shows, in one of a few wordings; exact, but colors are often left unsaid as in GenEval."""
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
    """Everything in the image, equal objects counted together, in reading order: one text per image.

    Exact match with it is a fair score, since an image determines it.
    """
    in_order = sorted(scene.objects, key=lambda thing: (thing.box[1], thing.box[0]))
    groups = [(thing.shape, thing.color) for thing in in_order]
    names = [phrase(shape, color, groups.count((shape, color))) for shape, color in dict.fromkeys(groups)]
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def class_name(scene: Scene) -> str | None:
    """The class of an image with one object, with its color in scenes about color; None for other images."""
    if len(scene.objects) != 1:
        return None
    (thing,) = scene.objects
    return noun(thing.shape, thing.color if scene.kind == "colors" else None)


# ----------------------------------------------------------------------------------------- prompts


def prompts(kind: Kind, split: Split, count: int, seed: int) -> list[Prompt]:
    """`count` evaluation prompts: every possible one once, in a seeded order, before any comes again.

    Those of `held_out` ask for a held-out composition, those of other splits for none. A single
    object without a color is no composition: its prompts are the same in all splits.
    """
    possible = _possible(kind, split, seed)
    draws = Draws("prompts", seed, split, kind)
    result: list[Prompt] = []
    while len(result) < count:
        result += draws.shuffled(possible)
    return result[:count]


def _possible(kind: Kind, split: Split, seed: int) -> list[Prompt]:
    """Every prompt of a kind and split."""
    possible = []
    for include in _includes()[kind]:
        exclude = tuple(Clause(clause.name, clause.count + 1) for clause in include) if kind == "counting" else ()
        shown = [(clause.name, clause.color, None) for clause in include for _ in range(clause.count)]
        if kind == "single_object" or held_out(shown) == (split == "held_out"):
            possible.append(Prompt(PHOTO + _wording(include), kind, split, seed, include, exclude))
    return possible


def _includes() -> dict[Kind, Iterable[tuple[Clause, ...]]]:
    """All that prompts ask for. The clauses come in GenEval's order: for positions the second object first."""
    pairs = list(permutations(SHAPES, 2))
    return {
        "single_object": ((Clause(shape),) for shape in SHAPES),
        "colors": ((Clause(shape, 1, color),) for color, shape in product(COLORS, SHAPES)),
        "counting": ((Clause(shape, number),) for shape, number in product(SHAPES, (2, 3, 4))),
        "two_object": ((Clause(a), Clause(b)) for a, b in pairs),
        "position": ((Clause(b), Clause(a, position=(name, 0))) for (a, b), name in product(pairs, RELATIONS)),
        "color_attr": (
            (Clause(a, 1, c), Clause(b, 1, d)) for (a, b), (c, d) in product(pairs, permutations(COLORS, 2))
        ),
    }


def _wording(include: tuple[Clause, ...]) -> str:
    names = [phrase(clause.name, clause.color, clause.count) for clause in include]
    position = include[-1].position
    return f"{names[1]} {position[0]} {names[0]}" if position else " and ".join(names)

"""GenEval's rules: the objects found in an image and a prompt's clauses go in, right or wrong comes out.

Own code after djghosh13/geneval, evaluation/evaluate_images.py. What surprises in it is kept: a
clause looks at the `count` surest objects of its class only; more objects than asked for are no
fault unless a clause excludes them (only counting does); two relations hold at once on a diagonal.
Finding objects, and dropping unsure ones, is the detector's part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHRINK = 0.1
"""Share of the two sizes by which an offset is shortened before it counts as a direction."""
LEAST_OFFSET = 1e-3
"""Pixels; what is left of a shorter offset is none."""
LEAST_DIRECTION = 0.5
"""A relation holds when the shortened offset, over the length of the full one, exceeds this."""


@dataclass(frozen=True)
class Clause:
    """Something an image must (or must not) show: at least `count` objects of a class.

    position: a relation and the number of the clause whose objects it is relative to.
    """

    name: str
    count: int = 1
    color: str | None = None
    position: tuple[str, int] | None = None


class Found(NamedTuple):
    """An object that a detector found; the box is (left, top, right, bottom), y grows downwards."""

    name: str
    color: str
    box: tuple[float, float, float, float]


def judge(include: Sequence[Clause], exclude: Sequence[Clause], objects: Sequence[Found]) -> tuple[str, ...]:
    """What is wrong with an image by its objects, which come surest first; nothing where it is right.

    All of `include` and none of `exclude` has to be met.
    """
    faults: list[str] = []
    matched: list[list[Found]] = []
    for clause in include:
        found = [thing for thing in objects if thing.name == clause.name]
        fault = _fault(clause, found, matched)
        faults += fault
        matched.append([] if fault else found[: clause.count])
    for clause in exclude:
        count = sum(thing.name == clause.name for thing in objects)
        if count >= clause.count:
            faults.append(f"expected fewer than {clause.count} {clause.name}, found {count}")
    return tuple(faults)


def _fault(clause: Clause, found: list[Found], matched: list[list[Found]]) -> list[str]:
    """What is wrong with the objects of a clause's class; nothing when the clause is met."""
    if len(found) < clause.count:
        return [f"expected {clause.count} {clause.name}, found {len(found)}"]
    found = found[: clause.count]
    if clause.color is not None:
        colors = [thing.color for thing in found]
        if colors.count(clause.color) < clause.count:
            return [f"expected {clause.count} {clause.color} {clause.name}, found {' and '.join(colors)}"]
    if clause.position is not None:
        name, target = clause.position
        if not matched[target]:
            return [f"nothing that {clause.name} could be {name}"]
        for thing in found:
            for other in matched[target]:
                if name not in (holding := relations(thing.box, other.box)):
                    return [f"expected {clause.name} {name} {other.name}, found {sorted(holding) or 'no relation'}"]
    return []


def relations(box: tuple[float, ...], target: tuple[float, ...]) -> set[str]:
    """The relations in which a box stands to a target; boxes are (left, top, right, bottom), y grows downwards."""
    offset = [(box[i] + box[i + 2] - target[i] - target[i + 2]) / 2 for i in (0, 1)]
    sizes = [box[i + 2] - box[i] + target[i + 2] - target[i] for i in (0, 1)]
    left = [max(abs(way) - SHRINK * size, 0.0) for way, size in zip(offset, sizes, strict=True)]
    if max(left) < LEAST_OFFSET:
        return set()
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    far = [part / length > LEAST_DIRECTION for part in left]
    names = (("left of", "right of"), ("above", "below"))
    return {names[axis][offset[axis] > 0] for axis in (0, 1) if far[axis]}

"""GenEval: 553 prompts of six kinds, four images each; what a detector finds in an image decides.

Files: `evaluation_metadata.jsonl`, the official prompts. Answers: what `examine` found in the images (JSON of objects,
the surest first), or the official scorer's `results.jsonl`, whose verdicts are taken over.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import ImageOps
from pydantic import PositiveInt

from unifork.config import StrictModel
from unifork.errors import one_of
from unifork.evaluation.archive import Archive
from unifork.evaluation.generation.geneval import Clause, Found, judge
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, accuracy, mean
from unifork.evaluation.suites import Answer, Suite, Verdict
from unifork.images import open_image

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
LEAST_SURE, LEAST_SURE_COUNTED, MOST_OBJECTS = 0.3, 0.9, 16
"""A detection counts when its confidence is above this, in prompts about numbers above the second; most of a class."""


class Options(StrictModel):
    """Of its card."""

    samples: PositiveInt = 4
    """Images of every prompt."""


def read(archive: Archive, options: Options, _: int) -> list[Item]:
    """`samples` items for every prompt, which is their cluster. Chance is not known without other images: 0."""
    items = []
    for number, plain in enumerate(archive.json("**/evaluation_metadata.jsonl")):
        name, truth = f"{number:05d}", {part: plain.get(part, []) for part in ("include", "exclude")}
        for place, clause in enumerate([_clause(part) for part in (*truth["include"], *truth["exclude"])]):
            if clause.position and clause.position[1] not in range(place):
                raise LookupError(f"prompt {name}: position {clause.position} names no clause before its own")
        for sample in range(options.samples):
            kind, file = one_of("tag", plain["tag"], KINDS, f"prompt {name}"), f"{name}/samples/{sample:04d}"
            about = {"kind": kind, "file": file, "metadata": plain}
            items.append(Item(f"{name}/{sample:04d}", plain["prompt"], truth, name, about=about))
    return items


def examine(networks: Mapping[str, Any], item: Item, data: bytes) -> str:
    """What the network `detector` finds, and the color that `colors` sees where a clause names one; boxes in pixels."""
    image = ImageOps.exif_transpose(open_image(data)).convert("RGB")
    found = [thing for thing in networks["detector"](image) if thing.score > LEAST_SURE]
    found.sort(key=lambda thing: -thing.score)
    colored: dict[int, str] = {}
    for clause in item.truth["include"]:
        if "color" in clause:
            least = _least(item)
            numbers = [n for n, thing in enumerate(found) if thing.name == clause["class"] and thing.score > least]
            numbers = numbers[: clause["count"]]
            colored |= zip(numbers, networks["colors"](image, [found[number] for number in numbers]), strict=True)
    rows = [[thing.name, colored.get(number, ""), thing.box, thing.score] for number, thing in enumerate(found)]
    return json.dumps(rows)


def _least(item: Item) -> float:
    return LEAST_SURE_COUNTED if item.about["kind"] == "counting" else LEAST_SURE


def official(item: Item, answer: Answer) -> Verdict:
    """GenEval's verdict on what was found, or the official scorer's own, `True` or `False`."""
    if answer.text in ("True", "False"):
        return Verdict(answer.text, float(answer.text == "True"))
    try:
        rows = [
            (Found(name, color, (float(left), float(top), float(right), float(bottom))), float(score))
            for name, color, (left, top, right, bottom), score in json.loads(answer.text)
        ]
    except (ValueError, TypeError):
        return Verdict(None, 0.0, ("not what a detector found",))
    counts, objects = Counter[str](), []
    for thing, score in sorted(rows, key=lambda row: -row[1]):
        counts[thing.name] += score > _least(item)
        if score > _least(item) and counts[thing.name] <= MOST_OBJECTS:
            objects.append(thing)
    include, exclude = ([_clause(plain) for plain in item.truth[part]] for part in ("include", "exclude"))
    faults = judge(include, exclude, objects)
    return Verdict([thing._asdict() for thing in objects], float(not faults), faults)


def _clause(plain: Mapping[str, Any]) -> Clause:
    return Clause(plain["class"], int(plain["count"]), plain.get("color"), plain.get("position"))


def measures(items: Sequence[Item], right_I: np.ndarray, _: np.ndarray) -> list[Measure]:
    """The share of right images of each kind, and `overall`, the unweighted mean of the kinds."""
    kinds_I = np.array([item.about["kind"] for item in items])
    kinds = [accuracy(kind, right_I, kinds_I == kind) for kind in KINDS if (kinds_I == kind).any()]
    return [mean("overall", kinds), *kinds]


SUITE = Suite(read, {"official": official}, measures, Options, examine=examine)

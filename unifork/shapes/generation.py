"""GenEval on the world `shapes`: prompts go out, images come back, six scores and their mean come out.

Images are read by the world's own detector and judged by GenEval's rules. Chance is measured, not
assumed: it is the score of other images of the same split, drawn without looking at the prompt.
(Training images would do for the seen split; on held-out prompts they score 0 by construction.)

Seen and held-out compositions are scored apart. A prompt for a single object names no composition,
so those of `held_out` are the seen ones; the score `composed`, the mean of the other five, is the one
to compare between the splits, and `overall` is GenEval's mean of all six.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np
from pydantic import PositiveInt

from unifork.config import StrictModel
from unifork.evaluation.archive import Archive
from unifork.evaluation.generation.geneval import Clause, Found, judge
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, accuracy, mean
from unifork.evaluation.suites import Answer, Suite, Verdict
from unifork.images import open_image
from unifork.shapes.detector import detect
from unifork.shapes.language import Prompt, prompts
from unifork.shapes.world import ASKED_SPLITS, KINDS, Draws, Object, Split, crop_objects, scene

CHANCE_IMAGES = 256
"""Other images of its split that every prompt is held against."""
CHANCE_START = 1_000_000
"""Number of the first of them, far from those of any data set."""


class Options(StrictModel):
    """Of its card."""

    samples: PositiveInt = 50
    """Prompts for each kind and split."""


def read(_: Archive, options: Options, seed: int) -> list[Item]:
    """`samples` prompts for each kind and split."""
    every = [
        prompt for split in ASKED_SPLITS for kind in KINDS for prompt in prompts(kind, split, options.samples, seed)
    ]
    chances, items = _chances(every, seed), []
    for number, prompt in enumerate(every):
        truth = {"include": [*map(asdict, prompt.include)], "exclude": [*map(asdict, prompt.exclude)]}
        name, about = str(number), {"kind": prompt.kind}
        items.append(Item(name, prompt.text, truth, name, prompt.split, "", chances[prompt], about))
    return items


def official(item: Item, answer: Answer) -> Verdict:
    """GenEval's verdict on what the detector finds."""
    objects = detect(open_image(answer.image or b""))
    include, exclude = ([Clause(**clause) for clause in item.truth[part]] for part in ("include", "exclude"))
    faults = _faults(include, exclude, objects)
    return Verdict([thing._asdict() for thing in objects], float(not faults), faults)


def measures(items: Sequence[Item], right_I: np.ndarray, _: np.ndarray) -> list[Measure]:
    """The six scores, `overall` and `composed`, for each split."""
    names = np.array([(item.split, item.about["kind"]) for item in items])
    found = []
    for split in ASKED_SPLITS:
        members = {kind: (names == (split, kind)).all(axis=1) for kind in KINDS}
        kinds = [accuracy(kind, right_I, of_I, split) for kind, of_I in members.items()]
        composed = mean("composed", [kind for kind in kinds if kind.name != "single_object"])
        found += [*kinds, mean("overall", kinds), composed]
    return found


def _faults(include: Sequence[Clause], exclude: Sequence[Clause], objects: Iterable[Object]) -> tuple[str, ...]:
    """What these objects, the surest first, lack of what is asked for."""
    return judge(include, exclude, [Found(*thing) for thing in objects])


def _chances(every: Sequence[Prompt], seed: int) -> dict[Prompt, float]:
    """For each prompt the share of other images of its split that would be right for it by accident."""
    images = {split: [_accident(seed, number, split) for number in range(CHANCE_IMAGES)] for split in ASKED_SPLITS}
    return {
        prompt: float(np.mean([not _faults(prompt.include, prompt.exclude, held) for held in images[prompt.split]]))
        for prompt in set(every)
    }


def _accident(seed: int, number: int, split: Split) -> list[Object]:
    """The objects of a crop, in any order: a detector does not know which the scene means first."""
    objects = crop_objects(scene(seed, CHANCE_START + number, split))
    return Draws("chance", seed, split, number).shuffled(objects)


SUITE = Suite(read, {"official": official}, measures, Options)

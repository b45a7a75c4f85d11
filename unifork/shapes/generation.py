"""GenEval on the world `shapes`: prompts go out, images come back, six scores and their mean come out.

Images are read by the world's own detector and judged by GenEval's rules. Chance is measured, not
assumed: it is the score of other images of the same split, drawn without looking at the prompt.
(Training images would do for the seen split; on held-out prompts they score 0 by construction.)

Seen and held-out compositions are scored apart. A prompt for a single object names no composition,
so those of `held_out` are the seen ones; the score `composed`, the mean of the other five, is the one
to compare between the splits, and `overall` is GenEval's mean of all six.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

from unifork.config import Benchmark
from unifork.evaluation.benchmarks import Model, Program
from unifork.evaluation.generation.geneval import Found, Verdict, judge
from unifork.evaluation.statistics import Score, mean, proportion
from unifork.shapes.detector import detect
from unifork.shapes.language import Prompt, prompts
from unifork.shapes.world import ASKED_SPLITS, KINDS, Draws, Object, Split, crop_objects, scene

CHANCE_IMAGES = 256
"""Other images of its split that every prompt is held against."""
CHANCE_START = 1_000_000
"""Number of the first of them, far from those of any data set."""


def prepare(config: Benchmark, seed: int) -> list[Prompt]:
    """`samples` prompts for each kind and split."""
    return [prompt for split in ASKED_SPLITS for kind in KINDS for prompt in prompts(kind, split, config.samples, seed)]


def run(items: Sequence[Prompt], model: Model) -> list[Image.Image]:
    """The images a model generates for the prompts."""
    return model.generate_images([prompt.text for prompt in items])


def record(prompt: Prompt, image: Image.Image) -> dict[str, Any]:
    """What is worth keeping of one sample, as plain data."""
    objects = detect(image)
    correct, faults = _verdict(prompt, objects)
    return {
        "prompt": prompt.text,
        "kind": prompt.kind,
        "split": prompt.split,
        "objects": [thing._asdict() for thing in objects],
        "correct": correct,
        "faults": list(faults),
    }


def score(items: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Score]:
    """The six scores, `overall` and `composed`, for each split."""
    verdicts = [_verdict(prompt, detect(image)) for prompt, image in zip(items, images, strict=True)]
    seed, chances = items[0].seed, _chances(items)
    scores = []
    for split in ASKED_SPLITS:
        kinds = []
        for kind in KINDS:
            rows = [i for i, prompt in enumerate(items) if (prompt.split, prompt.kind) == (split, kind)]
            chance = sum(chances[items[i]] for i in rows) / len(rows)
            estimate = proportion([verdicts[i].correct for i in rows])
            kinds.append(Score(kind, *estimate, chance, len(rows), seed, split))
        composed = mean("composed", [score for score in kinds if score.name != "single_object"])
        scores += [*kinds, mean("overall", kinds), composed]
    return scores


def _verdict(prompt: Prompt, objects: Iterable[Object]) -> Verdict:
    """Whether these objects, the surest first, are what a prompt asks for."""
    return judge(prompt.include, prompt.exclude, [Found(*thing) for thing in objects])


def _chances(items: Sequence[Prompt]) -> dict[Prompt, float]:
    """For each prompt the share of other images of its split that would be right for it by accident."""
    seed = items[0].seed
    images = {split: [_accident(seed, number, split) for number in range(CHANCE_IMAGES)] for split in ASKED_SPLITS}
    return {
        prompt: proportion([_verdict(prompt, objects).correct for objects in images[prompt.split]]).value
        for prompt in set(items)
    }


def _accident(seed: int, number: int, split: Split) -> list[Object]:
    """The objects of a crop, in any order: a detector does not know which the scene means first."""
    objects = crop_objects(scene(seed, CHANCE_START + number, split))
    return Draws("chance", seed, split, number).shuffled(objects)


BENCHMARK = Program(
    prepare,
    run,
    score,
    record,
    splits=ASKED_SPLITS,
    first_scores=("overall", "composed", *KINDS),
    headlines={
        "overall": "Images from text, mean of the six kinds",
        "single_object": "Images from text, single object",
    },
    note="Held-out compositions never occur in training; a single object is no composition, so there both splits ask "
    "for the same.",
)

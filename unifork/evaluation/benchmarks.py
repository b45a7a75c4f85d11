"""All benchmarks behind one small protocol: a configuration and a model go in, samples and scores come out.

A benchmark prepares its items from a configuration and a seed, lets a model work on them, and scores
what came back. A model is two plain functions, so a perfect, a random and a constant one can stand
in for it. Adding a benchmark is one module that holds a `Program`; an experiment names it as
`kind: MODULE:OBJECT`, or by a name in BENCHMARKS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from unifork.config import Benchmark
from unifork.errors import DataError
from unifork.evaluation.statistics import Score
from unifork.registry import Registry

EVALUATE_VERSION = 1
"""Raise when the same model would get other scores: sampling, answering, scoring."""


@dataclass(frozen=True)
class Model:
    """What a benchmark asks of a model."""

    generate_images: Callable[[list[str]], list[Image.Image]]
    """Texts in, one image for each of them out."""
    answer: Callable[[list[Image.Image], list[str]], list[str]]
    """Images and one question about each in, one answer for each out."""


@dataclass(frozen=True)
class Program:
    """One benchmark: its functions, and what a page must know to show what came out.

    What items and outputs are is its own affair: prepare(configuration, seed) makes the items; run(items, model)
    gets one output for each; score(items, outputs) makes the scores; record(item, output) makes plain data to keep
    of a sample.
    """

    prepare: Callable[[Benchmark, int], list[Any]]
    run: Callable[[list[Any], Model], list[Any]]
    score: Callable[[list[Any], list[Any]], list[Score]]
    record: Callable[[Any, Any], dict[str, Any]]
    splits: tuple[str, ...] = ("all",)
    """Its splits, in the order of columns."""
    first_scores: tuple[str, ...] = ()
    """Its scores in the order of rows; others follow by name."""
    headlines: Mapping[str, str] = field(default_factory=dict)
    """Scores of a summary, by name, with a title for people."""
    note: str = ""
    """What people must know to read them, in whole sentences."""
    image: Callable[[str, int], Image.Image | None] | None = None
    """image(name, seed) makes the image that a record names again; None where it is none of the benchmark's."""


BENCHMARKS: Registry[Program] = Registry("kind of benchmark", Program, {})
"""Benchmarks that experiments name without a module."""


def evaluate(config: Benchmark, seed: int, model: Model, place: str) -> tuple[list[dict[str, Any]], list[Score]]:
    """Run a benchmark on a model: a record of every sample, in order, and the scores.

    Raises ConfigError, naming `place`, for an unknown kind of benchmark, DataError where an output is missing.
    """
    program = BENCHMARKS.find(config.kind, place)
    items = program.prepare(config, seed)
    outputs = program.run(items, model)
    if len(outputs) != len(items):
        raise DataError(f"{place}: {len(outputs)} outputs for {len(items)} items; one each is needed")
    records = [program.record(item, output) for item, output in zip(items, outputs, strict=True)]
    return records, program.score(items, outputs)

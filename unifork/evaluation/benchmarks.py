"""All benchmarks behind one small protocol: a configuration and a model go in, samples and scores come out.

A benchmark prepares its items from a configuration and a seed, lets a model work on them, and scores
what came back. A model is two plain functions, so a perfect, a random and a constant one can stand
in for it. Adding a benchmark is one module with these functions and one entry in BENCHMARKS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unifork.config import Benchmark
from unifork.errors import unknown
from unifork.evaluation.statistics import Score
from unifork.shapes import generation as generation_shapes
from unifork.shapes import understanding as understanding_shapes
from unifork.shapes.generation import Painter
from unifork.shapes.understanding import Answerer

EVALUATE_VERSION = 1
"""Raise when the same model would get other scores: sampling, answering, scoring."""


@dataclass(frozen=True)
class Model:
    """What a benchmark asks of a model: painting texts, and answering questions about pictures."""

    paint: Painter
    answer: Answerer


@dataclass(frozen=True)
class Program:
    """The functions of one benchmark; what items and outputs are is its own affair.

    prepare(configuration, seed) makes the items; run(items, model) gets one output for each;
    score(items, outputs) makes the scores; record(item, output) makes plain data to keep of a sample.
    """

    prepare: Callable[[Benchmark, int], list[Any]]
    run: Callable[[list[Any], Model], list[Any]]
    score: Callable[[list[Any], list[Any]], list[Score]]
    record: Callable[[Any, Any], dict[str, Any]]


@dataclass(frozen=True)
class Result:
    """What an evaluation leaves behind: the outputs in order, a record of each, and the scores."""

    outputs: list[Any]
    records: list[dict[str, Any]]
    scores: list[Score]


BENCHMARKS: dict[str, Program] = {
    "shapes-generation": Program(
        generation_shapes.prepare,
        lambda items, model: generation_shapes.run(items, model.paint),
        generation_shapes.score,
        generation_shapes.record,
    ),
    "shapes-understanding": Program(
        understanding_shapes.prepare,
        lambda items, model: understanding_shapes.run(items, model.answer),
        understanding_shapes.score,
        understanding_shapes.record,
    ),
}


def check(config: Benchmark, place: str) -> None:
    """Raise ConfigError, naming `place`, for a benchmark that cannot be run."""
    if config.kind not in BENCHMARKS:
        raise unknown("kind of benchmark", config.kind, BENCHMARKS, place)


def evaluate(config: Benchmark, seed: int, model: Model, place: str = "benchmark") -> Result:
    """Run a benchmark on a model. Raises ConfigError, naming `place`, for an unknown kind of benchmark."""
    if config.kind not in BENCHMARKS:
        raise unknown("kind of benchmark", config.kind, BENCHMARKS, place)
    program = BENCHMARKS[config.kind]
    items = program.prepare(config, seed)
    outputs = program.run(items, model)
    scores = program.score(items, outputs)
    return Result(outputs, [program.record(item, output) for item, output in zip(items, outputs, strict=True)], scores)

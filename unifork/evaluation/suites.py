"""All benchmarks behind one small protocol: what the three programs `items`, `answer` and `score` ask of each.

A suite reads official files (or makes items from a seed), reads answers by rules that have names, and says which sums
over items are its scores. Its functions are pure: no model, no network, no torch. Adding one is a module that holds a
`Suite`; a card names it as `MODULE:OBJECT`, or by a name in SUITES.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from unifork.config import EvalCard, StrictModel, parse
from unifork.errors import unknown
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure
from unifork.registry import Registry


class Answer(NamedTuple):
    """What a model gave for an item: a text, or an image as encoded bytes."""

    id: str
    text: str = ""
    image: bytes | None = None
    prompt: str | None = None
    """The text that the model was given, as far as the file says it."""
    converted: bool = False
    """Whether a converter of a submission has been over the text; otherwise it is the model's own."""


class Verdict(NamedTuple):
    """How a rule reads an answer."""

    reading: Any
    """What it takes the answer for, as plain data; None where it cannot read it."""
    right: float
    """How right that is, from 0 to 1."""
    faults: tuple[str, ...] = ()
    """What is wrong, in words."""


Rule = Callable[[Item, Answer], Verdict]
Measures = Callable[[Sequence[Item], np.ndarray, np.ndarray], list[Measure]]


@dataclass(frozen=True)
class Suite:
    """One benchmark: its functions."""

    read: Callable[[Archive, Any, int], list[Item]]
    """Items in their official order, from files, options and a seed."""
    rules: Mapping[str, Rule]
    """By name; `official` is that of the benchmark's makers, faults included."""
    measures: Measures
    """The scores. Taken are the items and, for each, how right its answer is and whether it says yes (0 to 1)."""
    options: type[StrictModel] = StrictModel
    """What a card may say in `items.options`."""
    image: Callable[[Archive, str], bytes] = Archive.image
    """The bytes of an image by its name."""

    def rule(self, name: str, place: str) -> Rule:
        """A rule by name. Raises ConfigError naming the place and the rules that there are."""
        if name not in self.rules:
            raise unknown("rule", name, self.rules, place)
        return self.rules[name]


UNDERSTANDING = "unifork.evaluation.understanding"
SUITES: Registry[Suite] = Registry(
    "suite", Suite, {name: f"{UNDERSTANDING}.{name}:SUITE" for name in ("mme", "pope", "seed", "vqa", "gqa", "mmbench")}
)
"""Benchmarks that cards name without a module."""


def suite_of(card: EvalCard) -> tuple[Suite, StrictModel]:
    """The suite of a card and its options. Raises ConfigError for an unknown suite, option or rule."""
    place = f"card {card.name}"
    suite = SUITES.find(card.items.suite, f"{place}: items.suite")
    for name in card.score.rules:
        suite.rule(name, f"{place}: score.rules")
    return suite, parse(suite.options, card.items.options, place, "items.options")

"""All benchmarks behind one small protocol: what the three programs `items`, `answer` and `score` ask of each.

A suite reads official files (or makes items from a seed), reads answers by rules that have names, and says which sums
over items are its scores. Its functions are pure: no model, no network, no torch. Adding one is a module that holds a
`Suite`; a card names it as `MODULE:OBJECT`, or by a name in SUITES.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unifork.config import EvalCard, StrictModel, parse
from unifork.errors import DataError, one_of
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import TEXTS, Item, faults
from unifork.evaluation.names import REGISTRIES
from unifork.evaluation.statistics import Estimate, Measure
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
    right: float | None
    """How right that is, from 0 to 1; None where the rule leaves the item out."""
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
    examine: Callable[[Mapping[str, Any], Item, bytes], str] | None = None
    """What networks, by the names that a card gives them, find in the image of an item: the text that rules read."""
    whole: Callable[[Any, str, Sequence[Answer]], tuple[str, Estimate, str]] | None = None
    """From options, a rule and all answers: name, value and note of a score that is no sum over items."""
    summarize: Callable[[Path, Sequence[Answer]], list[Path]] | None = None
    """From a folder and what networks found in the reference images: the files there that `whole` compares with."""
    any_size: Collection[str] = ()
    """Networks that scale images of unequal sizes; beside any other all images of a model must be alike."""
    truths: Collection[str] = ()
    """What the truth of an item may be, where it is not one of its `about["options"]`; nothing for any."""

    def items_of(self, archive: Archive, options: Any, seed: int) -> list[Item]:
        """What `read` gives. Raises DataError for files of another form, and for items that nobody can answer."""
        try:
            items = self.read(archive, options, seed)
            odd = [f"{item.id}: {fault}" for item in items if (fault := self._fault(item))]
            without = [item.id for item in items if item.truth is None]
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            why = f"{type(error).__name__}: {error}; wanted: {archive.card.items.access}"
            raise DataError(f"{archive.card.name}: {archive.folder}: {why}") from None
        if odd or len(items) > len(without) > 0:
            wrong = faults("items are odd", odd) if odd else faults("items lack a truth", without)
            raise DataError(f"{archive.card.name}: {archive.folder}: {wrong}")
        return items

    def _fault(self, item: Item) -> str | None:
        """What is wrong with an item."""
        if odd := [name for name in TEXTS if not isinstance(getattr(item, name), str)]:
            return f"its {odd[0]} is {getattr(item, odd[0])!r:.99}, a text is needed"
        allowed = self.truths or item.about.get("options")
        if not allowed or item.truth is None or item.truth in allowed:
            return None
        return f"its truth is {item.truth!r:.99}, allowed are {', '.join(allowed)}"

    def rule(self, name: str, place: str) -> Rule:
        """A rule by name. Raises ConfigError naming the place and the rules that there are."""
        return self.rules[one_of("rule", name, self.rules, place)]


SUITES = Registry("suite", Suite, REGISTRIES["suites"])
"""Benchmarks that cards name without a module."""


def suite_of(card: EvalCard) -> tuple[Suite, StrictModel]:
    """The suite of a card and its options. Raises ConfigError for an unknown suite, option or rule."""
    place = f"card {card.name}"
    suite = SUITES.find(card.items.suite, f"{place}: items.suite")
    for name in card.score.rules:
        suite.rule(name, f"{place}: score.rules")
    return suite, parse(suite.options, card.items.options, place, "items.options")

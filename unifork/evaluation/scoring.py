"""Items and answers to verdicts and scores: a pure function of files, without a model and without torch.

In: a card, its items, an answer for each. Out: one verdict for each item and rule, and scores with everything that is
needed to judge them. `comparison` compares models.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from unifork.config import EvalCard, TextCard
from unifork.errors import DataError
from unifork.evaluation.items import Item, identity
from unifork.evaluation.statistics import Score, estimate, value
from unifork.evaluation.suites import Answer, Suite, Verdict, suite_of
from unifork.shards.manifest import write_atomically, write_json

SCORE_VERSION = 4
"""Raise when the same answers would get other verdicts or scores."""
METRICS, VERDICTS = "metrics.json", "verdicts.jsonl"
NO_ERROR = "one cluster has no error"
NO_COUNT = "a ratio in it is of nothing and counts as 0"


class RuleVerdict(TypedDict):
    """A `Verdict` as plain data."""

    reading: Any
    right: float | None
    faults: list[str]


class JudgedItem(TypedDict):
    """An `Item` with its answer: a line of `verdicts.jsonl`."""

    id: str
    question: str
    truth: Any
    split: str
    image: str
    answer: str | None
    """Its text; None for an image, and where it is not shown."""
    verdicts: dict[str, RuleVerdict]
    """By rule."""


def score_answers(
    card: EvalCard, items: Sequence[Item], answers: Mapping[str, Answer], origin: Mapping[str, Any]
) -> tuple[list[Score], list[dict[str, Any]]]:
    """All scores of a card's rules, and a line of plain data for each item that has an answer.

    origin: as of `origin_of`. Items whose truth is not public get neither verdicts nor scores.
    """
    suite, options = suite_of(card)
    scored = [item for item in items if item.id in answers]
    if suite.examine and any(answers[item.id].image for item in scored):
        raise DataError(f"{card.name}: these are images; `unifork answers examine` says what is in them")
    unshown = suite.whole is not None  # numbers of a network
    texts = [None if unshown or answers[item.id].image else answers[item.id].text for item in scored]
    lines = [{**vars(item), "answer": text, "verdicts": {}} for item, text in zip(scored, texts, strict=True)]
    shared = {"missing": len(items) - len(scored), "items_hash": identity(items), **origin}
    scores: list[Score] = []
    for rule in card.score.rules if all(item.truth is not None for item in scored) else ():
        suffix = "" if rule == card.score.rules[0] else f"_{rule}"
        if suite.whole:
            name, found, note = suite.whole(options, rule, [answers[item.id] for item in scored])
            plain = {**vars(found), "chance": 0.0, "unread": 0.0, "rule": rule, **shared, "note": note}
            scores.append(Score(name + suffix, "all", **plain))
            continue
        verdicts = [suite.rules[rule](item, answers[item.id]) for item in scored]
        for line, verdict in zip(lines, verdicts, strict=True):
            line["verdicts"][rule] = verdict._asdict()
        scores += _scores(suite, scored, verdicts, suffix, {"rule": rule, **shared})
    return scores, lines


def _scores(
    suite: Suite, items: Sequence[Item], verdicts: Sequence[Verdict], suffix: str, shared: dict[str, Any]
) -> list[Score]:
    clusters, unread_I = [item.cluster for item in items], np.array([verdict.reading is None for verdict in verdicts])
    by_chance_I = np.array([item.chance for item in items])
    says_yes_I = np.where([item.truth == "yes" for item in items], by_chance_I, 1 - by_chance_I)
    chances = [value(measure.ratios) for measure in suite.measures(items, by_chance_I, says_yes_I)]
    scores = []
    for measure, chance in zip(suite.measures(items, *outcomes(verdicts)), chances, strict=True):
        unread = float(unread_I[measure.members_I].mean())
        found = estimate(measure, clusters)
        odd = {NO_ERROR: found.clusters == 1, NO_COUNT: not all(ratio.among_I.any() for ratio in measure.ratios)}
        note = "; ".join(text for text, applies in odd.items() if applies)
        plain = {**vars(found), "chance": chance, "unread": unread, **shared, "note": note}
        scores.append(Score(measure.name + suffix, measure.split, **plain))
    return scores


def outcomes(verdicts: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    """How right each answer is, and whether it says yes."""
    right_I = np.array([verdict.right for verdict in verdicts], dtype=np.float64)
    return right_I, np.array([verdict.reading == "yes" for verdict in verdicts], dtype=np.float64)


def write_scores(folder: Path, card: EvalCard, scores: Sequence[Score], lines: Sequence[Mapping[str, Any]]) -> None:
    """`metrics.json`, scores by split and name, and `verdicts.jsonl`, a line for each item."""
    head = {"benchmark": card.name, "version": SCORE_VERSION}
    text = "".join(json.dumps({**head, **line}) + "\n" for line in lines)
    write_atomically(folder / VERDICTS, lambda path: path.write_text(text))
    write_json(folder / METRICS, by_split(scores))


def by_split(scores: Sequence[Score]) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores as plain data, by split and name."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for score in scores:
        row = asdict(score)
        table.setdefault(row.pop("split"), {})[row.pop("name")] = row
    return table


def headline_values(card: EvalCard | TextCard, scores: Sequence[Score]) -> dict[str, float]:
    """Values of the scores in a card's summary (of all, where it names none) by `<benchmark>.<split>.<score>`."""
    shown = card.show.headlines or {score.name for score in scores}
    return {f"{card.name}.{score.split}.{score.name}": score.value for score in scores if score.name in shown}

"""Items and answers to verdicts and scores: a pure function of files, without a model and without torch.

In: a card, its items, an answer for each. Out: one verdict for each item and rule, and scores with everything that is
needed to judge them. Two models are compared pairwise, by their verdicts on the same items.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unifork.config import EvalCard, load_eval
from unifork.errors import DataError
from unifork.evaluation.archive import read_json
from unifork.evaluation.items import Item, faults, identity
from unifork.evaluation.statistics import Difference, Score, difference, estimate, value
from unifork.evaluation.suites import Answer, Suite, Verdict, suite_of
from unifork.shards.manifest import MANIFEST, read_manifest, write_atomically, write_json

SCORE_VERSION = 1
"""Raise when the same answers would get other verdicts or scores."""
METRICS, VERDICTS = "metrics.json", "verdicts.jsonl"
ITEM = [field.name for field in fields(Item)]


@dataclass(frozen=True)
class Origin:
    """Where answers come from, for the record."""

    model: str
    decoding: str = "not recorded"
    seed: int | None = None


def origin_of(answers: Path) -> Origin:
    """What a folder of answers says of its model; the name of a file, which says nothing."""
    if not (answers / MANIFEST).exists():
        return Origin(str(answers))
    lineage = read_manifest(answers).lineage
    return Origin(lineage["model"], lineage["decoding"], lineage["seed"])


def score_answers(
    card: EvalCard, items: Sequence[Item], answers: Mapping[str, Answer], origin: Origin
) -> tuple[list[Score], list[dict[str, Any]]]:
    """All scores of a card's rules, and a line of plain data for each item that has an answer.

    Items whose truth is not public get neither verdicts nor scores.
    """
    suite, options = suite_of(card)
    scored = [item for item in items if item.id in answers]
    if suite.examine and any(answers[item.id].image for item in scored):
        raise DataError(f"{card.name}: these are images; `unifork answers examine` says what is in them")
    unshown = suite.whole is not None  # numbers of a network
    texts = [None if unshown or answers[item.id].image else answers[item.id].text for item in scored]
    lines = [{**vars(item), "answer": text, "verdicts": {}} for item, text in zip(scored, texts, strict=True)]
    shared = {"missing": len(items) - len(scored), "items_hash": identity(items), **asdict(origin)}
    scores: list[Score] = []
    for rule in card.score.rules if all(item.truth is not None for item in scored) else ():
        suffix = "" if rule == card.score.rules[0] else f"_{rule}"
        if suite.whole:
            name, found, note = suite.whole(options, rule, [answers[item.id] for item in scored])
            plain = {**found._asdict(), "chance": 0.0, "unread": 0.0, "rule": rule, **shared, "note": note}
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
    for measure, chance in zip(suite.measures(items, *_outcomes(verdicts)), chances, strict=True):
        unread = float(unread_I[measure.members_I].mean())
        plain = {**estimate(measure, clusters)._asdict(), "chance": chance, "unread": unread, **shared}
        scores.append(Score(measure.name + suffix, measure.split, **plain))
    return scores


def _outcomes(verdicts: Sequence[Verdict]) -> tuple[np.ndarray, np.ndarray]:
    """How right each answer is, and whether it says yes."""
    right_I = np.array([verdict.right for verdict in verdicts], dtype=np.float64)
    return right_I, np.array([verdict.reading == "yes" for verdict in verdicts], dtype=np.float64)


def write_scores(folder: Path, card: EvalCard, scores: Sequence[Score], lines: Sequence[Mapping[str, Any]]) -> None:
    """`metrics.json`, scores by split and name, and `verdicts.jsonl`, a line for each item."""
    text = "".join(json.dumps({"benchmark": card.name, **line}) + "\n" for line in lines)
    write_atomically(folder / VERDICTS, lambda path: path.write_text(text))
    write_json(folder / METRICS, by_split(scores))


def by_split(scores: Sequence[Score]) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores as plain data, by split and name."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for score in scores:
        row = asdict(score)
        table.setdefault(row.pop("split"), {})[row.pop("name")] = row
    return table


class Compared(NamedTuple):
    """One score of two models on the same items."""

    name: str
    first: float
    second: float
    difference: Difference


def compare(first: Path, second: Path, rule: str | None = None) -> list[Compared]:
    """The scores of two folders of scores side by side, by one rule: by the card's first unless it is named.

    Raises DataError where they are of other benchmarks or items, or lack the rule.
    """
    tables = [{line["id"]: line for line in read_json(folder / VERDICTS)} for folder in (first, second)]
    names = [{line["benchmark"] for line in table.values()} for table in tables]
    if names[0] != names[1] or len(names[0]) != 1:
        raise DataError(f"{first}, {second}: of {sorted(names[0])} and {sorted(names[1])}; one benchmark is needed")
    contents = [{name: [line[key] for key in ITEM] for name, line in table.items()} for table in tables]
    if other := sorted(
        name for name in {**contents[0], **contents[1]} if contents[0].get(name) != contents[1].get(name)
    ):
        raise DataError(f"{first}, {second}: {faults('items are not the same in both', other)}")
    card = load_eval(names[0].pop())
    suite, _ = suite_of(card)
    chosen = rule or card.score.rules[0]
    suite.rule(chosen, "--rule")
    items = [Item(**{name: line[name] for name in ITEM}) for line in tables[0].values()]
    measures = []
    for table, folder in zip(tables, (first, second), strict=True):
        if any(chosen not in table[item.id]["verdicts"] for item in items):
            raise DataError(f"{folder}: no verdicts of rule {chosen!r}; score the answers by it first")
        verdicts = [Verdict(**table[item.id]["verdicts"][chosen]) for item in items]
        measures.append(suite.measures(items, *_outcomes(verdicts)))
    clusters = [item.cluster for item in items]
    return [
        Compared(f"{a.split} {a.name}", value(a.ratios), value(b.ratios), difference(a, b, clusters))
        for a, b in zip(*measures, strict=True)
    ]

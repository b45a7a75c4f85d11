"""Scores of benchmarks of text: what lm-evaluation-harness found on a model goes in, scores with errors come out."""

import json
from pathlib import Path
from statistics import fmean

import numpy as np

from unifork.config import TextCard, fingerprint
from unifork.errors import DataError
from unifork.evaluation.answers import origin_of
from unifork.evaluation.names import METRICS, SAMPLES
from unifork.evaluation.statistics import Measure, Score, accuracy, estimate, mean
from unifork.shards.manifest import read_manifest

MEAN = "mean"
"""Score: the plain mean of the tasks by their first metric."""


def text_scores(card: TextCard, folder: Path) -> list[Score]:
    """Scores of a folder that `run_tasks` wrote: accuracy of each task (or group), and the mean of the tasks.

    The first metric of a task has its plain name, a second ends in the metric's. Raises DataError for a task without.
    """
    parts, items = text_measures(card, folder)
    shared = {"unread": 0.0, "missing": 0, "items_hash": fingerprint(items), **origin_of(folder)}
    clusters = [str(number) for number in range(len(items))]
    return [
        Score(measure.name, "all", **vars(estimate(measure, clusters)), chance=chance, rule=rule, **shared)
        for measure, chance, rule in parts
    ]


def text_measures(card: TextCard, folder: Path) -> tuple[list[tuple[Measure, float, str]], list[list[str]]]:
    """What the scores of a folder are, with chance and metric of each; and hashes of every question."""
    lines = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    groups, names_I = read_manifest(folder).lineage["group_subtasks"], np.array([line["task"] for line in lines])
    parts: list[tuple[Measure, float, str]] = []
    for task, chance in card.tasks.items():
        members_I = np.isin(names_I, _leaves(task, groups))
        metrics = [name for name in METRICS if all(name in lines[number] for number in np.flatnonzero(members_I))]
        if not metrics:
            raise DataError(f"{folder / SAMPLES}: task {task!r} has neither {' nor '.join(METRICS)}")
        for metric in metrics:
            name = task if metric == metrics[0] else f"{task}_{metric}"
            right_I = np.array([line.get(metric, 0.0) for line in lines])
            parts.append((accuracy(name, right_I, members_I), chance, metric))
    firsts = [measure for measure, _, _ in parts if measure.name in card.tasks]
    parts.append((mean(MEAN, firsts), fmean(card.tasks.values()), "the first of each task"))
    return parts, [[line[f"{part}_hash"] for part in ("doc", "prompt", "target")] for line in lines]


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    return [leaf for part in groups[task] for leaf in _leaves(part, groups)] if groups.get(task) else [task]

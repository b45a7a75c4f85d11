"""Benchmarks of text alone, through lm-evaluation-harness: a model and a card go in, scores with errors come out.

One branch of the model is written as the dense language model that it is, and the harness ranks the answers of its
tasks by their log-likelihood there. What it found is kept, with every log-likelihood; scores are read from that file.
"""

import json
import os
from contextlib import chdir
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np

from unifork.config import TextCard, fingerprint
from unifork.errors import ConfigError, DataError
from unifork.evaluation.answering import identity
from unifork.evaluation.scoring import origin_of
from unifork.evaluation.statistics import Measure, Score, estimate, mean, share
from unifork.layout import MODEL_TEXT_TOKENIZER
from unifork.shards.manifest import Manifest, Shard, file_sha256, read_manifest, write_atomically, write_manifest

TEXT_VERSION = 1
"""Raise when the same model would get other results."""
SAMPLES = "samples.jsonl"
MEAN = "mean"
"""Score: the plain mean of the tasks by their first metric."""
METRICS = ("acc", "acc_norm")
"""The likeliest answer is right: by its log-likelihood, and by that divided by its length in letters."""
KEPT = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "target", "arguments", "filtered_resps", *METRICS)


def run_tasks(card: TextCard, model: Path, folder: Path, device: str, seed: int) -> None:
    """Write `samples.jsonl`, a line for each question with all log-likelihoods, and a manifest with the results.

    Raises ConfigError without the package, and for a task or data set that cannot be found.
    """
    if not card.online:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        from lm_eval import simple_evaluate  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"card {card.name}: {error}; text needs `pip install '.[text-evals]'`") from None
    model, folder, place = model.absolute(), folder.absolute(), f"card {card.name} ({card.include_path or 'its cache'})"
    with TemporaryDirectory(dir=folder) as dense, chdir(card.include_path or "."):
        tasks = TaskManager(include_path="." if card.include_path else None)
        try:
            tasks.load([*card.tasks])
        except (KeyError, OSError) as error:  # a task; a file or the Hub
            raise ConfigError(f"{place}: {' '.join(str(error).split())}; put {card.access} there") from None
        export(model, card.branch, card.dtype, Path(dense))
        found = simple_evaluate(
            model="hf", model_args={"pretrained": dense, "dtype": card.dtype}, tasks=[*card.tasks],
            num_fewshot=card.num_fewshot, batch_size=card.batch_size, device=device, task_manager=tasks,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    lines = [
        json.dumps({"task": task, **{key: row[key] for key in KEPT if key in row}}, default=str)
        for task, rows in found["samples"].items()
        for row in rows
        if row["filter"] == "none"
    ]
    write_atomically(folder / SAMPLES, lambda path: path.write_text("".join(f"{line}\n" for line in lines)))
    shots = "/".join(map(str, sorted({*found["n-shot"].values()})))
    versions = ", ".join(f"{task} {found['versions'].get(task)}" for task in card.tasks)
    how = f"log-likelihoods of the branch {card.branch}, {shots}-shot, {card.dtype}, on {device}"
    lineage = {key: found.get(key, {}) for key in ("results", "group_subtasks")} | {"model": identity(model)}
    lineage |= {"decoding": f"{how}, lm-eval {version('lm_eval')}, versions {versions}", "seed": seed}
    size, digest, inputs = (folder / SAMPLES).stat().st_size, file_sha256(folder / SAMPLES), fingerprint(lineage)
    shard = Shard(path=SAMPLES, rows=len(lines), bytes=size, sha256=digest, inputs=inputs)
    write_manifest(folder, Manifest(kind="text", dataset=card.name, columns={}, shards=(shard,), lineage=lineage))


def export(model: Path, branch: str, dtype: str, out: Path) -> None:
    """One branch of a model directory as a dense model of transformers, with its text tokenizer."""
    # only this needs torch
    import torch  # noqa: PLC0415

    from unifork.documents.text_tokenizer import import_text_tokenizer  # noqa: PLC0415
    from unifork.models.conversion import dense_branch  # noqa: PLC0415
    from unifork.models.modeling import load_model  # noqa: PLC0415

    dense_branch(load_model(model, getattr(torch, dtype)), branch).save_pretrained(out)
    import_text_tokenizer(model / MODEL_TEXT_TOKENIZER, out)


def text_scores(card: TextCard, folder: Path) -> list[Score]:
    """Scores of a folder that `run_tasks` wrote: accuracy of each task (or group), and the mean of the tasks.

    The first metric of a task has its plain name, a second ends in the metric's. Raises DataError for a task without.
    """
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
            parts.append((Measure(name, (share(right_I, members_I),), members_I), chance, metric))
    firsts = [measure for measure, _, _ in parts if measure.name in card.tasks]
    parts.append((mean(MEAN, firsts), fmean(card.tasks.values()), "the first of each task"))
    hashes = fingerprint([[line[f"{part}_hash"] for part in ("doc", "prompt", "target")] for line in lines])
    shared = {"unread": 0.0, "missing": 0, "items_hash": hashes, **asdict(origin_of(folder))}
    clusters = [str(number) for number in range(len(lines))]
    return [
        Score(measure.name, "all", **estimate(measure, clusters)._asdict(), chance=chance, rule=rule, **shared)
        for measure, chance, rule in parts
    ]


def _leaves(task: str, groups: dict[str, list[str]]) -> list[str]:
    """The tasks of a group, or the task itself."""
    return [leaf for part in groups[task] for leaf in _leaves(part, groups)] if groups.get(task) else [task]

"""Everything an experiment left on disk, as plain facts and images for the template.

In: the experiment, its folders and a way to load image tokenizers. Out: what the page shows of each data set and each
variant. A stage that has not run leaves None or nothing; a damaged file raises a UniForkError.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from unifork.config import EvalCard, Experiment, TextCard, load_card, load_eval, load_text
from unifork.evaluation.scoring import METRICS, VERDICTS
from unifork.figures import data_uri
from unifork.filters.kept import KeptRows
from unifork.image_tokenizer.architecture import CONFIG_FILE
from unifork.layout import MODEL_IMAGE_TOKENIZER, Layout
from unifork.models.warm_start import branch_of
from unifork.report.codec import LoadCodec
from unifork.report.images import ANSWERED, answered_samples, data_images, drawn_samples, shown_images, views_of
from unifork.report.plots import Plot, score_plot, training_plots, validation_plots
from unifork.report.reading import Found, read_codes, read_history, read_json, read_records, read_scores
from unifork.shards.manifest import MANIFEST, elsewhere, read_manifest
from unifork.shards.quarantine import warnings_of

PARTS = ("embeddings", "connector", "shared trunk", "image head", "text head", "codebook")
"""Order of the rows; branches come after the shared trunk."""


def benchmarks(experiment: Experiment, layout: Layout) -> dict[str, EvalCard | TextCard]:
    """The cards of the experiment's benchmarks. Raises ConfigError for an unknown one."""
    texts = {name: load_text(name, layout.evals) for name in experiment.text_evals}
    return {**{name: load_eval(name, layout.evals) for name in experiment.benchmarks}, **texts}


def dataset(name: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> dict[str, Any]:
    """One data set: its card, the manifests of all stages, and images of what the filter kept and dropped."""
    card = load_card(name, layout.cards)
    folders = {"download": layout.raw(name), "filter": layout.filtered(name)}
    folders |= {f"encode, {view}": layout.codes / name / view for view in views_of(card)}
    stages = {
        stage: read_manifest(folder) if (folder / MANIFEST).exists() else None for stage, folder in folders.items()
    }
    shown = None
    if stages["filter"] and not elsewhere(layout.raw(name)):
        tokenizer, size = layout.image_tokenizer, experiment.image_tokenizer.image_size
        codec = load_codec(tokenizer) if (tokenizer / CONFIG_FILE).exists() else None
        shown = data_images(card, KeptRows(layout, name), size, codec)
    warnings = [
        line
        for stage, manifest in stages.items()
        if manifest and stage in ("download", "filter")
        for line in warnings_of(manifest, stage, card.losses)
    ]
    return {"name": name, "card": card, "stages": stages, "shown": shown, "warnings": warnings}


def variant(name: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> dict[str, Any]:
    """One architecture: its stages, the parameters of its parts, all sample prompts, its evaluations by benchmark."""
    stages = [stage(key, experiment, layout, load_codec) for key in runs_of(name, experiment)]
    return {
        "name": name,
        "plan": experiment.variants[name].plan,
        "stages": stages,
        "parts": {part: sum(counts) for run in stages for part, counts in run["parts"].items()},
        "prompts": list(dict.fromkeys(prompt for run in stages for prompt in run["settings"]["sample_prompts"])),
        "evaluations": {
            entry["benchmark"]: evaluation(key, experiment, layout)
            for key, entry in (experiment.evaluations | experiment.text_runs).items()
            if entry["variant"] == name
        },
    }


def runs_of(variant: str, experiment: Experiment) -> list[str]:
    """The runs of a variant, in order."""
    return [key for key, run in experiment.runs.items() if run.variant == variant]


def history_of(run: str, layout: Layout) -> list[Found]:
    """The steps of a run that has finished; none where it has not."""
    return read_history(layout.model(run) / "training" / "history.csv")


def stage(key: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> dict[str, Any]:
    """One training stage, from what it exported; `summary` is None where it has not run."""
    name, folder = experiment.runs[key].stage, layout.model(key)
    summary = read_json(folder / "training" / "summary.json")
    finished = read_json(layout.run(key) / "finished.json")
    settings = summary["stage"] if summary else experiment.stages[name].model_dump()
    prompts = settings["sample_prompts"]
    codes = read_codes(folder / "training" / "samples.npz", len(prompts)) if prompts else None
    drawn = [] if codes is None else shown_images(load_codec(folder / MODEL_IMAGE_TOKENIZER).decode(codes))
    return {
        "name": name,
        "settings": settings,
        "summary": summary,
        "seconds": finished["seconds"] if finished else None,
        "plots": training_plots(history_of(key, layout)),
        "alignment": alignment(key, layout),
        "drawn": dict(zip(prompts, drawn, strict=False)),
        "held_out": held_out(folder, load_codec) if summary else None,
        "parts": parts_of(summary["tensors"]) if summary else {},
    }


def alignment(key: str, layout: Layout) -> Plot | None:
    """The curves of a run's model, where its alignment was analyzed."""
    folder = layout.analysis(key)
    if (found := read_json(folder / "alignment.json")) is None:
        return None
    ranges = (f"{task} {c['score'][0]:.2f} to {c['score'][-1]:.2f}" for task, c in found["curves"].items())
    alt = f"Alignment by layer after {key}, from the first to the last: {'; '.join(ranges)}."
    return Plot(key, data_uri((folder / "alignment.svg").read_text()), alt)


def held_out(model: Path, load_codec: LoadCodec) -> dict[str, Any] | None:
    """What a stage lost on held-out rows, and what its model made of them; None where nothing was held out."""
    folder = model / "training"
    found = read_json(folder / "held_out.json")
    if found is None:
        return None
    prompts, strips = found["prompts"], []
    for name, title in (("codes", "held out"), ("drawn", "drawn")):
        codes = read_codes(folder / "held_out.npz", len(prompts), name) if prompts else None
        if codes is not None:
            strips.append((title, shown_images(load_codec(model / MODEL_IMAGE_TOKENIZER).decode(codes))))
    return {
        "plots": validation_plots(read_history(folder / "validation.csv")),
        "scores": found["scores"],
        "answers": [row for part in found["scores"] for row in _of(part["part"], found["answers"])[:ANSWERED]],
        "prompts": [row["prompt"] for row in prompts],
        "strips": strips,
    }


def _of(part: str, rows: Sequence[Found]) -> list[Found]:
    return [row for row in rows if row["part"] == part]


def evaluation(key: str, experiment: Experiment, layout: Layout) -> dict[str, Any]:
    """One benchmark, from its scores, verdicts and answers; without scores where it has not run.

    `scores` are by split and name, `names` those of all rows, both in the order of the benchmark.
    """
    entry = (experiment.evaluations | experiment.text_runs)[key]
    name = entry["benchmark"]
    show, folder = benchmarks(experiment, layout)[name].show, layout.scores(entry["variant"]) / name
    found = read_scores(folder / METRICS)
    scores = {split: found[split] for split in _ordered(found, show.splits)}
    every = [score for table in scores.values() for score in table.values()]
    names = _ordered({score.name for score in every}, show.scores)
    records = read_records(folder / VERDICTS)
    prompts = [record for record in records if not record["image"]]
    questions = [record for record in records if record["image"]]
    return {
        "key": key,
        "name": name,
        "scores": scores,
        "names": names,
        "seeds": sorted({score.seed for score in every if score.seed is not None}),
        "samples": sorted({score.items for score in every}),
        "plot": score_plot(key, scores, names) if scores else None,
        "drawn": drawn_samples(prompts, layout.answers(entry["variant"]) / name),
        "answered": answered_samples(questions, layout.items(name)),
    }


def parts_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """The frozen and the trained parameters of each part of a model, in a fixed order."""
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for name, tensor in tensors.items():
        counts[tensor["trained"]][part_of(name)] += prod(tensor["shape"])
    found = {part_of(name) for name in tensors}
    order = [*PARTS[:3], *sorted(found - {*PARTS}), *PARTS[3:]]
    return {part: (counts[False][part], counts[True][part]) for part in order if part in found}


def part_of(tensor: str) -> str:
    """The part of a model that a tensor belongs to: `layers.14.mlp.generation.up_proj.weight` to a branch."""
    branch, start = branch_of(tensor), tensor.partition(".")[0]
    if branch:
        return "shared trunk" if branch == "shared" else f"{branch} branch"
    return {"embed_tokens": "embeddings", "lm_head": "text head"}.get(start, start.replace("_", " "))


def _ordered(found: Iterable[str], first: Sequence[str]) -> list[str]:
    """Names in a given order, others behind them by name."""
    return [*(name for name in first if name in found), *sorted({*found} - {*first})]

"""Publishing a model directory and bringing one back.

A publication is what `unifork.load` needs, `README.md` with all that is known of the model, images that it drew, its
losses as a reference for others, and `SHA256SUMS`. What held-out rows gave stays here: it holds codes of their images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from unifork.config import Card, Experiment, fingerprint, load, load_card, load_eval, load_text
from unifork.documents.prompts import TEMPLATES
from unifork.errors import ConfigError, DataError
from unifork.evaluation.scoring import METRICS
from unifork.evaluation.statistics import Score
from unifork.layout import MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER, Layout
from unifork.models.configuration import read_config
from unifork.planning import parameter_counts
from unifork.publish.card import README, Offer
from unifork.publish.publication import begin, finish
from unifork.publish.samples import SHOWN, strip
from unifork.publish.stores import CHECKSUMS, SAMPLES, bring, checksums_text, hashes, open_store
from unifork.reference import reference
from unifork.report.reading import read_codes, read_history, read_json, read_scores
from unifork.report.scores import measured
from unifork.shards.manifest import json_text
from unifork.stores import Store
from unifork.training.export import SUMMARY, TRAINING, Summary

PAGE = Path(__file__).with_name("model.jinja")
CONFIG = "config.json"
HISTORY, DRAWN = f"{TRAINING}/history.csv", f"{TRAINING}/samples.npz"
FILES = (
    CONFIG, "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    f"{MODEL_IMAGE_TOKENIZER}/*", f"{MODEL_TEXT_TOKENIZER}/*", f"{TRAINING}/{SUMMARY}", HISTORY, DRAWN,
    f"{TRAINING}/validation.csv", "histories/*.json",
)  # fmt: skip
"""What of a model directory is given away."""
TASK = "any-to-any"
"""Of the Hub's."""


def build(model: Path, layout: Layout, folder: Path, offer: Offer) -> int:
    """Make the publication of a model in a folder; what is there and right is kept. The number of its files.

    Raises CheckpointError where there is no model.
    """
    config, summary = read_config(model), read_json(model / TRAINING / SUMMARY, Summary)
    run, experiment, stages = str(summary["run"]) if summary else "", None, list[Summary]()
    if layout.params.exists() and layout.model(run).resolve() == model.resolve():
        present = load(Experiment, layout.params)
        experiment = present if run in present.runs else None
    before, sums = begin(folder), hashes(model, FILES)
    bring(open_store(str(model)), sums, folder)
    files: dict[str, bytes] = {}
    if experiment:
        own = reference(experiment, layout, run, read_history(model / HISTORY))
        files[f"histories/{own.file}"] = json_text(own.model_dump(mode="json")).encode()
    prompts = summary["stage"]["sample_prompts"] if summary else []
    if prompts and (drawn := read_codes(model / DRAWN, len(prompts))) is not None:
        files[SAMPLES] = strip(drawn[:SHOWN], model / MODEL_IMAGE_TOKENIZER)
    while summary:
        stages.insert(0, summary)
        begun = experiment.runs.get(summary["run"]) if experiment else None
        summary = read_json(layout.root / begun.after / TRAINING / SUMMARY, Summary) if begun else None
    parts = [part for stage in stages for track in stage["documents"].values() for part in track]
    scores = _scores(experiment, layout, run) if experiment else []
    start = experiment.variants[experiment.runs[run].variant].warm_start if experiment else None
    name = model.resolve().name
    head = ModelCardData(
        license=offer.license, base_model=start if start and not Path(start).exists() else None,
        library_name="unifork", pipeline_tag=TASK, tags=["unifork", "image-tokens", "text-to-image", "image-to-text"],
        model_name=name, eval_results=[
            EvalResult(TASK, benchmark, title, score.name, score.value, dataset_split=score.split)
            for benchmark, title, score, _ in scores
        ],
    )  # fmt: skip
    page = jinja2.Template(PAGE.read_text(), undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = page.render(
        head=head.to_yaml(), name=name, config=config, counts=parameter_counts(config), offer=offer, start=start,
        stages=stages, cards={part["dataset"]: _card(layout, part["dataset"]) for part in parts}, scores=scores,
        prompts=prompts[:SHOWN] if SAMPLES in files else [], templates=TEMPLATES,
        tokenizer=read_json(model / MODEL_IMAGE_TOKENIZER / CONFIG, dict[str, Any]),
    )  # fmt: skip
    finish(folder, {**files, README: text.encode()}, sums, before)
    return len(sums)


def _card(layout: Layout, name: str) -> Card | None:
    return load_card(name, layout.cards) if (layout.cards / f"{name}.yaml").exists() else None


def _scores(experiment: Experiment, layout: Layout, run: str) -> list[tuple[str, str, Score, str]]:
    """Scores of a model, the headlines of each benchmark or, where it names none, all.

    Each as name and title of the benchmark, the score, and its value in words.
    """
    rows = list[tuple[str, str, Score, str]]()
    for entry in (*experiment.evaluations.values(), *experiment.text_runs.values()):
        if layout.root / entry["model"] == layout.model(run):
            name = entry["benchmark"]
            card = (load_text if name in experiment.text_evals else load_eval)(name, layout.evals)
            found = read_scores(layout.scores(entry["variant"]) / name / METRICS)
            rows += [
                (name, card.title, score, measured(score, card).text)
                for score in found.values()
                if not card.show.headlines or score.name in card.show.headlines
            ]
    return rows


def fetch(store: Store, sums: Mapping[str, str], name: str, layout: Layout) -> Path:
    """Bring a published model back as `models/<name>`, which appears whole; an interrupted call goes on.

    Every file is checked. Raises DataError where the publication is no model or damaged, ConfigError where another
    model of that name is here.
    """
    if CONFIG not in sums:
        raise DataError(f"{store.uri}: {CHECKSUMS} names no {CONFIG}; this is no publication of a model, nor of codes")
    folder = layout.model(name)
    if folder.exists():
        if any(hashes(folder, [file]) != {file: digest} for file, digest in sums.items()):
            raise ConfigError(f"{folder}: exists and is another model; name another, or remove it")
        return folder
    partial = folder.with_name(f".{name}.{fingerprint(sums)}")
    bring(store, sums, partial)
    (partial / CHECKSUMS).write_text(checksums_text(sums))
    return partial.replace(folder)

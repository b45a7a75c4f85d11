"""What a finished stage leaves: the model directory that later stages and people read.

In: a checkpoint of its last step. Out: weights, tokenizers, and `training/` with history, summary, samples, and what
held-out rows gave. The directory appears whole or not at all.

Shape suffixes: N image positions, D code depth.
"""

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from typing_extensions import TypedDict

from unifork.config import Stage, fingerprint
from unifork.inference import Engine
from unifork.layout import MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER
from unifork.models.modeling import UniForkModel
from unifork.shards.manifest import whole_folder, write_json
from unifork.training import checkpoint
from unifork.training.history import VALIDATION, Log, read, write_csv
from unifork.training.loop import TrackRun
from unifork.training.validation import HELD_OUT

if TYPE_CHECKING:
    from unifork.training.stage import StageJob, Training

TRAINING, SUMMARY = "training", "summary.json"
"""Folder of a model that says how it was trained, and a file in it; a fresh one has none."""


class Seen(TypedDict):
    """Documents of a part of a mixture: how many can be used, and how often one of them was trained on."""

    dataset: str
    template: str
    usable: int
    seen: int


class Tensor(TypedDict):
    """A tensor of the model."""

    shape: list[int]
    trained: bool


class Summary(TypedDict):
    """What a stage did: the file `summary.json`."""

    run: str
    history: str
    """Hash of all steps."""
    stage: dict[str, Any]
    """Its entry in `params.yaml`."""
    quarantined: dict[str, int]
    documents: dict[str, list[Seen]]
    """By track."""
    tensors: dict[str, Tensor]


def export(done: "Training", path: Path) -> None:
    """Write the model directory from a checkpoint: weights, companions, history, samples and what was done."""
    job = done.job
    with whole_folder(job.model_folder) as partial:
        model = write_model(job, path, partial, done.tracks)
        model.to(torch.device(done.run.device))  # type: ignore[arg-type]
        training, engine = partial / TRAINING, Engine(model, done.tokenizer)
        if done.validation.parts:
            _write_held_out(done, engine, training)
        if job.stage.sample_prompts:
            np.savez(training / "samples.npz", codes=_sample(engine, job.stage))


def write_model(job: "StageJob", path: Path, out: Path, tracks: Mapping[str, TrackRun] | None = None) -> UniForkModel:
    """The weights of a checkpoint, averaged where the stage says so, their tokenizers, history and what was done.

    tracks: with what they served; None where that is not known.
    """
    averaged = job.stage.ema is not None and job.stage.ema.export
    model = checkpoint.whole_model(path, job.start, averaged, job.stage.lora)
    model.save_pretrained(out)
    for name in (MODEL_TEXT_TOKENIZER, MODEL_IMAGE_TOKENIZER):
        if (job.start / name).exists():
            shutil.copytree(job.start / name, out / name)
    rows, tracks = read(path), tracks or {}
    write_csv(rows, out / TRAINING / "history.csv")
    summary: Summary = {
        "run": job.key,
        "history": fingerprint(rows),
        "stage": job.stage.model_dump(mode="json"),
        "quarantined": quarantined(tracks),
        "documents": {
            name: [
                {"dataset": p.entry.dataset, "template": p.entry.template, "usable": len(p), "seen": seen}
                for p, seen in zip(track.loader.parts, track.served(), strict=True)
            ]
            for name, track in tracks.items()
        },
        "tensors": checkpoint.read_state(path)["tensors"],
    }
    write_json(out / TRAINING / SUMMARY, summary)
    return model


def _write_held_out(done: "Training", engine: Engine, training: Path) -> None:
    """What the stage lost on held-out rows, and what its model makes of them."""
    words, images = done.validation.examine(engine)
    for row in words["scores"]:
        rates = f"exact match {row['exact_match']:.3f}, token F1 {row['token_f1']:.3f}"
        done.log(f"held out, {row['part']}: {rates} of {row['answers']} answers")
    write_csv(read(done.job.run_folder, VALIDATION), training / "validation.csv")
    write_json(training / HELD_OUT, words)
    np.savez(training / "held_out.npz", **images)  # type: ignore[arg-type]


def _sample(engine: Engine, stage: Stage) -> np.ndarray:
    """Codes (prompts, N, D) for the stage's prompts, written as the stage writes them."""
    entries = [entry for track in stage.tracks.values() for entry in track.mixture if entry.task == "generation"]
    template = entries[0].template if entries else "generate"
    return engine.generate_images(stage.sample_prompts, stage.sampling, template)


def report_seen(log: Log, tracks: dict[str, TrackRun], rows: list[dict[str, Any]]) -> None:
    """Say how often each part was seen, and how full rows were."""
    for name, track in tracks.items():
        parts = zip(track.loader.parts, track.served(), strict=True)
        seen = ", ".join(f"{n} {p.entry.dataset} ({p.entry.template}), {n / len(p):.2f} passes" for p, n in parts)
        fills = [row["fill"] for row in rows if row["track"] == name]
        log(f"track {name}: seen {seen}; mean fill of rows {sum(fills) / len(fills):.3f}")


def quarantined(tracks: Mapping[str, TrackRun]) -> dict[str, int]:
    """Rows that are not trained on, as `data set: reason`, most frequent first."""
    return dict(sum((track.loader.quarantined for track in tracks.values()), Counter()).most_common())

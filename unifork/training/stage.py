"""One stage from start to end: open the documents, resume or begin, train, export.

The run folder (`runs/<key>`) holds checkpoints and the history; it belongs to the loop alone. The
model folder (`models/<key>`) is what later stages and people read; it appears when the stage ends.
"""

import shutil
import time
from collections import Counter, deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unifork.config import Experiment, Stage, StrictModel, TrainResources, fingerprint
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import DOCUMENTS_VERSION, CodesIdentity
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.inference import Engine
from unifork.layout import MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER, Layout
from unifork.models.masks import VARLEN
from unifork.models.modeling import MODEL_VERSION, UniForkModel, load_model
from unifork.processes import exclusive
from unifork.shards.manifest import file_sha256, manifest_sha256, write_json
from unifork.training import checkpoint
from unifork.training.checkpoint import State
from unifork.training.history import History, Log, Progress, read, write_csv
from unifork.training.loop import Done, TrackRun, WorkerContext, trained_by, turns
from unifork.training.optimizer import freeze_all_but
from unifork.training.strategies import barrier, strategy
from unifork.training.watch import Watch
from unifork.vocabulary import VIEW_OF_TASK, VOCABULARY_VERSION

TRAIN_VERSION = 1
"""Raise when the same stage would have other weights: order, packing, loop, optimizer."""
TRAINING = "training"
"""Folder of a model that says how it was trained; a fresh one has none."""
NOT_IN_THE_WEIGHTS = {"checkpoint_every", "keep_checkpoints", "sample_prompts", "sampling", "loss_band"}
"""Fields of a stage that decide nothing about its weights."""


class StageJob(StrictModel):
    """Everything a worker needs to know; plain data, so that it can travel."""

    key: str
    """Name of the run, `<variant>-<stage>`."""
    experiment: Experiment
    resources: TrainResources
    root: str
    """Absolute folder that all paths of the experiment are relative to."""

    @property
    def stage(self) -> Stage:
        """The stage's configuration."""
        return self.experiment.stages[self.experiment.runs[self.key].stage]

    @property
    def start(self) -> Path:
        """Model directory the stage begins with."""
        return self.layout.root / self.experiment.runs[self.key].after

    @property
    def layout(self) -> Layout:
        """Where everything lies."""
        return Layout(Path(self.root))

    @property
    def run_folder(self) -> Path:
        """Checkpoints and history."""
        return self.layout.run(self.key)

    @property
    def model_folder(self) -> Path:
        """What the stage makes."""
        return self.layout.model(self.key)

    def fingerprint(self) -> str:
        """Of everything that decides the weights: versions, stage, start model, codes, text tokenizer."""
        codes = self.layout.codes
        data = {
            str(folder.relative_to(codes)): manifest_sha256(folder)
            for track in self.stage.tracks.values()
            for entry in track.mixture
            for folder in [codes / entry.dataset / VIEW_OF_TASK[entry.task]]
        }
        return fingerprint(
            {
                "versions": [TRAIN_VERSION, MODEL_VERSION, DOCUMENTS_VERSION, VOCABULARY_VERSION],
                "stage": self.stage.model_dump(mode="json", exclude=NOT_IN_THE_WEIGHTS),
                "start": {name: file_sha256(self.start / name) for name in ("config.json", "model.safetensors")},
                "data": data,
                "text": TextTokenizer(self.start / MODEL_TEXT_TOKENIZER).identity,
            }
        )


def train_stage(job: StageJob, run: WorkerContext) -> None:
    """Train a stage to its end, from wherever an earlier attempt left off.

    The lead worker holds the run folder's lock: a worker that outlives its driver for a few seconds
    and its successor must not write at the same time.
    """
    torch.set_num_threads(job.resources.threads)
    with exclusive(job.run_folder) if run.rank == 0 else nullcontext():
        _train(job, run)


def _train(job: StageJob, run: WorkerContext) -> None:
    started = time.monotonic()
    lead = run.rank == 0
    log = Log(job.run_folder, job.key)
    stage, mark = job.stage, job.fingerprint()
    if lead:
        _make_room(job, mark, log)
    barrier()
    model = load_model(job.start, attention=VARLEN)
    model.to(torch.device(run.device))  # type: ignore[arg-type]
    model.set_activation_checkpointing(job.resources.activation_checkpointing)
    tokenizer = TextTokenizer(job.start / MODEL_TEXT_TOKENIZER)
    identity = CodesIdentity(
        model.config.grid**2, model.config.depth, model.config.codebook_id, model.config.encoder_id
    )
    loaders = {
        name: TrackLoader(
            name, track, job.layout, tokenizer, identity,
            seed=stage.seed, context=stage.context, row_tokens=job.resources.row_tokens,
            rows_per_microbatch=job.resources.rows_per_microbatch,
        )
        for name, track in stage.tracks.items()
    }  # fmt: skip
    trained = {parameter for name, track in stage.tracks.items() for parameter in trained_by(name, track, model)}
    freeze_all_but(model, trained)
    sharing = strategy(job.resources.strategy, run.workers)
    wrapped = sharing.wrap(model)
    fresh = not (job.start / TRAINING).exists()
    words = model.config.backbone_config().vocab_size
    watch = Watch(stage.loss_band, words, model.config.codebook_size, fresh, job.run_folder, lead, log)
    tracks = {name: TrackRun(name, track, loaders[name], model, sharing) for name, track in stage.tracks.items()}
    pairs = {name: (track.optimizer, track.parameters) for name, track in tracks.items()}
    order = turns(stage)
    state = checkpoint.start(checkpoint.latest(job.run_folder), model, pairs, sharing)
    if lead:
        _announce(log, model, tracks, state, len(order))
    history = History(job.run_folder, state.total) if lead else None
    progress = Progress(log, state.total, len(order))
    unread: deque[Done] = deque()
    wrapped.train()
    with checkpoint.Saver(job.run_folder, trained, mark, stage.keep_checkpoints, lead) as saver:
        for name, step in order[state.total :]:
            unread.append(tracks[name].step(model, wrapped, step, run))
            state = State({**state.steps, name: step + 1})
            saves = state.total % stage.checkpoint_every == 0 or state.total == len(order)
            while len(unread) > (not saves):
                metrics = _read_one(unread, watch, history, progress)
            if saves:
                if history:
                    history.sync()
                saver.save(model, sharing, state)
                run.report({"finished_steps": state.total, **{k: v for k, v in metrics.items() if v is not None}})
    if history:
        history.close()
    if lead:
        _export(job, checkpoint.folder_of(job.run_folder, state), tokenizer, tracks)
        _report_seen(log, tracks, read(job.run_folder))
        seconds = time.monotonic() - started
        write_json(job.run_folder / checkpoint.FINISHED, {"fingerprint": mark, "seconds": seconds})
        log(f"finished in {seconds:.0f} s -> models/{job.model_folder.name}")


def _read_one(unread: deque[Done], watch: Watch, history: History | None, progress: Progress) -> dict[str, Any]:
    """The metrics of the oldest step that was not looked at, checked and recorded. Raises UniForkError."""
    done = unread.popleft()
    metrics = done.metrics()
    watch.check(metrics, done.plan.keys)
    if history:
        history.add(metrics)
        progress.show(metrics, len(done.plan.keys))
    return metrics


def _make_room(job: StageJob, mark: str, log: Log) -> None:
    """Decide what an existing run folder is worth; one made otherwise is moved aside."""
    folder = job.run_folder
    if folder.exists():
        found, reason = checkpoint.latest(folder), None
        if found and found[1]["format"] != checkpoint.FORMAT:
            reason = "holds checkpoints of another format"
        elif found and found[1]["fingerprint"] != mark:
            reason = "belongs to another configuration, start model, data or version of the code"
        if reason:
            aside = checkpoint.set_aside(folder)
            log(f"{folder.name} {reason}; moved to {aside.name}, starting afresh")
    folder.mkdir(parents=True, exist_ok=True)


def _quarantined(tracks: dict[str, TrackRun]) -> dict[str, int]:
    """Rows that are not trained on, as `data set: reason`, most frequent first."""
    return dict(sum((track.loader.quarantined for track in tracks.values()), Counter()).most_common())


def _announce(log: Log, model: nn.Module, tracks: dict[str, TrackRun], state: State, total: int) -> None:
    where = f"continuing from step {state.total} of {total}" if state.total else f"starting, {total} steps"
    every = sum(p.numel() for p in model.parameters())
    log(f"{where}; {every / 1e6:.2f} M parameters")
    for name, track in tracks.items():
        count = sum(p.numel() for p in track.parameters.values())
        sets = ", ".join(f"{len(part)} {part.entry.dataset} ({part.entry.template})" for part in track.loader.parts)
        log(f"track {name}: {count / 1e6:.2f} M trained; documents: {sets}")
    for reason, count in _quarantined(tracks).items():
        log(f"quarantined: {count} x {reason}")


def _report_seen(log: Log, tracks: dict[str, TrackRun], rows: list[dict[str, Any]]) -> None:
    for name, track in tracks.items():
        parts = zip(track.loader.parts, track.loader.order.served(track.track.steps), strict=True)
        seen = ", ".join(f"{n} {p.entry.dataset} ({p.entry.template}), {n / len(p):.2f} passes" for p, n in parts)
        fills = [row["fill"] for row in rows if row["track"] == name]
        log(f"track {name}: seen {seen}; mean fill of rows {sum(fills) / len(fills):.3f}")


def _export(job: StageJob, path: Path, tokenizer: TextTokenizer, tracks: dict[str, TrackRun]) -> None:
    """Write the model directory from a checkpoint: weights, companions, history, samples and what was done."""
    temporary = job.model_folder.with_name(f".{job.model_folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model = checkpoint.whole_model(path, job.start)
    model.save_pretrained(temporary)
    for name in (MODEL_TEXT_TOKENIZER, MODEL_IMAGE_TOKENIZER):
        if (job.start / name).exists():
            shutil.copytree(job.start / name, temporary / name)
    training = temporary / TRAINING
    write_csv(read(job.run_folder), training / "history.csv")
    write_json(
        training / "summary.json",
        {
            "run": job.key,
            "stage": job.stage.model_dump(mode="json"),
            "quarantined": _quarantined(tracks),
            "documents": {
                name: [
                    {"dataset": p.entry.dataset, "template": p.entry.template, "usable": len(p), "seen": seen}
                    for p, seen in zip(track.loader.parts, track.loader.order.served(track.track.steps), strict=True)
                ]
                for name, track in tracks.items()
            },
            "tensors": checkpoint.state_of(path)["tensors"],
        },
    )
    if job.stage.sample_prompts:
        np.savez(training / "samples.npz", codes=_sample(model, tokenizer, job.stage))
    shutil.rmtree(job.model_folder, ignore_errors=True)
    temporary.rename(job.model_folder)


def _sample(model: UniForkModel, tokenizer: TextTokenizer, stage: Stage) -> np.ndarray:
    """Codes (prompts, N, D) for the stage's prompts, written as the stage writes them."""
    entries = [entry for track in stage.tracks.values() for entry in track.mixture if entry.task == "generation"]
    template = entries[0].template if entries else "generate"
    return Engine(model, tokenizer).generate_images(stage.sample_prompts, stage.sampling, template)

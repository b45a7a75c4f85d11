"""One stage from start to end: open the documents, resume or begin, train, export.

The run folder (`runs/<key>`) holds checkpoints and the history; it belongs to the loop alone. The
model folder (`models/<key>`) is what later stages and people read; it appears when the stage ends.
"""

import math
import signal
import time
from collections import deque
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from unifork.config import Experiment, Stage, StrictModel, TrainResources, fingerprint
from unifork.documents.loader import PackedDocuments, TrackLoader
from unifork.documents.mixture import DOCUMENTS_VERSION, CodesIdentity
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import MachineError, writing
from unifork.layout import MODEL_TEXT_TOKENIZER, Layout
from unifork.models.configuration import UniForkConfig
from unifork.models.masks import KERNEL, VARLEN
from unifork.models.modeling import MODEL_VERSION, UniForkModel, load_model
from unifork.processes import exclusive
from unifork.shards.manifest import MANIFEST, file_sha256, manifest_sha256, write_json
from unifork.training import checkpoint
from unifork.training.checkpoint import State
from unifork.training.export import SUMMARY, TRAINING, export, quarantined, report_seen
from unifork.training.flops import flops_per_token, peak_flops
from unifork.training.history import History, Log, Progress, Startup, read
from unifork.training.loggers import find_loggers
from unifork.training.loop import Done, TrackRun, WorkerContext, trained_by, turns
from unifork.training.optimizer import Average, freeze_all_but
from unifork.training.recovery import check_extended, settle
from unifork.training.strategies import Strategy, barrier, group_of_one, strategy
from unifork.training.validation import Validation, summary_of
from unifork.training.watch import STOPPED, Watch
from unifork.vocabulary import VOCABULARY_VERSION

TRAIN_VERSION = 2
"""Raise when the same stage would have other weights: order, packing, loop, optimizer."""
NOT_IN_THE_WEIGHTS: dict[str, Any] = {
    "checkpoint_every": True, "checkpoint_minutes": True, "keep_checkpoints": True, "validation": True,
    "sample_prompts": True, "sampling": True, "loss_band": True, "ema": {"export": True},
}  # fmt: skip
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
    def seed(self) -> int:
        """The training seed of the variant."""
        return self.experiment.variants[self.experiment.runs[self.key].variant].seed

    @property
    def extended(self) -> "StageJob | None":
        """The run of the same variant that this one goes on from, optimizers and all."""
        key = f"{self.experiment.runs[self.key].variant}-{self.stage.extend}"
        return self.model_copy(update={"key": key}) if self.stage.extend else None

    @property
    def is_bfloat16(self) -> bool:
        """Whether every track is of bfloat16, so that the model may be."""
        return all(track.precision == "bfloat16" for track in self.stage.tracks.values())

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
        """Of everything that decides the weights: versions, stage, seed, start model, codes, text tokenizer."""
        data = {
            entry.prepared: manifest_sha256(self.layout.prepared / entry.prepared)
            for track in self.stage.tracks.values()
            for entry in track.mixture
            if (self.layout.prepared / entry.prepared / MANIFEST).exists()  # or opening it says what is wrong
        }
        return fingerprint(
            {
                "versions": [TRAIN_VERSION, MODEL_VERSION, DOCUMENTS_VERSION, VOCABULARY_VERSION],
                "stage": self.stage.model_dump(mode="json", exclude=NOT_IN_THE_WEIGHTS),
                "seed": self.seed,
                "start": {name: file_sha256(self.start / name) for name in ("config.json", "model.safetensors")},
                "data": data,
                "text": TextTokenizer(self.start / MODEL_TEXT_TOKENIZER).identity,
            }
        )


def train_stage(job: StageJob, run: WorkerContext) -> None:
    """Train a stage to its end, from wherever an earlier attempt left off.

    The lead worker holds the run folder's lock: a worker that outlives its driver for a few seconds
    and its successor must not write at the same time. Raises UniForkError, and Stopped where the context's requests
    have a signal; then every finished step is saved.
    """
    torch.set_num_threads(job.resources.threads)
    group = group_of_one(run.device, job.is_bfloat16 and run.workers == 1)
    with exclusive(job.run_folder) if run.rank == 0 else nullcontext(), group:
        _train(job, run)


def _train(job: StageJob, run: WorkerContext) -> None:
    started, startup = time.monotonic(), Startup()
    lead = run.rank == 0
    log = Log(job.run_folder, job.key)
    stage, mark = job.stage, job.fingerprint()
    order = turns(stage)
    startup.mark("imports and hashes of the inputs")
    if lead:
        _make_room(job, mark, log)
    barrier()
    startup.mark("checking the checkpoint")
    model = load_model(job.start, attention=VARLEN)
    model.to(torch.device(run.device))  # type: ignore[arg-type]
    model.set_activation_checkpointing(job.resources.activation_checkpointing)
    if job.resources.compile:
        model.compile_parts()
    tokenizer = TextTokenizer(job.start / MODEL_TEXT_TOKENIZER)
    startup.mark("model")
    loaders, validation = _open_documents(job, tokenizer, model.config)
    startup.mark("opening documents")
    trained = {parameter for name, track in stage.tracks.items() for parameter in trained_by(name, track, model)}
    freeze_all_but(model, trained)
    sharing = strategy(job.resources.shard, run.workers, job.is_bfloat16, run.node_workers)
    wrapped = sharing.wrap(model)
    fresh = not (job.start / TRAINING).exists()
    words = model.config.backbone_config().vocab_size
    watch = Watch(stage.loss_band, words, model.config.codebook_size, fresh, job.run_folder, lead, log)
    before = job.experiment.steps_before(job.experiment.runs[job.key].stage)
    tracks = {
        name: TrackRun(name, track, loaders[name], model, sharing, before[name]) for name, track in stage.tracks.items()
    }
    pairs = {name: (track.optimizer, track.parameters) for name, track in tracks.items()}
    every = {name: parameter for track in tracks.values() for name, parameter in track.parameters.items()}
    average = Average(stage.ema.decay, every) if stage.ema else None
    extended = job.extended.run_folder if job.extended else None
    state = checkpoint.start(checkpoint.latest(job.run_folder), model, pairs, sharing, average, extended)
    if lead:
        _announce(log, model, tracks, state, len(order))
    startup.mark("reading the checkpoint")
    state = _steps(job, run, mark, model, wrapped, tracks, sharing, average, state, watch, validation, log, startup)
    if lead:
        with writing(job.model_folder):
            try:
                export(job, run, checkpoint.folder_of(job.run_folder, state), tokenizer, tracks, validation, log)
            except SafetensorError as error:  # its own word for what a disk says
                raise MachineError(f"{job.model_folder}: cannot be written: {error}") from None
        report_seen(log, tracks, read(job.run_folder))
        seconds = time.monotonic() - started
        write_json(job.run_folder / checkpoint.FINISHED, {"fingerprint": mark, "seconds": seconds})
        (job.run_folder / STOPPED).unlink(missing_ok=True)
        log(f"finished in {seconds:.0f} s -> models/{job.model_folder.name}")


def _open_documents(
    job: StageJob, tokenizer: TextTokenizer, config: UniForkConfig
) -> tuple[dict[str, TrackLoader], Validation]:
    """What each track reads, and what is held out of it."""
    identity = CodesIdentity(config.grid**2, config.depth, config.codebook_id, config.encoder_id, config.codebook_size)
    sizes: dict[str, Any] = {
        "context": job.stage.context,
        "row_tokens": job.resources.row_tokens,
        "rows_per_microbatch": job.resources.rows_per_microbatch,
    }
    loaders, held_out = dict[str, TrackLoader](), dict[str, PackedDocuments]()
    for name, track in job.stage.tracks.items():
        place: tuple[Any, ...] = (track, job.layout, tokenizer, identity)
        loaders[name] = TrackLoader(name, *place, seed=job.seed, **sizes)
        held_out[name] = PackedDocuments(*place, **sizes, held_out=True)
    return loaders, Validation(job.stage, held_out)


def _steps(
    job: StageJob,
    run: WorkerContext,
    mark: str,
    model: UniForkModel,
    wrapped: nn.Module,
    tracks: dict[str, TrackRun],
    sharing: Strategy,
    average: Average | None,
    state: State,
    watch: Watch,
    validation: Validation,
    log: Log,
    startup: Startup,
) -> State:
    """All steps that are left; the last state, which is saved. Raises Stopped once a state is saved after a signal."""
    lead, stage, order = run.rank == 0, job.stage, turns(job.stage)
    trained = {name for track in tracks.values() for name in track.parameters}
    history = History(job.run_folder, state.total, log, find_loggers(job.resources.loggers)) if lead else None
    progress = Progress(log, state.total, len(order), run.device)
    if lead:
        progress.write()
        progress.token_shares = _token_shares(run.device, run.workers, model, tracks)
    unread: deque[Done] = deque()
    alone, started_up = run.workers == 1, not lead
    interval = 60 * stage.checkpoint_minutes if stage.checkpoint_minutes and lead else math.inf
    run.requests.save_at = time.monotonic() + interval
    wrapped.train()

    def validate() -> None:
        if validation.due(state.total, len(order)):
            rows = validation.losses(state.total, tracks, wrapped, run)
            if history:
                history.add_validation(rows)
                log(f"held-out losses after step {state.total}: {summary_of(rows)}")

    with (
        run.requests.defer(),
        closing(history) if history else nullcontext(),
        checkpoint.Saver(job.run_folder, trained, mark, stage.keep_checkpoints, lead) as saver,
    ):
        for name, step in order[state.total :]:
            validate()
            unread.append(tracks[name].step(model, wrapped, step, run))
            if average:
                average.update(tracks[name].parameters, tracks[name].before + step)
            state = replace(state, steps={**state.steps, name: step + 1})
            looked_at = _read(unread, 1, watch, history, progress)  # what was asked for is read one step later
            ends = alone and run.requests.signal > 0
            due = any(done.ends or done.saves for done, _ in looked_at)
            if ends or due or state.total % stage.checkpoint_every == 0 or state.total == len(order):
                looked_at += _read(unread, 0, watch, history, progress)
                ends |= any(done.ends for done, _ in looked_at)
                if history:
                    history.sync()
                saver.save(model, sharing, state, average)
                run.requests.save_at = time.monotonic() + interval
                metrics = {k: v for k, v in looked_at[-1][1].items() if v is not None}
                run.report({"finished_steps": state.total, **metrics})
            saver.check()
            if looked_at and not started_up:
                started_up = True
                startup.mark("first step")
                log(str(startup))
            if ends:
                run.requests.signal = run.requests.signal or signal.SIGTERM  # another worker's
                saver.wait()
                if lead:
                    log(f"stopped by a signal after step {state.total} of {len(order)}, which is saved")
                break
        else:
            validate()
    return state


def _token_shares(device: str, workers: int, model: UniForkModel, tracks: dict[str, TrackRun]) -> dict[str, float]:
    """Of the peak of all workers' chips that a token a second of each track is; nothing for one without a peak."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device != "cpu" else None
    if peak is None:
        return {}
    costs = {name: flops_per_token(model, run.loader, run.parameters) for name, run in tracks.items()}
    return {name: flops / (peak * workers) for name, flops in costs.items()}


def _read(
    unread: deque[Done], leave: int, watch: Watch, history: History | None, progress: Progress
) -> list[tuple[Done, dict[str, Any]]]:
    """The oldest steps that were not looked at, all but `leave`, checked and recorded. Raises UniForkError."""
    read = []
    while len(unread) > leave:
        done = unread.popleft()
        metrics = done.metrics()
        watch.check(metrics, done.plan.keys)
        if history:
            history.add(metrics)
            progress.show(metrics, len(done.plan.keys))
        read.append((done, metrics))
    return read


def _make_room(job: StageJob, mark: str, log: Log) -> None:
    """Decide what an existing run folder is worth; one made otherwise is moved aside."""
    if job.run_folder.exists():
        settle(job.run_folder, mark, [track for track, _ in turns(job.stage)], log)
    if (extended := job.extended) and checkpoint.latest(job.run_folder) is None:
        order = [track for track, _ in turns(extended.stage)]
        check_extended(extended.run_folder, order, extended.model_folder / TRAINING / SUMMARY)
    with writing(job.run_folder):
        job.run_folder.mkdir(parents=True, exist_ok=True)


def _announce(log: Log, model: nn.Module, tracks: dict[str, TrackRun], state: State, total: int) -> None:
    where = f"continuing from step {state.total} of {total}" if state.total else f"starting, {total} steps"
    every = sum(p.numel() for p in model.parameters())
    log(f"{where}; {every / 1e6:.2f} M parameters")
    if next(model.parameters()).is_cuda:
        log(f"attention in bfloat16: the kernel of {KERNEL}")
    for name, track in tracks.items():
        count = sum(p.numel() for p in track.parameters.values())
        sets = ", ".join(f"{len(part)} {part.entry.dataset} ({part.entry.template})" for part in track.loader.parts)
        log(f"track {name}: {count / 1e6:.2f} M trained; documents: {sets}")
    for reason, count in quarantined(tracks).items():
        log(f"quarantined: {count} x {reason}")

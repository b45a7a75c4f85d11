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
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unifork.config import NOT_IN_THE_WEIGHTS, Experiment, Lora, Stage, StrictModel, TrainResources, fingerprint
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import DOCUMENTS_VERSION, CodesIdentity
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, writing
from unifork.layout import MODEL_TEXT_TOKENIZER, Layout
from unifork.models.masks import KERNEL, VARLEN
from unifork.models.modeling import MODEL_VERSION, UniForkModel, load_model
from unifork.processes import exclusive
from unifork.shards.manifest import MANIFEST, file_sha256, manifest_sha256, write_json
from unifork.training import checkpoint
from unifork.training.checkpoint import State
from unifork.training.export import SUMMARY, TRAINING, export, quarantined, report_seen
from unifork.training.flops import flops_per_token, peak_flops
from unifork.training.history import History, Log, Progress, Rates, Startup, read
from unifork.training.loggers import find_loggers
from unifork.training.loop import Done, TrackRun, WorkerContext, trained_by, turns
from unifork.training.optimizer import Average, add_adapters, freeze_all_but
from unifork.training.recovery import check_extended, settle
from unifork.training.strategies import DEEPSPEED, barrier, group_of_one, strategy
from unifork.training.validation import Validation, summary_of
from unifork.training.watch import STOPPED, Watch
from unifork.vocabulary import VOCABULARY_VERSION

TRAIN_VERSION = 2
"""Raise when the same stage would have other weights: order, packing, loop, optimizer."""


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
        folders = {entry.prepared: self.layout.prepared / entry.prepared for entry in self.stage.entries}
        # or opening it says what is wrong
        there = {name: folder for name, folder in folders.items() if (folder / MANIFEST).exists()}
        facts = {
            "versions": [TRAIN_VERSION, MODEL_VERSION, DOCUMENTS_VERSION, VOCABULARY_VERSION],
            "stage": self.stage.model_dump(mode="json", exclude=NOT_IN_THE_WEIGHTS),
            "seed": self.seed,
            "start": {name: file_sha256(self.start / name) for name in ("config.json", "model.safetensors")},
            "data": {name: manifest_sha256(folder) for name, folder in there.items()},
            "text": TextTokenizer(self.start / MODEL_TEXT_TOKENIZER).identity,
        }
        return fingerprint(facts)


def train_stage(job: StageJob, run: WorkerContext) -> None:
    """Train a stage to its end, from wherever an earlier attempt left off.

    The lead worker holds the run folder's lock: a worker that outlives its driver for a few seconds
    and its successor must not write at the same time. Raises UniForkError, and Stopped where the context's requests
    have a signal; then every finished step is saved.
    """
    torch.set_num_threads(job.resources.threads)
    group, log = group_of_one(run.device, job.is_bfloat16 and run.workers == 1), Log(job.run_folder, job.key)
    with exclusive(job.run_folder, say=log) if run.rank == 0 else nullcontext(), group:
        _train(job, run, log)


def _train(job: StageJob, run: WorkerContext, log: Log) -> None:
    started = time.monotonic()
    training = Training(job, run, log)
    state = training.steps()
    if not training.lead:
        return
    export(training, checkpoint.folder_of(job.run_folder, state))
    report_seen(log, training.tracks, read(job.run_folder))
    seconds = time.monotonic() - started
    finished: checkpoint.Finished = {"fingerprint": training.mark, "seconds": seconds}
    write_json(job.run_folder / checkpoint.FINISHED, finished)
    (job.run_folder / STOPPED).unlink(missing_ok=True)
    log(f"finished in {seconds:.0f} s -> models/{job.model_folder.name}")


class Training:
    """A stage on one worker: its model, documents and optimizers, as far as it has come."""

    def __init__(self, job: StageJob, run: WorkerContext, log: Log) -> None:
        """Open everything, from where an earlier attempt left off."""
        self.startup = startup = Startup()
        self.job, self.run, self.log, self.stage, self.mark = job, run, log, job.stage, job.fingerprint()
        self.lead, self.order = run.rank == 0, turns(job.stage)
        if self.stage.lora and run.workers > 1 and job.resources.shard in DEEPSPEED:
            raise ConfigError(f"cluster file: shard: {job.resources.shard}: not with lora; use none, node or all")
        startup.mark("imports and hashes of the inputs")
        if self.lead:
            _make_room(job, self.mark, log)
        barrier()
        startup.mark("checking the checkpoint")
        self.model = model = load_model(job.start, attention=VARLEN)
        add_adapters(model, self.stage.lora, job.seed)
        model.to(torch.device(run.device))  # type: ignore[arg-type]
        model.set_activation_checkpointing(job.resources.activation_checkpointing)
        if job.resources.compile:
            model.compile_parts()
        self.tokenizer = TextTokenizer(job.start / MODEL_TEXT_TOKENIZER)
        startup.mark("model")
        loaders = self._open_documents()
        startup.mark("opening documents")
        trained = {name for key, track in self.stage.tracks.items() for name in trained_by(key, track, model)}
        freeze_all_but(model, trained)
        self.sharing = strategy(job.resources.shard, run.workers, job.is_bfloat16, run.node_workers)
        self.wrapped = self.sharing.wrap(model)
        before = job.experiment.steps_before(job.experiment.runs[job.key].stage)
        self.tracks = {
            name: TrackRun(name, track, loaders[name], model, self.sharing, before[name])
            for name, track in self.stage.tracks.items()
        }
        pairs = {name: (track.optimizer, track.parameters) for name, track in self.tracks.items()}
        self.trained = {name: value for track in self.tracks.values() for name, value in track.parameters.items()}
        self.average = Average(self.stage.ema.decay, self.trained) if self.stage.ema else None
        found, extended = checkpoint.latest(job.run_folder), job.extended.run_folder if job.extended else None
        self.state = checkpoint.start(found, model, pairs, self.sharing, self.average, extended)
        words, codes = model.config.backbone_config().vocab_size, model.config.codebook_size
        fresh = not (job.start / TRAINING).exists()
        self.watch = Watch(self.stage.loss_band, words, codes, fresh, job.run_folder, self.lead, log)
        self.history: History | None = None
        self.progress = Progress(log, self.state.total, len(self.order), run.device)
        self.unread: deque[Done] = deque()
        if self.lead:
            self._announce()
        startup.mark("reading the checkpoint")

    def _open_documents(self) -> dict[str, TrackLoader]:
        """What each track reads; and what is held out of it, as `validation`."""
        config, resources = self.model.config, self.job.resources
        shape = (config.positions, config.depth)
        identity = CodesIdentity(*shape, config.codebook_id, config.encoder_id, config.codebook_size)
        open_track = partial(
            TrackLoader, layout=self.job.layout, tokenizer=self.tokenizer, identity=identity, seed=self.job.seed,
            context=self.stage.context, row_tokens=resources.row_tokens,
            rows_per_microbatch=resources.rows_per_microbatch,
        )  # fmt: skip
        tracks = self.stage.tracks.items()
        loaders = {name: open_track(name, track) for name, track in tracks}
        held_out = {name: open_track(name, track, held_out=True) for name, track in tracks}
        self.validation = Validation(self.stage, held_out)
        return loaders

    def steps(self) -> State:
        """All steps that are left; the last state, which is saved.

        Raises Stopped once a state is saved after a signal.
        """
        job, run, stage, requests, total = self.job, self.run, self.stage, self.run.requests, len(self.order)
        if self.lead:
            self.history = History(job.run_folder, self.state.total, self.log, find_loggers(job.resources.loggers))
            self.rates = Rates(job.run_folder, self.state.total, total, run.device)
            self.progress.write()
            self.progress.token_shares = _token_shares(run.device, run.workers, self.model, self.tracks, stage.lora)
        started_up, minutes = not self.lead, stage.checkpoint_minutes
        interval = 60 * minutes if minutes and self.lead else math.inf
        requests.save_at = time.monotonic() + interval
        self.wrapped.train()
        with (
            requests.defer(),
            closing(self.history) if self.history else nullcontext(),
            checkpoint.Saver(
                job.run_folder, {*self.trained}, self.mark, self.stage.keep_checkpoints, self.lead
            ) as saver,
        ):
            for name, step in self.order[self.state.total :]:
                self._validate()
                track = self.tracks[name]
                self.unread.append(track.step(self.model, self.wrapped, step, run))
                if self.average:
                    self.average.update(track.parameters, track.before + step)
                self.state = replace(self.state, steps={**self.state.steps, name: step + 1})
                looked_at = self._look(leave=1)  # what was asked for is read one step later
                ends = run.workers == 1 and requests.signal > 0
                due = any(done.ends or done.saves for done, _ in looked_at)
                if ends or due or self.state.total % stage.checkpoint_every == 0 or self.state.total == total:
                    looked_at += self._look(leave=0)
                    ends |= any(done.ends for done, _ in looked_at)
                    if self.history:
                        self.history.sync()
                    saver.save(self.model, self.sharing, self.state, self.average)
                    requests.save_at = time.monotonic() + interval
                    metrics = {k: v for k, v in looked_at[-1][1].items() if v is not None}
                    run.report({"finished_steps": self.state.total, **metrics})
                saver.check()
                if looked_at and not started_up:
                    started_up = True
                    self.startup.mark("first step")
                    self.log(str(self.startup))
                if ends:
                    requests.signal = requests.signal or signal.SIGTERM  # another worker's
                    saver.wait()
                    if self.lead:
                        self.log(f"stopped by a signal after step {self.state.total} of {total}, which is saved")
                    break
            else:
                self._validate()
        return self.state

    def _validate(self) -> None:
        """Take the losses on what is held out, where they are due."""
        if self.validation.due(self.state.total, len(self.order)):
            rows = self.validation.losses(self.state.total, self.tracks, self.wrapped, self.run)
            if self.history:
                self.history.add_validation(rows)
                self.log(f"held-out losses after step {self.state.total}: {summary_of(rows)}")

    def _look(self, leave: int) -> list[tuple[Done, dict[str, Any]]]:
        """The oldest steps that were not looked at, all but `leave`, checked and recorded. Raises UniForkError."""
        found = []
        while len(self.unread) > leave:
            done = self.unread.popleft()
            metrics = done.metrics()
            self.watch.check(metrics, done.plan.keys)
            if self.history:
                self.history.add(metrics)
                self.progress.show(metrics, len(done.plan.keys))
                self.rates.add(self.progress.done, metrics["tokens"], len(done.plan.keys))
            found.append((done, metrics))
        return found

    def _announce(self) -> None:
        done, total, log = self.state.total, len(self.order), self.log
        where = f"continuing from step {done} of {total}" if done else f"starting, {total} steps"
        log(f"{where}; {self.model.num_parameters() / 1e6:.2f} M parameters")
        if self.model.device.type == "cuda":
            log(f"attention in bfloat16: the kernel of {KERNEL}")
        for name, track in self.tracks.items():
            count = sum(p.numel() for p in track.parameters.values())
            sets = ", ".join(f"{len(part)} {part.entry.dataset} ({part.entry.template})" for part in track.loader.parts)
            log(f"track {name}: {count / 1e6:.2f} M trained; documents: {sets}")
        for reason, count in quarantined(self.tracks).items():
            log(f"quarantined: {count} x {reason}")


def _token_shares(
    device: str, workers: int, model: UniForkModel, tracks: dict[str, TrackRun], lora: Lora | None
) -> dict[str, float]:
    """Of the peak of all workers' chips that a token a second of each track is; nothing for one without a peak."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device != "cpu" else None
    if peak is None:
        return {}
    costs = {name: flops_per_token(model, run.loader, run.parameters, lora) for name, run in tracks.items()}
    return {name: flops / (peak * workers) for name, flops in costs.items()}


def _make_room(job: StageJob, mark: str, log: Log) -> None:
    """Decide what an existing run folder is worth; one made otherwise is moved aside."""
    if job.run_folder.exists():
        settle(job.run_folder, mark, [track for track, _ in turns(job.stage)], log)
    if (extended := job.extended) and checkpoint.latest(job.run_folder) is None:
        order = [track for track, _ in turns(extended.stage)]
        check_extended(extended.run_folder, order, extended.model_folder / TRAINING / SUMMARY)
    with writing(job.run_folder):
        job.run_folder.mkdir(parents=True, exist_ok=True)

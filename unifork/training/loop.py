"""The training loop of one stage, on one worker of many, without Ray.

A stage is a list of turns (track, step) that follows from its configuration alone. Each turn is one
optimizer step over exactly `batch_documents` documents. The loss of a task is the sum over the
supervised targets of the whole step divided by their number, wherever they lie; the two tasks'
losses are added. So the result does not depend on workers, accumulation or packing.

A step never waits for the device. Its losses and norms set out for the host when it ends and are read
a step later, while the device works on the next one; they are all read before anything is saved.

Shape suffixes: D code depth, R what is reduced with the losses: 1 + D sums and 2 flags.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unifork.batch import Batch
from unifork.config import Stage, Track
from unifork.documents.loader import Slot, StepPlan, TrackLoader
from unifork.models.layer_plan import branch_of
from unifork.models.modeling import Losses
from unifork.training.optimizer import learning_rate, make_optimizer, trained_names
from unifork.training.requests import Requests
from unifork.training.strategies import Strategy, summed
from unifork.training.tables import Step

Metrics = dict[str, Any]
Loaded = tuple[StepPlan, list[Batch]]


@dataclass(frozen=True)
class WorkerContext:
    """What a launcher gives to a worker."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    node_workers: int = 1
    """Workers on this worker's node."""
    report: Callable[[dict[str, Any]], None] = lambda _: None
    """Called by every worker equally often, with the metrics of a step."""
    requests: Requests = field(default_factory=Requests)
    """What this worker asks of all."""


def turns(stage: Stage) -> list[tuple[str, int]]:
    """The order of all optimizer steps of a stage: (track, step of the track)."""
    steps = {name: track.steps for name, track in stage.tracks.items()}
    if stage.interleave == "concurrent":  # side by side in proportion, so that all end together
        every = [((step + 1) / total, name, step) for name, total in steps.items() for step in range(total)]
        return [(name, step) for _, name, step in sorted(every, key=lambda turn: turn[0])]
    burst = max(steps.values()) if stage.interleave == "sequential" else stage.interleave
    rounds = -(-max(steps.values()) // burst)
    return [
        (name, step)
        for number in range(rounds)
        for name, total in steps.items()
        for step in range(number * burst, min((number + 1) * burst, total))
    ]


def trained_by(name: str, track: Track, model: nn.Module) -> list[str]:
    """Names of the parameters that a track trains. Raises ConfigError for a pattern without a match."""
    return trained_names([name for name, _ in model.named_parameters()], track, f"tracks.{name}")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, for gradient norms: a branch, or one of the rest."""
    named, branch = {"image_head": "head", "connector": "connector"}, branch_of(name)
    return named.get(name.partition(".")[0]) or (branch if branch and branch != "shared" else "trunk")


class Done:
    """A step that was queued: its metrics, of which some are still on their way from the device."""

    ends = saves = False
    """Whether any worker asked to end, or to save, when the step was queued; valid once `metrics` was called."""

    def __init__(self, host_metrics: dict[str, Any], plan: StepPlan, sums_R: Tensor, norms: dict[str, Tensor]) -> None:
        self.host_metrics, self.plan, self.names = host_metrics, plan, list(norms)
        values = torch.cat([sums_R, *(norm.detach().reshape(1).to(sums_R) for norm in norms.values())])
        self.values = values.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if values.is_cuda else None  # type: ignore[no-untyped-call]
        if self.arrived:
            self.arrived.record()

    def metrics(self) -> dict[str, Any]:
        """Everything that is known of the step, equal on every worker; waits for this step, not for later ones."""
        if self.arrived:
            self.arrived.synchronize()
        values = self.values.tolist()
        (*sums, ends, saves), norms = values[: -len(self.names)], values[-len(self.names) :]
        self.ends, self.saves = ends > 0, saves > 0
        track, step, *rest = self.host_metrics.items()
        return dict([track, step, *_losses(sums, self.plan).items(), *rest, *zip(self.names, norms, strict=True)])


class TrackRun:
    """One track's optimizer over its trained parameters."""

    def __init__(
        self, name: str, track: Track, loader: TrackLoader, model: nn.Module, strategy: Strategy, before: int = 0
    ) -> None:
        """before: steps of the track in the stages that this one extends."""
        self.before = before
        self.name, self.track, self.loader, self.strategy = name, track, loader, strategy
        named = dict(model.named_parameters())
        self.parameters = {parameter_name: named[parameter_name] for parameter_name in trained_by(name, track, model)}
        self.parts: dict[str, list[nn.Parameter]] = {}
        for parameter_name, parameter in self.parameters.items():
            self.parts.setdefault(part_of(parameter_name), []).append(parameter)
        self.optimizer = make_optimizer(track.optimizer, self.parameters.values())
        self._reader, self._ahead = ThreadPoolExecutor(1), dict[int, Future[Loaded]]()

    def step(self, model: nn.Module, wrapped: nn.Module, step: int, run: WorkerContext) -> Done:
        """One optimizer step, counted from 0 in this stage; the schedule is the stage's own, the order goes on."""
        rate = learning_rate(self.track.optimizer, step, self.track.steps)
        step += self.before
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        plan, batches = self._loaded(step, run)
        self.strategy.turn(self.name)
        sums_R = self._accumulate(wrapped, plan, batches, run)
        norms = self.strategy.update(self.parts, self.track.optimizer.clip_norm)
        model.zero_grad(set_to_none=True)  # of the other tracks' parameters too
        row: Step = {
            "track": self.name,
            "step": step,
            "learning_rate": rate,
            "tokens": sum(plan.lengths),
            "fill": round(plan.packing.fill, 4),
            "documents_hash": hashlib.blake2b("\n".join(plan.keys).encode(), digest_size=8).hexdigest(),
        }
        return Done({**row, **self.loader.seen(step + 1)}, plan, sums_R, norms)

    def served(self) -> list[int]:
        """Documents of each part of the mixture at the end of the stage, those of the stages before it included."""
        return self.loader.order.served(self.before + self.track.steps)

    def _loaded(self, step: int, run: WorkerContext) -> "Loaded":
        """A step's plan and microbatches; a thread then makes those of the next one while the device works."""

        def load(number: int) -> Loaded:
            plan = self.loader.plan(number, run.workers)
            return plan, [batch.to(run.device) for batch in self.loader.batches(plan, run.rank)]

        loading = self._ahead.pop(step, None) or self._reader.submit(load, step)
        if step + 1 < self.before + self.track.steps:
            self._ahead[step + 1] = self._reader.submit(load, step + 1)
        return loading.result()

    def _accumulate(self, wrapped: nn.Module, plan: StepPlan, batches: Sequence[Batch], run: WorkerContext) -> Tensor:
        """Backward over all microbatches; sums over all workers: losses of text and each depth, flags of requests."""
        text_scale = run.workers / max(plan.text_targets, 1)
        image_scale = run.workers / max(plan.image_targets * self.loader.identity.depth, 1)
        sums = torch.zeros(1 + self.loader.identity.depth, dtype=torch.float64, device=run.device)
        for number, batch in enumerate(batches, 1):
            self.strategy.begin(number == len(batches))
            losses = _forward(self, wrapped, batch, run)
            loss = losses.text_loss_sum * text_scale + losses.image_loss_sum_D.sum() * image_scale
            loss.backward()  # type: ignore[no-untyped-call]
            sums += _sums(losses)
        flags = [sums.new_full((1,), flag) for flag in run.requests.flags()]  # filled there: nothing is copied
        return summed(torch.cat([sums, *flags]))

    @torch.no_grad()
    def losses(self, wrapped: nn.Module, documents: TrackLoader, slots: list[Slot], run: WorkerContext) -> Metrics:
        """The losses of some documents, which nothing is learned from; every worker must call this."""
        self.strategy.turn(self.name)
        plan = documents.pack(slots, [False] * len(slots), run.workers)
        sums = torch.zeros(1 + documents.identity.depth, dtype=torch.float64, device=run.device)
        for batch in documents.batches(plan, run.rank):
            sums += _sums(_forward(self, wrapped, batch, run))
        return {name: value for name, value in _losses(summed(sums).tolist(), plan).items() if name != "loss"}


def _forward(track: TrackRun, wrapped: nn.Module, batch: Batch, run: WorkerContext) -> Losses:
    autocast = track.strategy.autocast and track.track.precision == "bfloat16"
    with torch.autocast(torch.device(run.device).type, torch.bfloat16, enabled=autocast):
        losses: Losses = wrapped(batch.to(run.device))
    return losses


def _sums(losses: Losses) -> Tensor:
    return torch.cat([losses.text_loss_sum.reshape(1), losses.image_loss_sum_D]).detach().double()


def _losses(sums: list[float], plan: StepPlan) -> Metrics:
    text = sums[0] / plan.text_targets if plan.text_targets else None
    depths = [loss_sum / plan.image_targets for loss_sum in sums[1:]] if plan.image_targets else []
    image = sum(depths) / len(depths) if depths else None
    return {
        "loss": (text or 0.0) + (image or 0.0),
        "text_loss": text,
        "image_loss": image,
        **{f"image_loss_depth_{depth}": value for depth, value in enumerate(depths)},
    }

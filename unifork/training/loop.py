"""The training loop of one stage, on one worker of many, without Ray.

A stage is a list of turns (track, step) that follows from its configuration alone. Each turn is one
optimizer step over exactly `batch_documents` documents. The loss of a task is the sum over the
supervised targets of the whole step divided by their number, wherever they lie; the two tasks'
losses are added. So the result does not depend on workers, accumulation or packing.

Shape suffixes: D code depth.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unifork.config import Stage, Track
from unifork.data.loader import StepPlan, TrackLoader
from unifork.models.layer_plan import BRANCHES
from unifork.training.optimizer import learning_rate, make_optimizer, trainable_names
from unifork.training.strategies import Strategy, summed
from unifork.training.watch import Watch


@dataclass(frozen=True)
class Run:
    """What a launcher gives to a worker."""

    rank: int = 0
    workers: int = 1
    device: str = "cpu"
    report: Callable[[dict[str, Any]], None] = lambda _: None
    """Called by every worker equally often, with the metrics of a step."""


def turns(stage: Stage) -> list[tuple[str, int]]:
    """The order of all optimizer steps of a stage: (track, step of the track)."""
    steps = {name: track.steps for name, track in stage.tracks.items()}
    if stage.interleave == "concurrent":  # side by side in proportion, so that all end together
        every = [((step + 1) / total, name, step) for name, total in steps.items() for step in range(total)]
        return [(name, step) for _, name, step in sorted(every, key=lambda one: one[0])]
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
    names = [name for name, _ in model.named_parameters()]
    return trainable_names(names, track.trainable, f"track {name}: trainable")


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, for gradient norms: a branch, or one of the rest."""
    words = name.split(".")
    branches = {branch for route, names in BRANCHES.items() if route != "none" for branch in names}
    named = {"image_head": "head", "connector": "connector"}
    return named.get(words[0]) or next((word for word in words if word in branches), "trunk")


class TrackRun:
    """One track's optimizer over its trained parameters."""

    def __init__(
        self, name: str, track: Track, loader: TrackLoader, model: nn.Module, watch: Watch, strategy: Strategy
    ) -> None:
        self.name, self.track, self.loader, self.watch = name, track, loader, watch
        self.strategy = strategy
        named = dict(model.named_parameters())
        self.parameters = {one: named[one] for one in trained_by(name, track, model)}
        self.parts: dict[str, list[nn.Parameter]] = {}
        for one, parameter in self.parameters.items():
            self.parts.setdefault(part_of(one), []).append(parameter)
        self.optimizer = make_optimizer(track.optimizer, self.parameters.values())

    def step(self, model: nn.Module, wrapped: nn.Module, step: int, run: Run) -> dict[str, Any]:
        """One optimizer step; returns its metrics, equal on every worker.

        Raises UniForkError before the update when a loss or the gradient is out of bounds.
        """
        rate = learning_rate(self.track.optimizer, step, self.track.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        plan = self.loader.plan(step, run.workers)
        self.strategy.turn(self.name)
        sums_1D = self._accumulate(wrapped, plan, run)
        metrics = {
            "track": self.name,
            "step": step,
            **_losses(sums_1D.tolist(), plan),
            "learning_rate": rate,
            "tokens": sum(plan.lengths),
            "fill": round(plan.fill, 4),
            "documents_hash": hashlib.blake2b("\n".join(plan.keys).encode(), digest_size=8).hexdigest(),
        }

        def check(norms: dict[str, float]) -> None:
            metrics.update(norms)
            self.watch.check(metrics, plan.keys)

        self.strategy.update(self.parts, self.track.optimizer.clip_norm, check)
        model.zero_grad(set_to_none=True)  # of the other tracks' parameters too
        return metrics

    def _accumulate(self, wrapped: nn.Module, plan: StepPlan, run: Run) -> Tensor:
        """Backward over all microbatches; [text, depth 0, ... depth D-1] loss sums of the step."""
        text_scale = run.workers / max(plan.text_targets, 1)
        image_scale = run.workers / max(plan.image_targets * self.loader.identity.depth, 1)
        sums = torch.zeros(1 + self.loader.identity.depth, dtype=torch.float64, device=run.device)
        for batch in self.loader.batches(plan, run.rank):
            with torch.autocast(sums.device.type, torch.bfloat16, enabled=self.track.precision == "bfloat16"):
                losses = wrapped(batch.to(run.device))
            (losses.text_loss_sum * text_scale + losses.image_loss_sum_D.sum() * image_scale).backward()
            sums += torch.cat([losses.text_loss_sum.reshape(1), losses.image_loss_sum_D]).detach().double()
        return summed(sums)


def _losses(sums: list[float], plan: StepPlan) -> dict[str, Any]:
    text = sums[0] / plan.text_targets if plan.text_targets else None
    depths = [one / plan.image_targets for one in sums[1:]] if plan.image_targets else []
    image = sum(depths) / len(depths) if depths else None
    return {
        "loss": (text or 0.0) + (image or 0.0),
        "text_loss": text,
        "image_loss": image,
        **{f"image_loss_depth_{depth}": value for depth, value in enumerate(depths)},
    }

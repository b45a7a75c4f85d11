"""The training loop of one stage, on one worker of many, without Ray.

A stage is a list of turns (track, step) that follows from its configuration alone. Each turn is one
optimizer step over exactly `batch_documents` documents. The loss of a task is the sum over the
supervised targets of the whole step divided by their number, wherever they lie; the two tasks'
losses are added. So the result does not depend on workers, accumulation or packing.

Shape suffixes: D code depth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unifork.config import Stage, Track
from unifork.data.loader import StepPlan, TrackLoader
from unifork.errors import UniForkError
from unifork.training.optimizer import learning_rate, make_optimizer, trainable_names
from unifork.training.strategies import summed, whole


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


class TrackRun:
    """One track's optimizer over its trained parameters."""

    def __init__(self, name: str, track: Track, loader: TrackLoader, model: nn.Module) -> None:
        self.name, self.track, self.loader = name, track, loader
        named = dict(model.named_parameters())
        self.parameters = {one: named[one] for one in trained_by(name, track, model)}
        self.optimizer = make_optimizer(track.optimizer, self.parameters.values())

    def step(self, model: nn.Module, wrapped: nn.Module, step: int, run: Run) -> dict[str, Any]:
        """One optimizer step; returns its metrics, equal on every worker."""
        rate = learning_rate(self.track.optimizer, step, self.track.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        plan = self.loader.plan(step, run.workers)
        sums_1D = self._accumulate(wrapped, plan, run)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.track.optimizer.clip_norm)
        norm_value = float(whole(norm))
        metrics = _metrics(self.name, step, sums_1D, plan, rate, norm_value)
        if not torch.isfinite(torch.tensor([norm_value, metrics["loss"]])).all():
            raise UniForkError(
                f"track {self.name}, step {step}: loss {metrics['loss']}, gradient norm {norm_value}; "
                f"stopped before the update. Documents of the step: {', '.join(plan.keys)}"
            )
        self.optimizer.step()
        model.zero_grad(set_to_none=True)  # of the other tracks' parameters too
        return metrics

    def _accumulate(self, wrapped: nn.Module, plan: StepPlan, run: Run) -> Tensor:
        """Backward over all microbatches; [text, depth 0, ... depth D-1] loss sums of the step."""
        text_scale = run.workers / max(plan.text_targets, 1)
        image_scale = run.workers / max(plan.image_targets * self.loader.identity.depth, 1)
        sums = torch.zeros(1 + self.loader.identity.depth, dtype=torch.float64)
        for batch in self.loader.batches(plan, run.rank):
            losses = wrapped(batch.to(run.device))
            (losses.text_loss_sum * text_scale + losses.image_loss_sum_D.sum() * image_scale).backward()
            sums += torch.cat([losses.text_loss_sum.reshape(1), losses.image_loss_sum_D]).detach().cpu().double()
        return summed(sums)


def _metrics(track: str, step: int, sums_1D: Tensor, plan: StepPlan, rate: float, norm: float) -> dict[str, Any]:
    text = float(sums_1D[0]) / plan.text_targets if plan.text_targets else None
    depths = [float(one) / plan.image_targets for one in sums_1D[1:]] if plan.image_targets else []
    image = sum(depths) / len(depths) if depths else None
    return {
        "track": track,
        "step": step,
        "loss": (text or 0.0) + (image or 0.0),
        "text_loss": text,
        "image_loss": image,
        **{f"image_loss_depth_{depth}": value for depth, value in enumerate(depths)},
        "learning_rate": rate,
        "gradient_norm": norm,
        "fill": round(plan.fill, 4),
    }

"""How workers share a model. One small interface; a checkpoint looks the same whatever was used.

All of them average gradients over workers, so a worker's loss is multiplied by the number of workers
before the backward pass (FSDP2's own divide factor does not work on gloo).
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unifork.errors import unknown
from unifork.training.optimizer import MOMENTS, Optimizers, Parts, Read
from unifork.training.zero import ZeRO


class Strategy(Protocol):
    """What a run needs to know of a way to share a model, in the order in which it asks."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call; the names of `model`'s parameters stay as they are. Optimizers are made after it."""

    def start(self, optimizers: Optimizers) -> None:
        """Called when the model has the weights to begin with. Raises ConfigError for tracks that do not fit."""

    def read_moments(self, track: str, read: Read) -> None:
        """Have `read` fill a track's optimizer state, `optimizer/<track>/<parameter>/<moment>` in a checkpoint."""

    def turn(self, track: str) -> None:
        """The next step is one of this track."""

    def update(self, parts: Parts, clip_norm: float) -> dict[str, Tensor]:
        """One step of the optimizer with the whole gradient clipped; the norms before that, by name, on the device.

        Nothing is looked at here: whoever reads the norms decides what is saved.
        """

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this worker writes of the model's tensors."""

    def moments(self, track: str) -> dict[str, Tensor]:
        """What this worker writes of a track's optimizer state, by `<parameter>/<moment>`."""


class SingleWorker:
    """One worker: nothing to share."""

    def __init__(self) -> None:
        self.optimizers: Optimizers = {}
        self.track = ""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def start(self, optimizers: Optimizers) -> None:
        self.optimizers = optimizers

    def read_moments(self, track: str, read: Read) -> None:
        optimizer, parameters = self.optimizers[track]
        moments = {
            name: {m: torch.tensor(0.0) if m == "step" else torch.zeros_like(parameter.detach()) for m in MOMENTS}
            for name, parameter in parameters.items()
        }
        named = {f"{name}/{moment}": value for name, state in moments.items() for moment, value in state.items()}
        read(f"optimizer/{track}", named)
        for name, parameter in parameters.items():
            optimizer.state[parameter].update(moments[name])

    def turn(self, track: str) -> None:
        self.track = track

    def update(self, parts: Parts, clip_norm: float) -> dict[str, Tensor]:
        norms = {
            f"gradient_norm_{name}": whole(nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]))
            for name, part in parts.items()
        }
        total = torch.linalg.vector_norm(torch.stack(list(norms.values())))
        optimizer, parameters = self.optimizers[self.track]
        nn.utils.clip_grads_with_norm_(parameters.values(), clip_norm, total)
        optimizer.step()
        return {"gradient_norm": total, **norms}

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors

    def moments(self, track: str) -> dict[str, Tensor]:
        optimizer, parameters = self.optimizers[track]
        return {f"{name}/{m}": optimizer.state[parameter][m] for name, parameter in parameters.items() for m in MOMENTS}


class DDP(SingleWorker):
    """Every worker holds the whole model."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)


class FSDP2(SingleWorker):
    """Parameters, gradients and optimizer state are sharded; resharding is loading."""

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  slow to import, and one worker does without

        for block in model.layers:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
        return model


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "ddp": DDP,
    "fsdp2": FSDP2,
    **{f"deepspeed-{stage}": partial(ZeRO, stage) for stage in (1, 2, 3)},
}


def strategy(name: str, workers: int) -> Strategy:
    """The strategy by name; one worker shares with nobody, whatever the name."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES, "cluster file")
    return STRATEGIES[name]() if workers > 1 else SingleWorker()


def whole(tensor: Tensor) -> Tensor:
    """A small tensor that may be sharded, in full. Every worker must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def summed(values: Tensor) -> Tensor:
    """Sum of a small tensor over all workers."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait for all workers."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()

"""How workers share a model. One small interface; a checkpoint looks the same whatever was used.

Both strategies average gradients over workers, so a worker's loss is multiplied by the number of
workers before the backward pass (FSDP2's own divide factor does not work on gloo).
"""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from unifork.errors import unknown


class Strategy(Protocol):
    """What the loop needs to know of a way to share a model."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call; the names of `model`'s parameters stay as they are."""
        ...


@dataclass(frozen=True)
class Plain:
    """One worker: nothing to share."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class DDP:
    """Every worker holds the whole model."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)


@dataclass(frozen=True)
class FSDP2:
    """Parameters, gradients and optimizer state are sharded; resharding is loading."""

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  slow to import, and one worker does without

        for block in model.layers:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(model)
        return model


STRATEGIES: dict[str, type[Plain] | type[DDP] | type[FSDP2]] = {"plain": Plain, "ddp": DDP, "fsdp2": FSDP2}


def strategy(name: str, workers: int) -> Strategy:
    """The strategy by name; one worker always gets the plain one."""
    if name not in STRATEGIES:
        raise unknown("strategy", name, STRATEGIES, "cluster file")
    return STRATEGIES[name]() if workers > 1 else Plain()


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

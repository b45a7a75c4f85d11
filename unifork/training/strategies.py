"""How workers share a model. One small interface; a checkpoint looks the same whatever was used.

All of them average gradients over workers, so a worker's loss is multiplied by the number of workers
before the backward pass (FSDP2's own divide factor does not work on gloo).
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from unifork.errors import ConfigError
from unifork.training.optimizer import MOMENTS, Optimizers, Parts, Read


class Strategy:
    """What a run needs of a way to share a model, in the order in which it asks; here one worker, nothing to share."""

    autocast = True
    """Whether tracks of bfloat16 are autocast; otherwise the wrapped model computes in it by itself."""

    def __init__(self) -> None:
        self.optimizers: Optimizers = {}
        self.track = ""

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call; the names of `model`'s parameters stay as they are. Optimizers are made after it."""
        model.every_branch = False  # type: ignore[assignment]
        return model

    def start(self, optimizers: Optimizers) -> None:
        """Called when the model has the weights to begin with. Raises ConfigError for tracks that do not fit."""
        self.optimizers = optimizers

    def read_moments(self, track: str, read: Read) -> None:
        """Have `read` fill a track's optimizer state, `optimizer/<track>/<parameter>/<moment>` in a checkpoint."""
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
        """The next step is one of this track."""
        self.track = track

    def begin(self, last: bool) -> None:
        """A microbatch follows, the step's last or not; what is reduced is reduced with the last."""

    def update(self, parts: Parts, clip_norm: float) -> dict[str, Tensor]:
        """One step of the optimizer with the whole gradient clipped; the norms before that, by name, on the device.

        Nothing is looked at here: whoever reads the norms decides what is saved.
        """
        optimizer, parameters = self.optimizers[self.track]
        for parameter in parameters.values():
            if parameter.grad is None:  # of a branch without tokens in this step, which decays all the same
                parameter.grad = torch.zeros_like(parameter)
        norms_P = self.combined(torch.stack([nn.utils.get_total_norm(_gradients(part)) for part in parts.values()]))
        total, norms = torch.linalg.vector_norm(norms_P), zip(parts, norms_P, strict=True)
        nn.utils.clip_grads_with_norm_(parameters.values(), clip_norm, total)
        optimizer.step()
        return {"gradient_norm": total, **{f"gradient_norm_{name}": norm for name, norm in norms}}

    def combined(self, norms_P: Tensor) -> Tensor:
        """Norms of P parts of the gradient from those of this worker's shards of them."""
        return norms_P

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this worker writes of the model's tensors."""
        return tensors

    def moments(self, track: str) -> dict[str, Tensor]:
        """What this worker writes of a track's optimizer state, by `<parameter>/<moment>`."""
        optimizer, parameters = self.optimizers[track]
        return {f"{name}/{m}": optimizer.state[parameter][m] for name, parameter in parameters.items() for m in MOMENTS}


class Sharded(Strategy):
    """torch's `fully_shard`: replicas of the model, each in shards on so many workers; resharding is loading.

    A stage of bfloat16 tracks multiplies bfloat16 copies of the weights; shards, their gradients and the reduction are
    float32. What is replicated alone (one worker is a replica, too) keeps its copies until the step ends.
    """

    def __init__(self, shards: int, workers: int, bfloat16: bool) -> None:
        """shards: workers that share a replica; a divisor of `workers`."""
        super().__init__()
        self.replicas, self.shards, self.autocast = workers // shards, shards, not bfloat16

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import (  # noqa: PLC0415  slow to import, and one worker does without
            MixedPrecisionPolicy,
            fully_shard,
        )

        device = next(model.parameters()).device.type
        self.mesh = init_device_mesh(device, (self.replicas, self.shards), mesh_dim_names=("replicate", "shard"))
        mesh = self.mesh if self.replicas > 1 else self.mesh["shard"]  # a replica alone is not reduced over
        policy = MixedPrecisionPolicy() if self.autocast else MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        again = None if self.shards > 1 else False  # None: all but the root's are gathered again in the backward pass
        for module in (*model.layers, *model.image_head.blocks, model):  # type: ignore[misc, union-attr]
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
        self.wrapped: Any = model
        return model

    def begin(self, last: bool) -> None:
        self.wrapped.set_requires_gradient_sync(last)
        self.wrapped.set_reshard_after_backward(last or self.shards > 1)

    def combined(self, norms_P: Tensor) -> Tensor:
        if self.shards == 1:
            return norms_P
        squares_P = norms_P.square()
        dist.all_reduce(squares_P, group=self.mesh["shard"].get_group())
        return squares_P.sqrt()


DEEPSPEED = {f"deepspeed-{stage}": stage for stage in (1, 2, 3)}


def strategy(shard: str, workers: int, bfloat16: bool = False, node_workers: int = 1) -> Strategy:
    """The strategy by `shard` of the cluster file; one worker shares with nobody, whatever it says.

    bfloat16: whether all tracks of the stage are. node_workers: workers on this worker's node. Raises ConfigError.
    """
    if workers == 1:
        return Sharded(1, 1, bfloat16) if bfloat16 else Strategy()
    if shard in DEEPSPEED:
        from unifork.training.zero import ZeRO  # noqa: PLC0415  which is one of these, by an extra

        return ZeRO(DEEPSPEED[shard])
    if shard == "node" and len(every := set(gathered(node_workers))) > 1:
        raise ConfigError(
            f"cluster file: shard is node, but nodes have {min(every)} to {max(every)} of the {workers} workers; "
            f"give every node as many, or shard over none or all"
        )
    return Sharded({"none": 1, "node": node_workers, "all": workers}[shard], workers, bfloat16)


@contextmanager
def group_of_one(device: str, needed: bool) -> Iterator[None]:
    """A process group of this worker alone, where it is needed and there is none."""
    own = needed and not dist.is_initialized()
    if own:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if own:
            dist.destroy_process_group()


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """What this worker holds of the gradients."""
    found = (parameter.grad for parameter in parameters)
    return [g.to_local() if isinstance(g, DTensor) else g for g in found if g is not None]


def summed(values: Tensor) -> Tensor:
    """Sum of a small tensor over all workers."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(value: Any, group: Any = None) -> list[Any]:
    """What each worker gives, by rank; waits for all."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, value, group)
    return every


def barrier() -> None:
    """Wait for all workers."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()

"""DeepSpeed's ZeRO as a strategy: optimizer state (1), gradients (2) and parameters (3) in shards.

An engine has one optimizer, so the tracks' optimizers become one whose groups know their track, and
only the groups of the turn are stepped. Everything is float32; a track's `precision` is autocast, as
with the other strategies. A checkpoint gets what is sharded gathered tensor by tensor, each kept by
one worker, so it is the same as any other checkpoint and fits any number of workers.
"""

import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unifork.config import read_yaml
from unifork.errors import ConfigError, check_extra
from unifork.training.optimizer import Optimizers, Parts, Read
from unifork.training.strategies import Strategy

BUCKET = 50_000_000
"""Most elements that are reduced at once; DeepSpeed allocates as much."""
SHARDED = ("exp_avg", "exp_avg_sq")


class Joint(torch.optim.AdamW):
    """AdamW over the groups of all tracks, of which a step updates those of one."""

    track = ""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the groups of `track`."""
        every = self.param_groups
        self.param_groups = [group for group in every if group["track"] == self.track]
        super().step(closure)
        self.param_groups = every


class Called(nn.Module):
    """What the engine calls. The engine switches its caller's autocast off, so that comes as an argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, device: str, autocast: bool) -> Any:
        """The model's output."""
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return self.model(batch)


class Shared(nn.Module):
    """What the loop calls; there is an engine once the model has its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.called = Called(model)
        self.engine: Any = None

    def forward(self, batch: Any) -> Any:
        """The model's output."""
        device = batch.codes_ND.device.type
        return self.engine(batch, device, torch.is_autocast_enabled(device))


class ZeRO(Strategy):
    """DeepSpeed with one of its stages. The norms of the gradient's parts are left out: no worker holds them.

    Gradients are reduced after every microbatch, whatever `begin` says: stages 2 and 3 do so.
    """

    def __init__(self, stage: int) -> None:
        """stage: 1, 2 or 3. Raises ConfigError when DeepSpeed is not installed."""
        check_extra("deepspeed", "deepspeed", f"cluster file: shard: deepspeed-{stage}")
        super().__init__()
        self.stage = stage
        self.deepspeed: Any = None
        self.shared: Shared
        self.joint: Joint

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call, from `start` on."""
        self.shared = Shared(model)
        return self.shared

    def start(self, optimizers: Optimizers) -> None:
        """Make the engine. Raises ConfigError when two tracks train the same parameter."""
        owners: dict[str, str] = {}
        for track, (_, parameters) in optimizers.items():
            for name in parameters:
                if owners.setdefault(name, track) != track:
                    raise ConfigError(
                        f"cluster file: shard: deepspeed-{self.stage}: the tracks {owners[name]} and {track} both "
                        f"train {name}, but DeepSpeed has one optimizer state for a parameter; use none, node or all"
                    )
        model = self.shared.called.model
        self.optimizers = optimizers
        self.joint = Joint(
            [{**g, "track": track} for track, (optimizer, _) in optimizers.items() for g in optimizer.param_groups],
            fused=True,
        )
        config = read_yaml(Path(__file__).with_suffix(".yaml"))
        config["zero_optimization"] = {
            "stage": self.stage,
            "reduce_bucket_size": min(BUCKET, sum(p.numel() for p in model.parameters())),
            # vectors stay whole on every worker, matrices are sharded
            "stage3_param_persistence_threshold": max(p.numel() for p in model.parameters() if p.ndim < 2),
        }
        self.deepspeed = _deepspeed(next(model.parameters()).device.type)
        self.shared.engine, *_ = self.deepspeed.initialize(
            model=self.shared.called, optimizer=self.joint, config=config
        )
        for _, flat in self._shards():
            self.joint.state[flat] = {"step": torch.zeros((), device=flat.device)}
            self.joint.state[flat] |= {moment: torch.zeros_like(flat.detach()) for moment in SHARDED}
        if self.stage < 3:  # which keeps views of the moments, made at the first step otherwise
            self.shared.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def read_moments(self, track: str, read: Read) -> None:
        step = torch.zeros(())
        for name, parameter in self._trained(track):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            moments = {moment: torch.zeros(shape, device=parameter.device) for moment in SHARDED}
            read(f"optimizer/{track}/{name}", {**moments, "step": step})
            for moment, value in moments.items():
                self.deepspeed.utils.safe_set_full_optimizer_state(parameter, value, moment)
        for owner, flat in self._shards():
            if owner == track:
                self.joint.state[flat]["step"].copy_(step)

    def turn(self, track: str) -> None:
        self.joint.track = track
        for name, (_, parameters) in self.optimizers.items():
            for parameter in parameters.values():
                parameter.requires_grad_(name == track)  # what has no gradient is not part of the norm

    def update(self, parts: Parts, clip_norm: float) -> dict[str, Tensor]:
        del parts
        engine, (optimizer, _) = self.shared.engine, self.optimizers[self.joint.track]
        for group in self.joint.param_groups:
            if group["track"] == self.joint.track:
                group["lr"] = optimizer.param_groups[0]["lr"]
        engine.optimizer.clip_grad = clip_norm
        engine.step()  # which leaves the weights alone when the gradient is not finite
        norm = engine.get_global_grad_norm() if engine.was_step_applied() else float("nan")
        return {"gradient_norm": torch.as_tensor(norm)}

    def weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.stage < 3:
            return tensors
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            with self.deepspeed.zero.GatheredParameters([tensor], enabled=isinstance(tensor, nn.Parameter)):
                kept |= _mine(name, tensor)
        return kept

    def moments(self, track: str) -> dict[str, Tensor]:
        step = next(self.joint.state[flat]["step"] for owner, flat in self._shards() if owner == track)
        kept: dict[str, Tensor] = {}
        for name, parameter in self._trained(track):
            kept[f"{name}/step"] = step
            for moment in SHARDED:
                kept |= _mine(f"{name}/{moment}", self.deepspeed.utils.safe_get_full_optimizer_state(parameter, moment))
        return kept

    def _trained(self, track: str) -> Iterator[tuple[str, nn.Parameter]]:
        """A track's parameters by name, switched on: DeepSpeed hides the moments of others."""
        for name, parameter in self.optimizers[track][1].items():
            parameter.requires_grad_()
            yield name, parameter

    def _shards(self) -> Iterator[tuple[str, Tensor]]:
        """This worker's shard of each group of parameters, flat, with the track that it belongs to."""
        zero = self.shared.engine.optimizer
        tracks = [group["track"] for group in self.joint.param_groups]
        if self.stage < 3:
            yield from zip(tracks, zero.single_partition_of_fp32_groups, strict=True)
        else:
            for number, flat in enumerate(zero.fp32_partitioned_groups_flat):
                yield tracks[zero.sub_group_to_group_id[number]], flat


def _mine(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A copy of a gathered tensor on the worker that writes it, nothing on the others."""
    keeper = zlib.crc32(name.encode()) % dist.get_world_size()
    return {name: tensor.detach().to("cpu", copy=True)} if keeper == dist.get_rank() else {}


def _deepspeed(device: str) -> Any:
    os.environ["DS_ACCELERATOR"] = device
    os.environ.setdefault("LOCAL_RANK", "0")  # asked for, and not used where a process group is there
    import deepspeed  # noqa: PLC0415  an extra

    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # of its own calls
    # not to be compiled at run time; all runs of a user without a port would share its memory by name
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed

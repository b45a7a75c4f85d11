"""What is trained, and how: name patterns, adapters, AdamW and its schedule, the average of weights."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from unifork.config import Lora, OptimizerConfig, Track
from unifork.errors import ConfigError, check_extra
from unifork.models.layer_plan import branch_of, seed_of
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import TASKS

Optimizers = Mapping[str, tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]]
"""For each track its optimizer and its parameters by name."""
Parts = Mapping[str, Sequence[nn.Parameter]]
"""Parameters by the part of the model they belong to, for gradient norms."""
Read = Callable[[str, dict[str, Tensor]], None]
"""Fills tensors from those below a part of a checkpoint, such as `optimizer/<track>`."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
NEVER_CALLED = ("lm_head", "image_head.classifier")
"""Linear maps whose weights the losses read, past any adapter."""
UNDER_ADAPTER = ".base_layer."
"""In the names of parameters that have an adapter beside them."""


def add_adapters(model: UniForkModel, lora: Lora | None, seed: int, place: str = "lora", variant: str = "") -> Any:
    """Put adapters beside the linear maps that a stage names, in place. The model computes what it did: B is zero.

    A is drawn as peft does, by (seed, name without the branch). Returns peft's tuner, None without `lora`. Raises
    ConfigError without peft, and when a pattern matches no linear map that is called.
    """
    if lora is None:
        return None
    check_extra("peft", "lora", place)
    from peft import LoraConfig, LoraModel  # noqa: PLC0415  an extra

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    fitting = [name for name in linear if name not in NEVER_CALLED]
    chosen = trainable_names(fitting, lora.modules, f"{place}.modules{variant}", "linear maps that can have adapters")
    exactly = "|".join(map(re.escape, chosen))
    with torch.random.fork_rng(devices=[]), torch.device(model.device):
        tuner = LoraModel(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=exactly), "default")
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    return tuner


def with_adapters(model: UniForkModel, lora: Lora | None, place: str, variant: str = "") -> UniForkModel:
    """A copy of a model on the meta device with a stage's adapters; the model itself where there are none."""
    outline = deepcopy(model) if lora else model
    add_adapters(outline, lora, 0, place, variant)
    return outline


def trained_names(names: Sequence[str], track: Track, place: str, variant: str = "") -> list[str]:
    """The parameters of a model that a track trains: another choice where its plan has no branches for tasks.

    What has an adapter beside it is not among them. place, variant: what an error says. Raises ConfigError when a
    pattern matches nothing.
    """
    names, key = [name for name in names if UNDER_ADAPTER not in name], "trainable"
    if track.without_branches is not None and not any(branch_of(name) in TASKS for name in names):
        key = "without_branches"
    return trainable_names(names, getattr(track, key), f"{place}.{key}{variant}")


def trainable_names(names: Sequence[str], patterns: Iterable[str], place: str, kind: str = "parameters") -> list[str]:
    """Names that match a glob pattern; a pattern starting with `!` takes names out again. kind: what they are of.

    Raises ConfigError when a pattern matches nothing, listing the names nearest to it.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        remove, glob = pattern.startswith("!"), pattern.removeprefix("!")
        matched = [name for name in names if fnmatchcase(name, glob)]
        if not matched:
            near = get_close_matches(glob.replace("*", ""), names, n=4, cutoff=0.3)
            raise ConfigError(
                f"{place}: the pattern {pattern!r} matches none of the {len(names)} {kind}; "
                f"nearest names: {', '.join(near) or ', '.join(names[:4])}"
            )
        chosen = chosen.difference(matched) if remove else chosen.union(matched)
    return [name for name in names if name in chosen]


def freeze_all_but(model: nn.Module, names: Iterable[str]) -> None:
    """Switch gradients on for `names` alone, once for a whole stage.

    What is trained by any track keeps its gradients in all of them: sharding fixes at the start
    which parameters have some. Each track's optimizer then updates its own parameters alone.
    """
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of the update that follows `step` finished ones, out of `steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warm
    through = min(1.0, max(0.0, step + 1 - config.warmup_steps) / max(1, steps - config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1.0 + math.cos(math.pi * through))


def make_optimizer(config: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases, positions) do not.

    Fused: one call for all tensors, on a CPU as well (121 small tensors: 1.0 ms instead of 4.7).
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.learning_rate, betas=config.betas, fused=True)


class Average:
    """The exponential moving average of what a stage trains, in float32; sharded where the weights are (FSDP2).

    Every optimizer step moves the averages of the parameters that its track trains. The decay warms up as in
    TensorFlow's `ExponentialMovingAverage(num_updates)`: a short stage forgets the weights that it began with, too.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        """parameters: those that any track trains, by name."""
        self.decay, self.parameters = decay, parameters
        self.values: dict[str, Tensor] = {}
        """The averages by name, from `start` on."""

    def start(self) -> None:
        """Begin with the weights as they are. Raises ConfigError where DeepSpeed has taken them apart."""
        if any(hasattr(parameter, "ds_tensor") for parameter in self.parameters.values()):
            raise ConfigError("cluster file: ema: not with deepspeed-3, whose weights are in pieces; use fsdp2")
        self.values = {name: p.detach().to(torch.float32, copy=True) for name, p in self.parameters.items()}

    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """After a step of a track that trains `parameters`, counted from 0 over all stages that it extends."""
        averages, weights = [self.values[name] for name in parameters], [p.detach() for p in parameters.values()]
        get_ema_multi_avg_fn(min(self.decay, (1 + step) / (10 + step)))(averages, weights, 0)  # type: ignore[no-untyped-call]

"""The decoder: transformers' own modules, with a forward in which a token chooses its branch.

In: hidden states of packed tokens and a `AttentionContext` (routes, masks, rotary angles, cache). Out: hidden
states. Attention projections, MLP, norms and rotary embedding are those of the dense family (Qwen2
or Llama), so a joint plan is that dense model; nothing of its modelling file is repeated. Every part
is a ModuleDict by branch name, so names carry the branch:
`layers.14.self_attn.generation.q_proj.weight`, `layers.3.mlp.shared.up_proj.weight`.

Which branch a token goes to is a `Route`, an argument of every forward, never a state of a module.
All counts are known before anything reaches the device, so that routing never waits for it; where
tokens already come branch by branch it is slicing. A branch that gets no token is left out, unless the
model is wrapped: what one rank leaves out of the graph makes reduced gradients silently wrong.

`Cache` holds the keys and values of decoding in buffers that stay where they are.

Shape suffixes: B or R rows, T tokens of a row, X = B*T, H hidden size, E head size, G key heads, S keys or slots.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from unifork.batch import NO_DOCUMENT, TEXT, Batch
from unifork.models.layer_plan import BRANCHES, KINDS, Kind, LayerPlan, RouteBy
from unifork.models.masks import Mask

FAMILIES: dict[str, str] = {"qwen2": "Qwen2", "llama": "Llama"}
"""Dense families by transformers' model type, with the prefix of their class names."""

Branch = TypeVar("Branch")
FEW_ROWS, LARGE_WEIGHT = (2, 3), 2**18
"""What `Linear` multiplies the other way round: numbers of rows, and the least number of weights."""


@dataclass(frozen=True, eq=False)
class Route:
    """The way of X tokens into branches. `counts` are tokens per branch, in the order of BRANCHES.

    order_X sorts the tokens by branch and inverse_X puts them back; both are None when the tokens
    already come branch by branch. every: whether branches without tokens are called, too.
    """

    counts: tuple[int, ...]
    order_X: Tensor | None = None
    inverse_X: Tensor | None = None
    every: bool = True

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens (X, ...) as one tensor per branch."""
        ordered = tokens if self.order_X is None else tokens.index_select(0, self.order_X)
        return torch.split(ordered, list(self.counts))

    def parts(self, branches: Mapping[str, Branch], tokens: Tensor) -> Iterator[tuple[str, Branch, Tensor]]:
        """Name, branch and tokens of what is called."""
        for (name, branch), part in zip(branches.items(), self.split(tokens), strict=True):
            if self.every or len(part) or not len(tokens):
                yield name, branch, part

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """One tensor per branch as tokens (X, ...) in their own order; undoes `split`."""
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return joined if self.inverse_X is None else joined.index_select(0, self.inverse_X)


Routes = Mapping[RouteBy, Route]
"""One route for everything a plan may route by."""


def routed(
    branches: Mapping[str, Branch], route: Route, apply: Callable[[Branch, Tensor], Tensor], tokens: Tensor
) -> Tensor:
    """Apply each branch to its own tokens (X, ...) and put the results back in place."""
    return route.join([apply(branch, part) for _, branch, part in route.parts(branches, tokens)])


def gathered(branches_X: Tensor, counts: tuple[int, ...]) -> Route:
    """A route from the branch number of each token, on whatever device they are."""
    order_X = torch.argsort(branches_X, stable=True)
    inverse_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    return Route(counts, order_X, inverse_X)


def uniform(tokens: int, branch: int, branches: int) -> Route:
    """A route of tokens that all go to the same branch."""
    return Route(tuple(tokens if number == branch else 0 for number in range(branches)), every=False)


def by_modality(batch: Batch) -> Batch:
    """The tokens of packed rows as one row that is sorted by modality, so that routes by modality are slices."""
    route = gathered(modalities(batch.kinds_BT).flatten(), batch.modality_counts)
    places: Any = (route.order_X, route.inverse_X)
    tokens = ("text_ids_BT", "kinds_BT", "documents_BT", "positions_BT", "tasks_BT")
    moved: dict[str, Any] = {name: getattr(batch, name).take(places[0])[None] for name in tokens}
    for name in ("image_index_N", "text_source_S", "image_source_M"):
        moved[name] = places[1][getattr(batch, name)]
    return replace(batch, places=places, tasks_grouped=False, **moved)


def batch_routes(batch: Batch, needed: frozenset[RouteBy], every: bool = True) -> Routes:
    """The routes of packed rows, as far as a plan needs them. every: see `Route`."""
    routes: dict[RouteBy, Route] = {"none": uniform(batch.kinds_BT.numel(), 0, 1)}
    if "task" in needed:
        slices = batch.tasks_grouped
        routes["task"] = Route(batch.task_counts) if slices else gathered(batch.tasks_BT.flatten(), batch.task_counts)
    if "modality" in needed:
        counts, grouped = batch.modality_counts, batch.places is not None
        routes["modality"] = Route(counts) if grouped else gathered(modalities(batch.kinds_BT).flatten(), counts)
    return {name: replace(route, every=every) for name, route in routes.items()}


def step_routes(tokens: int, task: int, modality: int) -> Routes:
    """The routes of one decoding step: every token is of the same task and the same modality."""
    chosen: dict[RouteBy, int] = {"none": 0, "task": task, "modality": modality}
    return {route: uniform(tokens, branch, len(BRANCHES[route])) for route, branch in chosen.items()}


def modalities(kinds: Tensor) -> Tensor:
    """Index into MODALITIES of each token; begin and end of image belong to the image."""
    return (kinds != TEXT).long()


@dataclass(frozen=True)
class Family:
    """What one dense family is composed of."""

    attention: Callable[..., nn.Module]
    mlp: Callable[..., nn.Module]
    rotary: Callable[..., nn.Module]
    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager_attention: Callable[..., Any]


def family(model_type: str) -> Family:
    """The parts of a dense family of FAMILIES."""
    modeling = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    prefix = FAMILIES[model_type]
    attention, mlp, rotary = (getattr(modeling, prefix + part) for part in ("Attention", "MLP", "RotaryEmbedding"))
    return Family(attention, mlp, rotary, modeling.apply_rotary_pos_emb, modeling.eager_attention_forward)


@dataclass(eq=False)
class Cache:
    """What decoding has read so far: R rows of S slots, the same slot for the next token of every row.

    Nothing is moved when tokens are read, and where they go is on the device, so a step can be captured.
    """

    keys: list[Tensor]
    """(R, G, S, E) of each layer; values likewise."""
    values: list[Tensor]
    documents_RS: Tensor
    """NO_DOCUMENT in slots of padding and in those that nothing was read into; `step`s do not update it."""
    modalities_RS: Tensor
    lengths_R: Tensor
    """Tokens of each row without padding, which is also the next rotary position."""
    slots_T: Tensor
    """Where the tokens go that are being read."""
    filled: int = 0
    """Slots in use."""
    reach: int = 0
    """Slots that attention looks at."""

    @classmethod
    def empty(cls, layers: int, shape: tuple[int, int, int, int], like: Tensor) -> "Cache":
        """Room for (R, G, S, E) keys and as many values a layer, with the dtype and on the device of `like`."""
        # zeros, since what is masked is multiplied by nothing and must be a number
        keys, values = ([like.new_zeros(shape) for _ in range(layers)] for _ in range(2))
        R, S = shape[0], shape[2]
        numbers_RS = torch.full((R, S), NO_DOCUMENT, device=like.device)
        return cls(keys, values, numbers_RS, numbers_RS.clone(), numbers_RS.new_zeros(R), numbers_RS.new_zeros(1))

    def spread(self, rows_R: Tensor, slots: int) -> "Cache":
        """A cache of these rows, any of them many times over, with free slots behind what was read."""
        shape = (len(rows_R), self.keys[0].shape[1], self.filled + slots, self.keys[0].shape[3])
        wider = Cache.empty(len(self.keys), shape, self.keys[0])
        wider.filled, wider.lengths_R = self.filled, self.lengths_R[rows_R]
        for new, old in zip([*wider.keys, *wider.values], [*self.keys, *self.values], strict=True):
            new[:, :, : self.filled] = old[rows_R, :, : self.filled]
        wider.documents_RS[:, : self.filled] = self.documents_RS[rows_R, : self.filled]
        wider.modalities_RS[:, : self.filled] = self.modalities_RS[rows_R, : self.filled]
        return wider

    def extend(self, documents_RT: Tensor, modalities_RT: Tensor) -> None:
        """Give the next T slots to tokens that are about to be read."""
        start, self.filled = self.filled, self.filled + documents_RT.shape[1]
        self.documents_RS[:, start : self.filled] = documents_RT
        self.modalities_RS[:, start : self.filled] = modalities_RT
        self.lengths_R += (documents_RT != NO_DOCUMENT).sum(1)
        self.slots_T = torch.arange(start, self.filled, device=documents_RT.device)
        self.reach = self.filled

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write what a layer computed of the new tokens; returns all keys and values within reach."""
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            stored.index_copy_(2, self.slots_T, new)
        return self.keys[layer][:, :, : self.reach], self.values[layer][:, :, : self.reach]


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Everything a block needs to know about the tokens it is given."""

    routes: Routes
    masks: Mapping[RouteBy, Mask]
    """By the route that attention is isolated by; `none` where it is not."""
    cos_BTE: Tensor
    sin_BTE: Tensor
    attention: str
    """Name of transformers' attention implementation."""
    cache: Cache | None = None


class Block(nn.Module):
    """One decoder layer of a given kind."""

    def __init__(self, name: str, config: PreTrainedConfig, index: int, parts: Family) -> None:
        super().__init__()
        kind = KINDS[name]
        attention, mlp = BRANCHES[kind.route_of("attention")], BRANCHES[kind.route_of("mlp")]
        self.kind, self.kind_name = kind, name
        self.index = index
        self.parts = parts
        self.activation_checkpointing = False
        self.input_layernorm = norms(attention, config)
        self.self_attn = nn.ModuleDict({branch: parts.attention(config, index) for branch in attention})
        self.post_attention_layernorm = norms(mlp, config)
        self.mlp = nn.ModuleDict({branch: parts.mlp(config) for branch in mlp})

    def forward(self, x_XH: Tensor, reading: AttentionContext) -> Tensor:
        """Hidden states after the layer; recomputed in the backward pass if so switched."""
        if self.activation_checkpointing and torch.is_grad_enabled() and reading.cache is None:
            # inside the module, so that hooks around it (sharding) run once; nothing here is random
            return cast(Tensor, checkpoint(self._layer, x_XH, reading, use_reentrant=False, preserve_rng_state=False))
        return self._layer(x_XH, reading)

    def _layer(self, x_XH: Tensor, reading: AttentionContext) -> Tensor:
        x_XH = x_XH + self._attend(x_XH, reading)
        branches = {name: (self.post_attention_layernorm[name], mlp) for name, mlp in self.mlp.items()}
        route = reading.routes[self.kind.route_of("mlp")]
        return x_XH + routed(branches, route, lambda branch, part: branch[1](branch[0](part)), x_XH)

    def _attend(self, x_XH: Tensor, reading: AttentionContext) -> Tensor:
        route = reading.routes[self.kind.route_of("attention")]
        attentions: dict[str, Any] = dict(self.self_attn.items())
        parts = route.parts(attentions, x_XH)
        projected = [_project(attention, self.input_layernorm[name](part)) for name, attention, part in parts]
        module = next(iter(attentions.values()))
        B, T, E = *reading.cos_BTE.shape[:2], module.head_dim
        query, key, value = (
            route.join(part).view(B, T, -1, E).transpose(1, 2) for part in zip(*projected, strict=True)
        )
        query, key = self.parts.rotate(query, key, reading.cos_BTE, reading.sin_BTE)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if reading.cache is not None:
            key, value = reading.cache.update(self.index, key, value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(reading.attention, self.parts.eager_attention)
        mask = reading.masks[isolated_by(self.kind)]
        attended, _ = attend(module, query, key, value, mask, dropout=0.0, scaling=module.scaling)
        attended_XE = attended.reshape(B * T, -1)
        return routed(attentions, route, lambda attention, part: attention.o_proj(part), attended_XE)


def _project(attention: Any, x_XH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attention.q_proj(x_XH), attention.k_proj(x_XH), attention.v_proj(x_XH)


def norms(branches: tuple[str, ...], config: PreTrainedConfig) -> nn.ModuleDict:
    """One RMSNorm of the hidden size per branch: the families' own function in one kernel, where a device has it."""
    return nn.ModuleDict({branch: nn.RMSNorm(config.hidden_size, config.rms_norm_eps) for branch in branches})


class Linear(nn.Linear):
    """A linear map that a CPU takes the other way round in float32 when a large weight meets two or three rows.

    One image with guidance is two rows. Rows times weight takes MKL longer there than weight times rows, on an AMD EPYC
    (docs/performance.md); small weights and other numbers of rows are better as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Outputs (..., O) of inputs (..., I)."""
        rows, usual = input.numel() // self.in_features, torch.is_grad_enabled() or self.weight.numel() < LARGE_WEIGHT
        if usual or rows not in FEW_ROWS or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        output_OR = self.weight @ input.reshape(rows, -1).t()
        output_RO = output_OR.t() if self.bias is None else output_OR.t() + self.bias
        return output_RO.reshape(*input.shape[:-1], -1)


def isolated_by(kind: Kind) -> RouteBy:
    """Which mask a layer of this kind uses."""
    return kind.route if kind.isolated else "none"


def routes_of(plan: LayerPlan) -> frozenset[RouteBy]:
    """Everything a plan routes by."""
    parts = {kind.route_of(part) for kind in plan.kinds for part in ("attention", "mlp")}
    return frozenset(parts | {plan.norm_route})


def masks_of(plan: LayerPlan) -> frozenset[RouteBy]:
    """The masks a plan needs."""
    return frozenset(isolated_by(kind) for kind in plan.kinds)

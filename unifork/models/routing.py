"""Which branch a token goes to, and how tokens get there and back.

In: a packed `Batch`, or a number of tokens that all go the same way. Out: a `Route`, an argument of
every forward, never a state of a module. All counts are known before anything reaches the device,
so that routing never waits for it; where tokens already come branch by branch it is slicing.

Every branch is called even when it gets no token: a branch that one rank leaves out of the graph
makes sharded gradients silently wrong.

Shape suffixes: X tokens of a batch, flattened (B*T).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from unifork.batch import TEXT, Batch
from unifork.models.layer_plan import BRANCHES, RouteBy

Branch = TypeVar("Branch")


@dataclass(frozen=True, eq=False)
class Route:
    """The way of X tokens into branches. `counts` are tokens per branch, in the order of BRANCHES.

    order_X sorts the tokens by branch and inverse_X puts them back; both are None when the tokens
    already come branch by branch.
    """

    counts: tuple[int, ...]
    order_X: Tensor | None = None
    inverse_X: Tensor | None = None

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Tokens (X, ...) as one tensor per branch."""
        ordered = tokens if self.order_X is None else tokens.index_select(0, self.order_X)
        return torch.split(ordered, list(self.counts))

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
    return route.join(
        [apply(branch, part) for branch, part in zip(branches.values(), route.split(tokens), strict=True)]
    )


def gathered(branches_X: Tensor, counts: tuple[int, ...]) -> Route:
    """A route from the branch number of each token, on whatever device they are."""
    order_X = torch.argsort(branches_X, stable=True)
    inverse_X = torch.empty_like(order_X).scatter_(0, order_X, torch.arange(len(order_X), device=order_X.device))
    return Route(counts, order_X, inverse_X)


def uniform(tokens: int, branch: int, branches: int) -> Route:
    """A route of tokens that all go to the same branch."""
    return Route(tuple(tokens if number == branch else 0 for number in range(branches)))


def batch_routes(batch: Batch, needed: frozenset[RouteBy]) -> Routes:
    """The routes of packed rows, as far as a plan needs them."""
    routes: dict[RouteBy, Route] = {"none": uniform(batch.kinds_BT.numel(), 0, 1)}
    if "task" in needed:
        slices = batch.tasks_grouped
        routes["task"] = Route(batch.task_counts) if slices else gathered(batch.tasks_BT.flatten(), batch.task_counts)
    if "modality" in needed:
        routes["modality"] = gathered(modalities(batch.kinds_BT).flatten(), batch.modality_counts)
    return routes


def step_routes(tokens: int, task: int, modality: int) -> Routes:
    """The routes of one decoding step: every token is of the same task and the same modality."""
    return {
        "none": uniform(tokens, 0, 1),
        "task": uniform(tokens, task, len(BRANCHES["task"])),
        "modality": uniform(tokens, modality, len(BRANCHES["modality"])),
    }


def modalities(kinds: Tensor) -> Tensor:
    """Index into MODALITIES of each token; begin and end of image belong to the image."""
    return (kinds != TEXT).long()

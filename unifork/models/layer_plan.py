"""Architectures as data: what every layer shares between tasks or modalities, and what it does not.

In: a plan such as `shared*12 task*12 norm:task` or `(shared modality_mlp)*12`, or the name of one
such as `unifork:12`. Out: a `LayerPlan`, the kind of every layer, first to last. In a decoder block
everything but the attention product is position-wise, so a kind says three things only: by what
tokens are routed, which position-wise parts have a copy per branch, and whether attention stays
within a branch. Several consecutive equal layers are written once with their number; a group in
parentheses may be repeated, not nested. One item may be repeated `*rest` times: it fills the layers
that are left, the last group cut short where they do not divide.

A tensor of a part that has copies carries the name of its branch.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, cycle, groupby, islice
from pathlib import Path
from typing import Literal, Self

from unifork.config import read_yaml
from unifork.errors import ConfigError, one_of, unknown
from unifork.vocabulary import MODALITIES, TASKS

RouteBy = Literal["none", "task", "modality"]
BlockPart = Literal["attention", "mlp"]

BRANCHES: dict[RouteBy, tuple[str, ...]] = {"none": ("shared",), "task": TASKS, "modality": MODALITIES}
"""Names of the copies of a part, in the order of the route's branch numbers."""
_NAMES = "|".join(branch for branches in BRANCHES.values() for branch in branches)
_BRANCH = re.compile(rf"^(layers\.\d+\.\w+|norm)\.({_NAMES})\.")


@dataclass(frozen=True)
class Kind:
    """What one layer does. `attention` includes the norm before it, `mlp` the norm before that."""

    route: RouteBy
    split: Sequence[BlockPart] = ()
    isolated: bool = False

    def route_of(self, part: BlockPart) -> RouteBy:
        """By what the tokens of a part are routed; parts that are not split see all tokens alike."""
        return self.route if part in self.split else "none"


_PLANS = read_yaml(Path(__file__).with_name("plans.yaml"))
KINDS = {name: Kind(**plain) for name, plain in _PLANS["kinds"].items()}
NORMS: dict[str, RouteBy] = _PLANS["norms"]
"""How `norm:` routes the norm after the last layer."""
PRESETS: dict[str, str] = _PLANS["presets"]
"""Plans of the comparison by name; capitals stand for numbers of layers."""

_ITEM = re.compile(r"\((?P<group>[^()]*)\)\s*\*\s*(?P<times>\d+|rest)|norm:(?P<norm>\S+)|(?P<run>[^\s()]+)")
_WORD = re.compile(r"(?!norm:)[\w-]+(:[\w-]*)*")
_RUN = re.compile(r"(?P<kind>[^\s*]+)(?:\*(?P<times>\d+|rest))?")


@dataclass(frozen=True)
class LayerPlan:
    """The kind of every layer by name, and how the final norm is routed."""

    layers: tuple[str, ...]
    norm: str = "shared"

    @classmethod
    def parse(cls, text: str, num_hidden_layers: int | None = None) -> Self:
        """The plan a text describes. Raises ConfigError when it is malformed or of another depth."""
        place = f"layer plan {text!r}"
        written = _expanded(text.strip(), place)
        if rest := _ITEM.sub("", written).strip():
            raise ConfigError(f"{place}: cannot read {rest!r}; write kind*number, (kind kind)*number or norm:route")
        items = list(_ITEM.finditer(written))
        norms = [item["norm"] for item in items if item["norm"]]
        for norm in norms:
            one_of("norm route", norm, NORMS, place)
        if len(norms) > 1:
            raise ConfigError(f"{place}: says norm: {len(norms)} times; once is enough")
        layers = _filled([_repeated(item, place) for item in items if not item["norm"]], num_hidden_layers, place)
        if not layers:
            raise ConfigError(f"{place}: has no layers. Known kinds: {', '.join(sorted(KINDS))}")
        if num_hidden_layers is not None and len(layers) != num_hidden_layers:
            raise ConfigError(f"{place}: has {len(layers)} layers, the backbone num_hidden_layers={num_hidden_layers}")
        return cls(tuple(layers), *norms)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What every layer does."""
        return tuple(KINDS[layer] for layer in self.layers)

    @property
    def norm_route(self) -> RouteBy:
        """By what the final norm routes."""
        return NORMS[self.norm]

    def __str__(self) -> str:
        """The plan without groups, equal neighbours counted; parses back to an equal plan."""
        counted = [(kind, len(list(run))) for kind, run in groupby(self.layers)]
        items = [kind if times == 1 else f"{kind}*{times}" for kind, times in counted]
        return " ".join(items + [f"norm:{self.norm}"] * (self.norm != "shared"))


_Repeated = tuple[list[str], str]
"""Kinds and how often they are repeated; `rest` fills the layers that are left."""


def _expanded(text: str, place: str) -> str:
    """The plan a preset stands for; any other text as it is."""
    name, *numbers = text.split(":")
    spellings = {spelling.split(":")[0]: spelling for spelling in PRESETS}
    if name not in spellings:
        if _WORD.fullmatch(text) and text not in KINDS:
            raise unknown("preset or layer kind", name, {*PRESETS, *KINDS}, place)
        return text
    parameters = spellings[name].split(":")[1:]
    if len(numbers) != len(parameters) or not all(map(str.isdecimal, numbers)):
        raise ConfigError(f"{place}: write {spellings[name]}" + " with whole numbers of layers" * bool(parameters))
    return PRESETS[spellings[name]].format(**dict(zip(parameters, numbers, strict=True)))


def _repeated(item: re.Match[str], place: str) -> _Repeated:
    if item["run"]:
        return _run(item["run"], place)
    runs = [_run(text, place) for text in item["group"].split()]
    if any(times == "rest" for _, times in runs):
        raise ConfigError(f"{place}: *rest inside a group; a group as a whole may be repeated *rest")
    return [kind for kinds, times in runs for kind in kinds * int(times)], item["times"]


def _run(text: str, place: str) -> _Repeated:
    """One kind of a plan, repeated or not."""
    match = _RUN.fullmatch(text)
    if match is None:
        raise ConfigError(f"{place}: cannot read {text!r}; write kind*number with a whole number")
    return [one_of("layer kind", match["kind"], KINDS, place)], match["times"] or "1"


def _filled(items: list[_Repeated], num_hidden_layers: int | None, place: str) -> list[str]:
    """Every layer of the items, `*rest` resolved."""
    open_ends = sum(times == "rest" for _, times in items)
    if open_ends > 1:
        raise ConfigError(f"{place}: says *rest twice")
    if open_ends and num_hidden_layers is None:
        raise ConfigError(f"{place}: *rest needs the number of layers of the backbone")
    written = sum(len(kinds) * int(times) for kinds, times in items if times != "rest")
    left = max(0, (num_hidden_layers or 0) - written)
    filled = (islice(cycle(kinds), left) if times == "rest" else kinds * int(times) for kinds, times in items)
    return list(chain.from_iterable(filled))


# ------------------------------------------------------------------------------------ names of tensors


def without_branch(name: str) -> str:
    """A tensor's name as a dense model would have it: `norm.generation.weight` -> `norm.weight`."""
    return _BRANCH.sub(r"\1.", name)


def branch_of(name: str) -> str | None:
    """The branch a tensor's name carries: `norm.generation.weight` -> `generation`; None without any."""
    found = _BRANCH.match(name)
    return found[2] if found else None


def seed_of(seed: int, name: str) -> int:
    """What a parameter is drawn with, by (seed, name without the branch): copies of a part start equal."""
    digest = hashlib.sha256(f"{seed} {without_branch(name)}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)

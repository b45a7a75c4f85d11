"""What experiments, variants and stages take from others, written out.

In: the plain data of files. Out: the same without `extends`, `like` and what stages leave to those that they extend.
An experiment that says `extends: OTHER` says only what differs; `null` takes an entry out, and a tokenizer that is
imported replaces the inherited one whole. A variant that says `like: OTHER` is that variant but for its own keys.
"""

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from unifork.config import Stage, parse, read_yaml
from unifork.errors import ConfigError, one_of, unknown

IMPORT, LIKE, EXTEND = "import", "like", "extend"
WORDS = {LIKE: ("variant", "is like"), EXTEND: ("stage", "extends")}
"""What says so, and what it then does."""


def inherited(name: str, folder: Path, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """An experiment with all that it takes from the one it extends. Raises ConfigError where there is none."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise unknown("experiment", name, (p.stem for p in folder.glob("*.yaml")), str(folder))
    if name in heirs:
        raise ConfigError(f"{path}: extends itself by way of {' -> '.join((*heirs, name))}")
    plain = dict(read_yaml(path))
    parent = plain.pop("extends", None)
    return merged(inherited(parent, folder, (*heirs, name)), plain) if parent else plain


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Plain data with changes: values replace values, mappings are merged, None takes a key out."""
    found = dict(base)
    for key, value in over.items():
        if value is None:
            found.pop(key, None)
        elif isinstance(value, dict) and isinstance(found.get(key), dict) and IMPORT not in value:
            found[key] = merged(found[key], value)
        else:
            found[key] = value
    return found


def alike(variants: dict[str, Any], place: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Variants with all that they take from those they are `like`, and for each of them the one where that ends."""
    found, roots = dict(variants), {name: name for name in variants}
    for name, other in _bases(variants, LIKE, place):
        own = {key: value for key, value in variants[name].items() if key != LIKE}
        found[name], roots[name] = merged(found[other], own), roots[other]
    return found, roots


def extended(stages: dict[str, Any], place: str) -> dict[str, Any]:
    """Stages with all that they take from those they extend, which have warmed up."""
    found = dict(stages)
    for name, base in _bases(stages, EXTEND, place):
        plain = parse(Stage, found[base], place, f"stages.{base}").model_dump(mode="json")
        for track in plain["tracks"].values():
            track["optimizer"]["warmup_steps"] = 0
        found[name] = merged(plain, stages[name])
    return found


def _bases(parts: dict[str, Any], key: str, place: str) -> Iterator[tuple[str, str]]:
    """Parts that name another under a key, with its name, each behind the one that it takes from."""
    what, does = WORDS[key]
    bases = {name: str(own[key]) for name, own in parts.items() if isinstance(own, dict) and key in own}
    for name, base in bases.items():
        one_of(what, base, parts, f"{place}: {what}s.{name}.{key}")
    try:
        order = [*TopologicalSorter({name: [base] for name, base in bases.items()}).static_order()]
    except CycleError as error:
        circle = error.args[1][::-1]
        where = f"{place}: {what}s.{circle[0]}.{key}"
        raise ConfigError(f"{where}: it {does} itself by way of {' -> '.join(circle)}") from None
    return ((name, bases[name]) for name in order if name in bases)

"""What experiments, variants and stages take from others, written out.

In: the plain data of files. Out: the same without `extends`, `like` and what stages leave to those that they extend.
An experiment that says `extends: OTHER` says only what differs; `null` takes an entry out, and a tokenizer that is
imported replaces the inherited one whole. A variant that says `like: OTHER` is that variant but for its own keys.
"""

from functools import reduce
from pathlib import Path
from typing import Any

from unifork.config import Stage, parse, read_yaml
from unifork.errors import ConfigError, one_of, unknown

IMPORT, LIKE = "import", "like"


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
    chains = {name: _chain(name, variants, place) for name in variants}
    found = {
        name: reduce(merged, ({key: value for key, value in variants[other].items() if key != LIKE} for other in chain))
        if len(chain) > 1
        else variants[name]
        for name, chain in chains.items()
    }
    return found, {name: chain[0] for name, chain in chains.items()}


def _chain(name: str, variants: dict[str, Any], place: str, heirs: tuple[str, ...] = ()) -> tuple[str, ...]:
    """A variant after the one that it is like, after the one that this is like, and so on."""
    own, heirs = variants[name], (*heirs, name)
    if not isinstance(own, dict) or LIKE not in own:
        return (name,)
    other, where = str(own[LIKE]), f"{place}: variants.{name}.{LIKE}"
    one_of("variant", other, variants, where)
    if other in heirs:
        raise ConfigError(f"{where}: it is like itself by way of {' -> '.join((*heirs, other))}")
    return (*_chain(other, variants, place, heirs), name)


def extended(name: str, stages: dict[str, Any], place: str, heirs: tuple[str, ...] = ()) -> Any:
    """A stage with all that it takes from the one it extends, which has warmed up."""
    over, heirs = stages[name], (*heirs, name)
    if not isinstance(over, dict) or "extend" not in over:
        return over
    if (base := str(over["extend"])) not in stages:
        raise unknown("stage", base, stages, f"{place}: stages.{name}.extend")
    if base in heirs:
        raise ConfigError(f"{place}: stages.{name}: extends itself by way of {' -> '.join((*heirs, base))}")
    typed = parse(Stage, extended(base, stages, place, heirs), place, f"stages.{base}")
    plain = typed.model_dump(mode="json")
    for track in plain["tracks"].values():
        track["optimizer"]["warmup_steps"] = 0
    return merged(plain, over)

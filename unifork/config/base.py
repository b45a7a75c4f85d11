"""Typed plain data: frozen, unknown keys refused, errors that name file, key, value and rule."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from unifork.errors import ConfigError, unknown

UNKNOWN_KEY = "unknown_key"
RENAMED = {"hops": "jobs", "licence": "license", "quantise_from_step": "quantize_from_step"}
"""Keys that had another name before."""
ALLOWED = {
    "int": "whole number", "float": "number", "bool": "true or false", "string": "text in quotes", "list": "list",
    "tuple": "list", "dict": "keys and values", "model": "keys and values",
}  # fmt: skip
"""Pydantic's names of types, and what to write."""
Fraction01 = Annotated[float, Field(ge=0.0, le=1.0)]


class StrictModel(BaseModel):
    """Base of every configuration: plain data, frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _name_the_known_keys(cls, values: Any) -> Any:
        """Say of an unknown key which ones there are; `extra` alone would only say that it is one too many."""
        if not isinstance(values, dict) or cls.model_config.get("extra") != "forbid":
            return values
        keys = {field.alias or name for name, field in cls.model_fields.items()}
        for key in values:
            if key not in keys:
                now = RENAMED.get(str(key))
                problem = f"the key {key!r} is called {now!r} now" if now in keys else unknown("key", str(key), keys)
                raise PydanticCustomError(UNKNOWN_KEY, "{problem}", {"problem": str(problem)})
        return values

    def fingerprint(self) -> str:
        """A short hash of all values, stable across processes and machines."""
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(plain: Any) -> str:
    """Sixteen hex digits of the SHA-256 of plain data written as canonical JSON."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Config = TypeVar("Config", bound=StrictModel)


def read_yaml(path: Path | str) -> Any:
    """The plain data of a YAML file. Raises ConfigError when it is missing or malformed."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{place}: not valid YAML: {problem}") from None


def load(model: type[Config], path: Path | str) -> Config:
    """A YAML file as a typed configuration. Raises ConfigError naming file, key, value and rule."""
    return parse(model, read_yaml(path), str(path))


def load_named(model: type[Config], what: str, name: str, folder: Path) -> Config:
    """The file `name` of a folder, whose key `name` says the same. Raises ConfigError. what: it is, in words."""
    path = folder / f"{name}.yaml"
    if not path.exists():
        raise unknown(what, name, (p.stem for p in folder.glob("*.yaml")), str(folder))
    found = load(model, path)
    if (own := dict(found)["name"]) != name:
        raise ConfigError(f"{path}: name is {own!r}, but the file is called {name!r}")
    return found


def parse(model: type[Config], plain: Any, place: str, inside: str = "") -> Config:
    """StrictModel data as a typed configuration. Raises ConfigError naming place, key, value and rule.

    inside: the key of the place that holds the data, such as `source.options`, without it the data is the whole.
    """
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{place}: {'; '.join(_faults(error, plain, inside))}") from None


def _faults(error: ValidationError, plain: Any, inside: str) -> list[str]:
    """What is wrong, entry by entry: its value and what that is where another type is allowed, else value and rule."""
    types: dict[str, tuple[Any, list[str]]] = {}
    rules: dict[str, list[str]] = {}
    for fault in error.errors():
        value, kind = fault["input"], fault["type"]
        key = ".".join(filter(None, [inside, *_keys(plain, fault["loc"], kind)])) or "(top)"
        if kind.endswith(("_type", "_parsing", "_from_float")) and (named := ALLOWED.get(kind.partition("_")[0])):
            types.setdefault(key, (value, []))[1].append(named)
        else:
            shown = "" if kind in (UNKNOWN_KEY, "missing") else f" (got {value!r:.80})"
            rules.setdefault(key, []).append(f"{key}: {fault['msg']}{shown}")
    for key, (value, allowed) in types.items():
        right = key in rules or any(other.startswith(f"{key}.") for other in (*types, *rules))
        if not right:  # as another of the types that are allowed
            found = type(value).__name__
            what = "is empty" if value is None else f"{value!r:.80} is a{'n' * (found[0] in 'aeiou')} {found}"
            rules.setdefault(key, []).append(f"{key}: {what}, allowed: {' or '.join(dict.fromkeys(allowed))}")
    return [text for texts in rules.values() for text in texts]


def _keys(plain: Any, place: Sequence[int | str], kind: str) -> list[str]:
    """The keys on the way to a fault. Pydantic names the types that it tried among them; ours stand in parentheses."""
    keys = []
    for key in place:
        listed = isinstance(plain, Sequence) and isinstance(key, int) and key < len(plain)
        if listed or (isinstance(plain, Mapping) and key in plain):
            plain = plain[key]
            keys.append(str(key))
        elif (kind == "missing" and key is place[-1]) or str(key).startswith("("):
            keys.append(str(key))
    return keys

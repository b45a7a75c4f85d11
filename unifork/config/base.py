"""Typed plain data: frozen, unknown keys refused, errors that name file, key, value and rule."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from unifork.errors import ConfigError, unknown

UNKNOWN_KEY = "unknown_key"
Fraction01 = Annotated[float, Field(ge=0.0, le=1.0)]


class Plain(BaseModel):
    """Base of every configuration: plain data, frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _keys_are_known(cls, plain: Any) -> Any:
        known = {field.alias or name for name, field in cls.model_fields.items()}
        strict = isinstance(plain, dict) and cls.model_config["extra"] == "forbid"
        if strict and (wrong := plain.keys() - known):
            raise PydanticCustomError(UNKNOWN_KEY, "unknown keys", {"keys": sorted(map(str, wrong)), "known": known})
        return plain

    def fingerprint(self) -> str:
        """A short hash of all values, stable across processes and machines."""
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(plain: Any) -> str:
    """Sixteen hex digits of the SHA-256 of plain data written as canonical JSON."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Config = TypeVar("Config", bound=Plain)


def read_yaml(path: Path | str) -> Any:
    """The plain data of a YAML file. Raises ConfigError when it is missing or malformed."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


def load(model: type[Config], path: Path | str) -> Config:
    """A YAML file as a typed configuration. Raises ConfigError naming file, key, value and rule."""
    return parse(model, read_yaml(path), str(path))


def parse(model: type[Config], plain: Any, place: str) -> Config:
    """Plain data as a typed configuration. Raises ConfigError naming place, key, value and rule."""
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        raise ConfigError(f"{place}: {'; '.join(one for fault in error.errors() for one in _said(fault))}") from None


def _said(fault: ErrorDetails) -> list[str]:
    """A fault in one line, or several unknown keys in one each."""
    place = ".".join(map(str, fault["loc"])) or "(top)"
    if fault["type"] == UNKNOWN_KEY:
        return [str(unknown("key", key, fault["ctx"]["known"], place)) for key in fault["ctx"]["keys"]]
    return [f"{place}: {fault['msg']} (got {fault['input']!r:.80})"]

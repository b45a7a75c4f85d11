"""What analyses leave behind, for those who write it and those who show it."""

from typing import Any

from typing_extensions import TypedDict

from unifork.vocabulary import Task


class Curve(TypedDict):
    """The alignment of every state, from the input of the first layer on."""

    score: list[float]
    standard_error: list[float]
    chance: list[float]
    chance_low: list[float]
    chance_high: list[float]


class Alignment(TypedDict):
    """What `alignment.json` has beside the model and the choices."""

    prompts: int
    prompts_hash: str
    sampling: dict[str, Any]
    fixed: dict[str, str]
    fork: int | None
    """The first layer that exists for each task."""
    curves: dict[Task, Curve]
    bag_of_words: dict[Task, float]
    untrained: dict[Task, Curve]
    """Empty without a control."""


class Conflict(TypedDict):
    """Of one matrix: both cosines, and the halves' less that of the kinds."""

    similarity: float
    baseline: float
    conflict: float


class Conflicts(TypedDict):
    """What `conflict.json` has beside the model and the choices."""

    documents: dict[str, int]
    """By kind."""
    loss: str
    matrices: dict[str, Conflict]
    """By the name of the weight."""

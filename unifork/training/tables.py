"""Rows of the tables that a run writes while it trains, for those who write them and those who read them."""

from typing_extensions import TypedDict


class Step(TypedDict):
    """One step: a row of `history.jsonl` and `history.csv`, with losses, norms and documents of parts beside these."""

    track: str
    step: int
    learning_rate: float
    tokens: int
    fill: float
    documents_hash: str


class HeldOutPart(TypedDict):
    """A part of a mixture on held-out documents: a row of `validation.jsonl` and `validation.csv`, with losses."""

    finished_steps: int
    track: str
    part: str
    dataset: str
    task: str
    documents: int


class Rate(TypedDict):
    """How fast the steps since the row before were, which no two runs repeat: a row of `rates.jsonl`."""

    finished_steps: int
    documents_per_second: float
    tokens_per_second: float
    memory_gib: float
    """`peak_memory` so far."""

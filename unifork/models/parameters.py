"""How many parameters a model has, part by part, and which task uses them; nothing is allocated.

The paper names three sums without saying what they hold (0.5B, 0.76B, 1.21B; implementation details).
The official tensors give them as follows: understanding with the embeddings; generation without
them, with the image head; a total in which the text head counts although it is tied to the
embeddings. None holds the connector.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from unifork.models.configuration import UniForkConfig
from unifork.models.layer_plan import BRANCHES, branch_of
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import TASKS, Task

EMBEDDINGS, TEXT_HEAD, CONNECTOR, IMAGE_HEAD = "embed_tokens", "lm_head", "connector", "image_head"
_TASKS: dict[str, tuple[Task, ...]] = {TEXT_HEAD: ("understanding",), IMAGE_HEAD: ("generation",)}
"""Parts that only one task uses and so trains; branches by task are named after theirs."""


@dataclass(frozen=True)
class ModelPart:
    """One part of a model. `parameters` is 0 where all of them are tied to another part."""

    name: str
    parameters: int
    tasks: tuple[Task, ...]
    """The tasks whose tokens pass through it: those that train it, unless a stage freezes it."""


def parts(config: UniForkConfig) -> list[ModelPart]:
    """The parts of a model, in the order of its names. The codebook is no parameter and not among them."""
    with torch.device("meta"):
        model = UniForkModel(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_part_of(name)] += parameter.numel()
    counts.setdefault(TEXT_HEAD, 0)
    return [ModelPart(name, count, _tasks_of(name)) for name, count in counts.items()]


def paper_counts(config: UniForkConfig) -> dict[str, int]:
    """Parameters as the paper counts them: `understanding`, `generation`, `total`."""
    by_name = {part.name: part for part in parts(config)}
    embeddings, head = by_name[EMBEDDINGS].parameters, by_name[IMAGE_HEAD].parameters
    decoder = [part for name, part in by_name.items() if name.partition(" ")[0] in ("layers", "norm")]
    passed = {task: sum(part.parameters for part in decoder if task in part.tasks) for task in TASKS}
    return {
        "understanding": embeddings + passed["understanding"],
        "generation": passed["generation"] + head,
        "total": embeddings + (by_name[TEXT_HEAD].parameters or embeddings) + sum(p.parameters for p in decoder) + head,
    }


def with_head(config: UniForkConfig, folded: bool) -> UniForkConfig:
    """The configuration of the same model with its image head in one of the two forms."""
    return UniForkConfig.from_dict({**config.to_dict(), "head": {**config.head, "folded": folded}})


def _part_of(name: str) -> str:
    branch, start = branch_of(name), name.partition(".")[0]
    return f"{start} ({branch})" if branch else start


def _tasks_of(part: str) -> tuple[Task, ...]:
    branch = part.partition(" ")[2].strip("()")
    return tuple(task for task in TASKS if task == branch) if branch in BRANCHES["task"] else _TASKS.get(part, TASKS)

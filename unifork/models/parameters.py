"""How many parameters a model has, part by part, and which task uses them; nothing is allocated.

The paper names three sums without saying what they hold (0.5B, 0.76B, 1.21B; implementation details).
The official tensors give them as follows: understanding with the embeddings; generation without
them, with the image head; a total in which the text head counts although it is tied to the
embeddings. None holds the connector.
"""

from collections import Counter

import torch

from unifork.models.configuration import UniForkConfig
from unifork.models.layer_plan import BRANCHES, branch_of
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import TASKS, Task

EMBEDDINGS, TEXT_HEAD, CONNECTOR, IMAGE_HEAD = "embed_tokens", "lm_head", "connector", "image_head"
_TASKS: dict[str, tuple[Task, ...]] = {TEXT_HEAD: ("understanding",), IMAGE_HEAD: ("generation",)}
"""Parts that only one task uses and so trains; branches by task are named after theirs."""


def parts(config: UniForkConfig) -> dict[str, int]:
    """Parameters of the parts of a model, in the order of its names; 0 where all are tied to another part.

    The codebook is no parameter and not among them.
    """
    with torch.device("meta"):
        model = UniForkModel(config)
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        branch, start = branch_of(name), name.partition(".")[0]
        counts[f"{start} ({branch})" if branch else start] += parameter.numel()
    counts.setdefault(TEXT_HEAD, 0)
    return counts


def tasks_of(part: str) -> tuple[Task, ...]:
    """The tasks whose tokens pass through a part: those that train it, unless a stage freezes it."""
    branch = part.partition(" ")[2].strip("()")
    return tuple(task for task in TASKS if task == branch) if branch in BRANCHES["task"] else _TASKS.get(part, TASKS)


def paper_counts(config: UniForkConfig) -> dict[str, int]:
    """Parameters as the paper counts them: `understanding`, `generation`, `total`."""
    counts = parts(config)
    embeddings, head = counts[EMBEDDINGS], counts[IMAGE_HEAD]
    decoder = {name: count for name, count in counts.items() if name.partition(" ")[0] in ("layers", "norm")}
    passed = {task: sum(count for name, count in decoder.items() if task in tasks_of(name)) for task in TASKS}
    return {
        "understanding": embeddings + passed["understanding"],
        "generation": passed["generation"] + head,
        "total": embeddings + (counts[TEXT_HEAD] or embeddings) + sum(decoder.values()) + head,
    }


def with_head(config: UniForkConfig, folded: bool) -> UniForkConfig:
    """The configuration of the same model with its image head in one of the two forms."""
    return UniForkConfig.from_dict({**config.to_dict(), "head": {**config.head, "folded": folded}})

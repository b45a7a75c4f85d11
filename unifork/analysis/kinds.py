"""The analyses by name: a model, a run and choices go in, `NAME.json` and `NAME.svg` come out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unifork.analysis import alignment, entropy, gradients
from unifork.analysis.runs import RunDocuments
from unifork.config import Analysis
from unifork.errors import one_of
from unifork.identity import weights_identity
from unifork.inference import stage_sampling
from unifork.library import Model
from unifork.shards.manifest import write_atomically, write_json

ANALYZE_VERSION = 1
"""Raise when the same model would be analyzed to other numbers."""


def analyze(
    kind: str, of: RunDocuments, out: Path, prompts: Sequence[str] | None = None, untrained: Model | None = None
) -> None:
    """Write an analysis of a model. of: it, and the run whose documents are read where no prompts are given.

    prompts: of an alignment; `pairs` distinct ones are drawn by the seed.

    Raises ConfigError or DataError where there is nothing to analyze.
    """
    work, figure = KINDS[one_of("analysis", kind, KINDS)]
    found = work(of, prompts, untrained)
    weights = weights_identity(of.model.engine.model.state_dict())
    choices, device = of.choices.model_dump(), of.model.engine.model.device.type
    found = {"model": str(of.model.directory), "weights": weights, "device": device, "choices": choices, **found}
    write_atomically(out / f"{kind}.svg", lambda path: path.write_text(figure(found, of.choices)))
    write_json(out / f"{kind}.json", found)


def _alignment(of: RunDocuments, prompts: Sequence[str] | None, untrained: Model | None) -> dict[str, Any]:
    if prompts:
        every, rows = [*dict.fromkeys(prompts)], of.choices.prompts or "given"
        order = np.random.default_rng(of.choices.seed).permutation(len(every))
        texts = [every[number] for number in order[: of.choices.pairs]]
    else:
        texts, rows = of.captions()
    found = alignment.alignment(of.model, texts, stage_sampling(of.model.directory), of.choices, untrained)
    return {"prompts_are": rows, **found}


KINDS: dict[str, tuple[Callable[..., Mapping[str, Any]], Callable[[Any, Analysis], str]]] = {
    "alignment": (_alignment, alignment.figure),
    "conflict": (
        lambda of, *_: gradients.conflicts(of.model.engine.model, of.documents(), of.choices),
        gradients.figure,
    ),
    "entropy": (lambda of, *_: entropy.entropies(of.documents()), entropy.figure),
}

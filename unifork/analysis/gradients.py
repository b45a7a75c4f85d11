"""Gradient conflict by layer, as the Uni-X paper defines it (its section 3.1).

In: a model and documents of two kinds. Out: for each weight matrix that both kinds share, the cosine of the mean
gradients of the two kinds, that of two random halves of all documents, and the difference halves - kinds, which is
positive in a conflict. A matrix is one vector; a mini-batch counts as much as any other. The halves hold as many
documents as each kind, so that they are no noisier than what they are compared with.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unifork.analysis.results import Conflict, Conflicts
from unifork.analysis.runs import drawn
from unifork.batch import Document, pack
from unifork.config import Analysis
from unifork.errors import DataError
from unifork.models.modeling import UniForkModel

SHARED = re.compile(r"layers\.(\d+)\..*\bshared\.([qkvo]_proj|gate_proj|up_proj|down_proj)\.weight")
SHOWN = ("down_proj", "o_proj", "v_proj")
"""Matrices of the paper's figures."""
KINDS: dict[str, Callable[[Document], str]] = {
    "tasks": lambda document: document.task,
    "images": lambda document: "with image" if len(document.codes_ND) else "text only",
}


def conflict(kinds: tuple[Tensor, Tensor], halves: tuple[Tensor, Tensor]) -> Conflict:
    """Conflict and both cosines of one matrix, from two pairs of gradients as vectors."""
    similar, baseline = (float(cosine_similarity(*pair, dim=0)) for pair in (kinds, halves))
    return {"similarity": similar, "baseline": baseline, "conflict": baseline - similar}


def mean_gradients(
    model: UniForkModel, documents: Sequence[Document], batch: int, weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Gradients of the loss of training as vectors in float64, the mean over mini-batches of `batch` documents."""
    model.zero_grad(set_to_none=True)
    parts = [documents[start : start + batch] for start in range(0, len(documents), batch)]
    for part in parts:
        rows = pack([[document] for document in part], max(map(len, part)), model.config.depth).to(model.device)
        text_sum, image_sum_D = model(rows)
        text_mean = text_sum / max(len(rows.text_target_S), 1)
        loss = text_mean + image_sum_D.sum() / max(rows.image_target_MD.numel(), 1)
        (loss / len(parts)).backward()
    return {name: cast(Tensor, weight.grad).flatten().double().cpu() for name, weight in weights.items()}


def conflicts(model: UniForkModel, documents: Iterable[Document], choices: Analysis) -> Conflicts:
    """Everything that is written as `conflict.json`: of the first `pairs` documents of each kind, equally many.

    The model has no other gradients switched on afterwards. `matrices` is empty where they share no layer. Raises
    DataError where there are not two kinds.
    """
    kinds: dict[str, list[Document]] = {}
    for document in documents:
        kinds.setdefault(KINDS[choices.between](document), []).append(document)
    if len(kinds) != 2:
        raise DataError(f"between {choices.between}: documents of two kinds are needed, found {[*kinds] or 'none'}")
    count = min(choices.pairs, *map(len, kinds.values()))
    every = [document for found in kinds.values() for document in found[:count]]
    mixed = np.random.default_rng(choices.seed).permutation(len(every))
    orders = [*np.split(np.arange(len(every)), 2), *np.split(mixed, 2)]
    weights = {name: parameter for name, parameter in model.named_parameters() if SHARED.fullmatch(name)}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    found = {}
    if weights:
        a, b, *halves = (mean_gradients(model, [every[n] for n in order], choices.batch, weights) for order in orders)
        found = {name: conflict((a[name], b[name]), (halves[0][name], halves[1][name])) for name in weights}
    return {"documents": dict.fromkeys(kinds, count), "loss": "mean over mini-batches", "matrices": found}


def figure(found: Conflicts, _: Analysis) -> str:
    """Conflict over layers, a curve for each of SHOWN, as SVG."""
    curves = []
    for matrix in SHOWN:
        rows = [(SHARED.fullmatch(name), row["conflict"]) for name, row in found["matrices"].items()]
        points = {int(place[1]): value for place, value in rows if place and place[2] == matrix}
        curves.append({"x": [*points], "y": [*points.values()], "label": matrix})
    return drawn(curves, "layer", "gradient conflict")

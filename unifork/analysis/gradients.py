"""Gradient conflict by layer, as the Uni-X paper defines it (its section 3.1).

In: a model and documents of two kinds. Out: for each kind of weight matrix and each layer where both kinds share it,
the cosine of the mean gradients of the two kinds, that of two random halves of all documents, and their difference:
halves - kinds, which is positive in a conflict. A matrix is one vector; a mini-batch counts as much as any other.

The halves hold as many documents as each kind, so that they are no noisier than what they are compared with.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unifork.analysis.documents import drawn
from unifork.batch import Document, pack
from unifork.errors import DataError
from unifork.identity import weights_identity
from unifork.models.modeling import UniForkModel

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHOWN = ("down_proj", "o_proj", "v_proj")
"""Matrices of the paper's figures."""


def conflict(kinds: Sequence[Tensor], halves: Sequence[Tensor]) -> dict[str, float]:
    """Conflict and both cosines of one matrix, from two pairs of gradients."""
    similar, baseline = (
        float(cosine_similarity(*(gradient.double().flatten() for gradient in pair), dim=0)) for pair in (kinds, halves)
    )
    return {"similarity": similar, "baseline": baseline, "conflict": baseline - similar}


def mean_gradients(
    model: UniForkModel, documents: Sequence[Document], batch: int, weights: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Gradients of the loss of training, the mean over mini-batches of `batch` documents."""
    model.zero_grad(set_to_none=True)
    starts = range(0, len(documents), batch)
    for start in starts:
        some = documents[start : start + batch]
        rows = pack([[document] for document in some], max(map(len, some)), model.config.depth).to(model.device)
        text_sum, image_sum_D = model(rows)
        text_mean = text_sum / max(len(rows.text_target_S), 1)
        loss = text_mean + image_sum_D.sum() / max(rows.image_target_MD.numel(), 1)
        (loss / len(starts)).backward()
    return {name: weight.grad.cpu().clone() for name, weight in weights.items() if weight.grad is not None}


def gradient_conflict(
    model: UniForkModel, kinds: dict[str, Sequence[Document]], batch: int, seed: int
) -> dict[str, Any]:
    """Everything that is written as `conflict.json`. kinds: two groups of equally many documents by name.

    Raises DataError where a group has none, or no layer is shared.
    """
    if not all(kinds.values()):
        raise DataError(f"documents of both kinds are needed, found { ({name: len(d) for name, d in kinds.items()}) }")
    weights = {
        name: w for name, w in model.named_parameters() if name.split(".")[-2] in MATRICES and ".shared." in name
    }
    weights = {name: w for name, w in weights.items() if name.startswith("layers.") and name.endswith(".weight")}
    if not weights:
        raise DataError(f"plan {model.config.plan}: no layer is shared, so nothing can be in conflict")
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is weight for weight in weights.values()))
    every = [document for documents in kinds.values() for document in documents]
    mixed = [every[number] for number in np.random.default_rng(seed).permutation(len(every))]
    halves = (mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :])
    groups = [mean_gradients(model, documents, batch, weights) for documents in (*kinds.values(), *halves)]
    rows = []
    for name in weights:
        if all(name in group for group in groups):
            gradients = [group[name] for group in groups]
            rows.append({"layer": int(name.split(".")[1]), "matrix": name.split(".")[-2],
                         **conflict(gradients[:2], gradients[2:])})  # fmt: skip
    counts = {name: len(documents) for name, documents in kinds.items()}
    return {"weights": weights_identity(model.state_dict()), "documents": counts, "batch": batch, "seed": seed,
            "loss": "that of training, the mean over mini-batches", "conflict": rows}  # fmt: skip


def figure(found: dict[str, Any]) -> str:
    """Conflict over layers, a curve for each of SHOWN, as SVG."""
    by_name = {name: [row for row in found["conflict"] if row["matrix"] == name] for name in SHOWN}
    curves = [
        {"x": [row["layer"] for row in rows], "y": [row["conflict"] for row in rows], "label": name}
        for name, rows in by_name.items()
    ]
    return drawn(curves, ("layer", "gradient conflict"))

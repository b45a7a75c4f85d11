"""Alignment of image and text states by layer, as figures 2, 5 and 6 of the UniFork paper show it.

In: a model, prompts, the choices that the paper leaves open. Out: for each task the mutual-kNN score of every layer,
with a standard error and the scores of chance, and two controls: words of the prompts, and an untrained model.
Neighbors and scores are computed in float64. `docs/analysis.md` says what the paper states and what it does not.

Shape suffixes: L states (input of the layers, output of each, that of the last after the norm), N prompts, C channels,
B documents of a call, T tokens, S sets of tokens that are averaged, P image positions, D code depth, W words.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from unifork.analysis.results import Alignment, Curve
from unifork.analysis.runs import drawn
from unifork.batch import IMAGE, TEXT, Document, pack
from unifork.config import Analysis, Sampling, fingerprint, read_yaml
from unifork.documents.mixture import skeleton
from unifork.documents.prompts import IMAGE_PIECE, Piece, question, template_named, written
from unifork.errors import ConfigError
from unifork.inference import Engine
from unifork.library import Model
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import Task

PERMUTATIONS, HALVES = 300, 200
"""Random pairings whose scores are chance; half samples of the prompts whose scores spread by the standard error."""
CENTRAL = (0.025, 0.975)
LAST = {"raw": -2, "normed": -1}
FIXED = read_yaml(Path(__file__).with_suffix(".yaml"))
"""What else the paper leaves open, and how it is done here."""


Masked = tuple[Document, np.ndarray]
"""A document and masks of its tokens (S, T)."""
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x_NC: normalize(x_NC, dim=-1),
    "raw": lambda x_NC: x_NC,
    "centered-l2": lambda x_NC: normalize(x_NC - x_NC.mean(-2, keepdim=True), dim=-1),
    "clamped-l2": lambda x_NC: _clamped(x_NC, _of_all(x_NC.abs().flatten(-2))),
    "row-clamped-l2": lambda x_NC: _clamped(x_NC, _of_rows(x_NC.abs())),
}
"""What is done to states before inner products are taken: nothing or unit length, before that centered or clamped."""


def neighbors(similar_NN: Tensor, k: int) -> Tensor:
    """The k other rows nearest to each row (..., N, k), nearest first. Raises ConfigError where N is too small."""
    if not 1 <= k < (N := similar_NN.shape[-1]):
        raise ConfigError(f"k is {k}; among {N} prompts each has {N - 1} neighbors, allowed are 1 to {N - 1}")
    itself = torch.eye(N, dtype=torch.bool)
    return similar_NN.masked_fill(itself, -torch.inf).topk(k).indices


def similarities(states_NC: Tensor, rows: str = "l2") -> Tensor:
    """Inner products of rows (..., N, N), in float64."""
    prepared_NC = ROWS[rows](states_NC.double())
    return prepared_NC @ prepared_NC.mT


def overlaps(similar_NN: Tensor, other_NN: Tensor, k: int) -> Tensor:
    """The share of its k neighbors that a row has in common in both (..., N); their mean is the alignment score."""
    found_Nk = neighbors(similar_NN, k)
    return _members(other_NN, k).expand_as(similar_NN).gather(-1, found_Nk).double().mean(-1)


def curve(states_LNC: Tensor, text_NC: Tensor, choices: Analysis) -> Curve:
    """Score, standard error and chance of every state of image tokens against one state of the text.

    Chance is the score of randomly paired prompts. The standard error is the spread over halves of the prompts, which
    is rather too large: neighbors are shared between rows, and a half has half of them.
    """
    similar_LNN, text_NN = similarities(states_LNC, choices.rows), similarities(text_NC, choices.rows)
    (_, N, _), k = similar_LNN.shape, choices.k
    found_LNk, member_NN = neighbors(similar_LNN, k), _members(text_NN, k)
    generator = torch.Generator().manual_seed(choices.seed)
    chance, halves = [], []
    for _ in range(PERMUTATIONS):
        pairing_N = torch.randperm(N, generator=generator)
        chance.append(member_NN[pairing_N[:, None], pairing_N[found_LNk]].double().mean((-1, -2)))
    for _ in range(HALVES):
        half = torch.randperm(N, generator=generator)[: N // 2]
        halves.append(overlaps(similar_LNN[:, half][:, :, half], text_NN[half][:, half], k).mean(-1))
    low_L, high_L = torch.stack(chance).quantile(torch.tensor(CENTRAL, dtype=torch.float64), dim=0)
    error_L = torch.stack(halves).std(0) * (N // 2 / (N - N // 2)) ** 0.5
    return {
        "score": overlaps(similar_LNN, text_NN, k).mean(-1).tolist(), "standard_error": error_L.tolist(),
        "chance": torch.stack(chance).mean(0).tolist(), "chance_low": low_L.tolist(), "chance_high": high_L.tolist(),
    }  # fmt: skip


def masked_means(x_BTC: Tensor, masks_BST: Tensor) -> Tensor:
    """Means over the tokens of each mask (B, S, C); zeros where a mask holds none."""
    weights_BST = masks_BST.to(x_BTC.dtype)
    return weights_BST @ x_BTC / weights_BST.sum(-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def pooled_states(model: UniForkModel, documents: Sequence[Masked]) -> Tensor:
    """States of all layers, averaged inside the pass over the masks of each document: (L, B, S, C), float32.

    The last two are those of the last layer, without and with the final norm.
    """
    longest = max(len(document) for document, _ in documents)
    masks = [np.pad(mask_ST, ((0, 0), (0, longest - mask_ST.shape[1]))) for _, mask_ST in documents]
    masks_BST, means = torch.from_numpy(np.stack(masks)).to(model.device), []

    def pool(x: Tensor) -> None:
        means.append(masked_means(x.view(len(documents), longest, -1).float(), masks_BST).cpu())

    hooks = [layer.register_forward_pre_hook(lambda _, given: pool(given[0])) for layer in model.layers]
    hooks.append(model.layers[-1].register_forward_hook(lambda _, __, output: pool(output)))
    try:
        rows = pack([[document] for document, _ in documents], longest, model.config.depth)
        pool(model.hidden(rows.to(model.device)))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(means)


def alignment(
    model: Model, prompts: Sequence[str], sampling: Sampling, choices: Analysis, untrained: Model | None = None
) -> Alignment:
    """Everything that is written as `alignment.json`. untrained: a control, which reads the images of `model`.

    Raises ConfigError for a prompt that occurs twice, and where half of the prompts are no more than neighbors.
    """
    if len(set(prompts)) < len(prompts):
        text, count = Counter(prompts).most_common(1)[0]
        raise ConfigError(f"prompt {text!r} occurs {count} times; each must differ, since equal prompts are neighbors")
    neighbors(torch.zeros(len(prompts) // 2, len(prompts) // 2), choices.k)  # before anything is drawn
    engine = model.engine
    drawn_BPD = engine.generate_images(prompts, sampling, choices.generation_template)
    seen_BPD = model.images.encode_images(model.images.decode_codes(drawn_BPD)).reshape(drawn_BPD.shape)
    codes: dict[Task, np.ndarray] = {"generation": drawn_BPD, "understanding": seen_BPD.astype(np.int64)}
    curves, bag = _curves(engine, prompts, codes, choices)
    layers = enumerate(engine.model.plan.kinds)
    return {
        "prompts": len(prompts),
        "prompts_hash": fingerprint(list(prompts)),
        "sampling": sampling.model_dump(),
        "fixed": FIXED,
        "fork": next((number for number, kind in layers if kind.route == "task"), None),
        "curves": curves,
        "bag_of_words": bag,
        "untrained": _curves(untrained.engine, prompts, codes, choices)[0] if untrained else {},
    }


def figure(found: Alignment, choices: Analysis) -> str:
    """The curves of both tasks with chance, controls and the fork's depth, as SVG."""
    curves = []
    for number, (task, columns) in enumerate(found["curves"].items()):
        style: dict[str, Any] = {"x": range(len(columns["score"])), "color": f"C{number}"}
        band = (columns["chance_low"], columns["chance_high"])
        curves.append({**style, "y": columns["score"], "error": columns["standard_error"], "band": band, "label": task})
        if found["untrained"]:
            control = {"y": found["untrained"][task]["score"], "label": f"{task}, untrained"}
            curves.append({**style, **control, "linestyle": "--", "alpha": 0.6})
    return drawn(curves, "layer", f"mutual kNN, k = {choices.k}", found["fork"])


def _curves(
    engine: Engine, prompts: Sequence[str], codes: dict[Task, np.ndarray], choices: Analysis
) -> tuple[dict[Task, Curve], dict[Task, float]]:
    """The curve of each task, and how well words of the prompts are aligned with the text of each."""
    form, frame = (template_named(n, "template") for n in (choices.generation_template, choices.understanding_template))
    prompted = [written(form, text) for text in prompts]
    asked_for = question(frame, choices.query)
    before = [pieces[: pieces.index(IMAGE_PIECE)] for pieces in prompted]
    kept = [*range(len(engine.model.layers)), LAST[choices.last]]

    def read(task: Task, texts: Sequence[Sequence[Piece]], codes_BPD: np.ndarray) -> Tensor:
        rows = [_masked(engine, task, *row) for row in zip(texts, codes_BPD, strict=True)]
        parts = (rows[start : start + choices.batch] for start in range(0, len(rows), choices.batch))
        return torch.cat([pooled_states(engine.model, part) for part in parts], 1)[kept]

    drawn_LNSC = read("generation", prompted, codes["generation"])
    seen_LNSC = read("understanding", [asked_for] * len(prompts), codes["understanding"])
    texts: dict[Task, Tensor] = {"generation": drawn_LNSC[-1, :, 1], "understanding": drawn_LNSC[-1, :, 1]}
    if choices.text == "query":
        texts["understanding"] = seen_LNSC[-1, :, 1]
    elif choices.text == "branch":
        texts["understanding"] = read("understanding", before, codes["understanding"][:, :0])[-1, :, 1]
    words = [Counter(re.findall(r"\w+", text.lower())) for text in prompts]
    every = sorted(set().union(*words))
    bag_NN = similarities(torch.tensor([[count[word] for word in every] for count in words]))
    texts_NN = {task: similarities(text_NC, choices.rows) for task, text_NC in texts.items()}
    bag = {task: float(overlaps(bag_NN, text_NN, choices.k).mean()) for task, text_NN in texts_NN.items()}
    images: dict[Task, Tensor] = {"generation": drawn_LNSC[:, :, 0], "understanding": seen_LNSC[:, :, 0]}
    return {task: curve(images[task], text_NC, choices) for task, text_NC in texts.items()}, bag


def _masked(engine: Engine, task: Task, pieces: Sequence[Piece], codes_PD: np.ndarray) -> Masked:
    """A document, and masks (2, T) of its image tokens and of its tokens that hold text which is not the template's.

    Behind an image only what follows it counts. A token on the border between both counts as text.
    """
    frame = [replace(piece, supervised=piece.control) for piece in pieces]
    form = skeleton(frame, engine.tokenizer, engine.model.config.positions)
    image_T, text_T = form.kinds_T == IMAGE, (form.kinds_T == TEXT) & ~form.loss_mask_T
    if task == "understanding":
        text_T[: int(image_T.argmax())] = False
    return form.with_codes("", task, codes_PD), np.stack([image_T, text_T])


def _clamped(x_NC: Tensor, most: Tensor) -> Tensor:
    most = most[..., None, None]
    return normalize(x_NC.clamp(-most, most), dim=-1)


def _of_all(values: Tensor) -> Tensor:
    """The element at 95 % of all sorted values, not interpolated."""
    return values.sort(-1).values[..., int(0.95 * values.shape[-1])]


def _of_rows(x_NC: Tensor) -> Tensor:
    """The mean of the rows' quantiles at 95 %, interpolated; torch has none for many values."""
    return torch.as_tensor(np.quantile(x_NC.numpy(), 0.95, axis=-1).mean(-1))


def _members(similar_NN: Tensor, k: int) -> Tensor:
    """Whether column j is among the k neighbors of row i (..., N, N)."""
    return torch.zeros_like(similar_NN, dtype=torch.bool).scatter_(-1, neighbors(similar_NN, k), value=True)

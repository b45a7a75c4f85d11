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
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn.functional import normalize

from unifork.analysis.documents import drawn
from unifork.batch import IMAGE, TEXT, Document, pack
from unifork.config import Sampling, StrictModel, fingerprint
from unifork.documents.mixture import skeleton
from unifork.documents.prompts import IMAGE_PIECE, Piece, question, template_named, written
from unifork.errors import ConfigError
from unifork.identity import weights_identity
from unifork.inference import Engine
from unifork.library import Model
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import Task

PERMUTATIONS, HALVES = 300, 200
"""Random pairings whose scores are chance; half samples of the prompts whose scores spread by the standard error."""
CENTRAL = (0.025, 0.975)
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": lambda x_NC: normalize(x_NC, dim=-1),
    "raw": lambda x_NC: x_NC,
    "centered-l2": lambda x_NC: normalize(x_NC - x_NC.mean(-2, keepdim=True), dim=-1),
    "clamped-l2": lambda x_NC: _clamped(x_NC, _exact_quantile(x_NC.abs().flatten(-2))),
    "row-clamped-l2": lambda x_NC: _clamped(x_NC, torch.quantile(x_NC.abs(), 0.95, dim=-1).mean(-1)),
}
"""What is done to states before inner products are taken: nothing or unit length, before that centered or clamped."""


class Choices(StrictModel):
    """What the paper leaves open."""

    k: PositiveInt = 10
    """Neighbors."""
    rows: Literal["l2", "raw", "centered-l2", "clamped-l2", "row-clamped-l2"] = "l2"
    """A key of ROWS."""
    text: Literal["branch", "generation", "query"] = "branch"
    """Whose text an image is compared with: the prompt as the task of the curve reads it, the prompt as generation
    reads it in both curves, or for understanding the query behind the image, which attention lets see the image."""
    last: Literal["normed", "raw"] = "normed"
    """Whether the last state is taken after the final norm; also that of the text."""
    generation_template: str = "generate"
    understanding_template: str = "answer"
    query: str = "Provide a one-sentence caption for the image:"
    seed: NonNegativeInt = 0
    """Of pairings and half samples."""


def neighbors(similar_NN: Tensor, k: int) -> Tensor:
    """The k most similar other rows of each row (..., N, k), the most similar first. Raises ConfigError for a large k."""
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
    return _members(other_NN, k).gather(-1, neighbors(similar_NN, k)).double().mean(-1)


def curve(states_LNC: Tensor, text_NC: Tensor, choices: Choices) -> list[dict[str, float]]:
    """Score, standard error and chance of every state of image tokens against one state of the text.

    Chance is the score of randomly paired prompts. The standard error is the spread over halves of the prompts, with
    half of k, so that neighbors stay the same share of all.
    """
    similar_LNN, text_NN = similarities(states_LNC, choices.rows), similarities(text_NC, choices.rows)
    (L, N, _), k = similar_LNN.shape, choices.k
    found_LNk, generator = neighbors(similar_LNN, k), torch.Generator().manual_seed(choices.seed)
    member_NN = _members(text_NN, k)
    scores_L = member_NN.expand(L, N, N).gather(-1, found_LNk).double().mean((-1, -2))
    chance, halves = [], []
    for _ in range(PERMUTATIONS):
        pairing_N = torch.randperm(N, generator=generator)
        chance.append(member_NN[pairing_N[:, None], pairing_N[found_LNk]].double().mean((-1, -2)))
    for _ in range(HALVES if N >= 4 else 0):  # noqa: PLR2004
        half = torch.randperm(N, generator=generator)[: N // 2]
        some_LNN, text_half_NN = similar_LNN[:, half][:, :, half], text_NN[half][:, half].expand(L, -1, -1)
        halves.append(overlaps(some_LNN, text_half_NN, min(max(1, round(k / 2)), N // 2 - 1)).mean(-1))
    low_L, high_L = torch.quantile(torch.stack(chance), torch.tensor(CENTRAL, dtype=torch.float64), dim=0)
    errors_L = torch.stack(halves).std(0) * (N // 2 / (N - N // 2)) ** 0.5 if halves else torch.full((L,), torch.nan)
    columns = {"score": scores_L, "standard_error": errors_L, "chance": torch.stack(chance).mean(0)}
    columns |= {"chance_low": low_L, "chance_high": high_L}
    lists = {name: column_L.tolist() for name, column_L in columns.items()}
    return [{"layer": layer, **{name: values[layer] for name, values in lists.items()}} for layer in range(L)]


def masked_means(x_BTC: Tensor, masks_BST: Tensor) -> Tensor:
    """Means over the tokens of each mask (B, S, C); zeros where a mask holds none."""
    weights_BST = masks_BST.to(x_BTC.dtype)
    return weights_BST @ x_BTC / weights_BST.sum(-1, keepdim=True).clamp(min=1)


@torch.no_grad()
def pooled_states(model: UniForkModel, documents: Sequence[tuple[Document, np.ndarray]], batch: int) -> Tensor:
    """States of all layers, averaged inside the pass over the masks (S, T) of each document: (L, N, S, C), float32.

    The last two are those of the last layer, without and with the final norm.
    """
    found = []
    for start in range(0, len(documents), batch):
        some = documents[start : start + batch]
        longest = max(len(document) for document, _ in some)
        masks_BST = torch.zeros(len(some), len(some[0][1]), longest, dtype=torch.bool)
        for row, (document, mask_ST) in enumerate(some):
            masks_BST[row, :, : len(document)] = torch.from_numpy(mask_ST)
        means: list[Tensor] = []

        def pool(x: Tensor, masks_BST: Tensor = masks_BST, means: list[Tensor] = means) -> None:
            x_BTC = x.view(len(masks_BST), masks_BST.shape[-1], -1).float()
            means.append(masked_means(x_BTC, masks_BST.to(x.device)).cpu())

        hooks = [layer.register_forward_pre_hook(lambda _, given, pool=pool: pool(given[0])) for layer in model.layers]
        hooks += [model.layers[-1].register_forward_hook(lambda _, __, output, pool=pool: pool(output))]
        try:
            rows = pack([[document] for document, _ in some], longest, model.config.depth)
            pool(model.hidden(rows.to(model.device)))
        finally:
            for hook in hooks:
                hook.remove()
        found.append(torch.stack(means))
    return torch.cat(found, 1)


def alignment(
    model: Model, prompts: Sequence[str], sampling: Sampling, choices: Choices, untrained: Model | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is written as `alignment.json`. untrained: a control, which reads the images of `model`.

    Raises ConfigError for a prompt that occurs twice, and where there are no more prompts than neighbors.
    """
    if repeated := [text for number, text in enumerate(prompts) if text in prompts[:number]]:
        raise ConfigError(f"{len(repeated)} prompts occur twice, first {repeated[0]!r}; equal prompts are neighbors")
    neighbors(torch.zeros(len(prompts), len(prompts)), choices.k)  # before anything is drawn
    engine, plan = model.engine, model.engine.model.plan
    drawn_BPD = engine.generate_images(prompts, sampling, choices.generation_template, progress)
    seen_BPD = model.images.encode_images(model.images.decode_codes(drawn_BPD)).reshape(drawn_BPD.shape)
    codes: dict[Task, np.ndarray] = {"generation": drawn_BPD, "understanding": seen_BPD.astype(np.int64)}
    curves, bag = _curves(engine, prompts, codes, choices)
    controls: dict[str, Any] = {"bag_of_words": bag}
    if untrained:
        controls["untrained"] = _curves(untrained.engine, prompts, codes, choices)[0]
    return {
        "model": str(model.directory),
        "weights": weights_identity(engine.model.state_dict()),
        "prompts": len(prompts),
        "prompts_hash": fingerprint(list(prompts)),
        "choices": {**choices.model_dump(), "pooling": "mean inside the pass", "image_tokens": "those with codes",
                    "text_tokens": "those of the prompt, without its frame", "layer_0": "input of the first layer",
                    "understanding_codes": "drawn, decoded and encoded again in the padded view",
                    "untrained_reads": "the images of the trained model"},
        "sampling": sampling.model_dump(),
        "batch": engine.batch,
        "fork": next((number for number, kind in enumerate(plan.kinds) if kind.route == "task"), None),
        "curves": curves,
        "controls": controls,
    }  # fmt: skip


def figure(found: dict[str, Any]) -> str:
    """The curves of both tasks with chance, controls and the fork's depth, as SVG."""
    curves = []
    for number, (task, points) in enumerate(found["curves"].items()):
        x, y, error = ([point[name] for point in points] for name in ("layer", "score", "standard_error"))
        curves.append({"x": x, "y": y, "error": error, "color": f"C{number}", "label": task})
        if untrained := found["controls"].get("untrained"):
            y = [point["score"] for point in untrained[task]]
            style = {"color": f"C{number}", "linestyle": "--", "alpha": 0.6, "label": f"{task}, untrained"}
            curves.append({"x": x, "y": y, **style})
    limits = [[tuple(point[name] for point in layer) for layer in zip(*found["curves"].values(), strict=True)]
              for name in ("chance_low", "chance_high")]  # fmt: skip
    band = [list(map(min, limits[0])), list(map(max, limits[1]))]
    return drawn(curves, ("layer", f"mutual kNN, k = {found['choices']['k']}"), band, found["fork"])


def _curves(
    engine: Engine, prompts: Sequence[str], codes: dict[Task, np.ndarray], choices: Choices
) -> tuple[dict[str, Any], dict[str, float]]:
    """The curve of each task, and how well words of the prompts are aligned with the text of each."""
    form, frame = (template_named(n, "template") for n in (choices.generation_template, choices.understanding_template))
    prompted = [written(form, text) for text in prompts]
    asked_for = question(frame, choices.query)
    before = [pieces[: pieces.index(IMAGE_PIECE)] for pieces in prompted]
    kept = [*range(len(engine.model.layers)), -1 if choices.last == "normed" else -2]

    def read(task: Task, texts: Sequence[Sequence[Piece]], codes_BPD: np.ndarray) -> Tensor:
        rows = [_masked(engine, task, *row) for row in zip(texts, codes_BPD, strict=True)]
        return pooled_states(engine.model, rows, engine.batch)[kept]

    drawn_LNSC = read("generation", prompted, codes["generation"])
    seen_LNSC = read("understanding", [asked_for] * len(prompts), codes["understanding"])
    texts: dict[str, Tensor] = {"generation": drawn_LNSC[-1, :, 1], "understanding": drawn_LNSC[-1, :, 1]}
    if choices.text == "query":
        texts["understanding"] = seen_LNSC[-1, :, 1]
    elif choices.text == "branch":
        texts["understanding"] = read("understanding", before, codes["understanding"][:, :0])[-1, :, 1]
    words = [Counter(re.findall(r"\w+", text.lower())) for text in prompts]
    every = sorted(set().union(*words))
    bag_NN = similarities(torch.tensor([[count[word] for word in every] for count in words]))
    bag = {
        task: float(overlaps(bag_NN, similarities(text_NC, choices.rows), choices.k).mean())
        for task, text_NC in texts.items()
    }
    images = {"generation": drawn_LNSC[:, :, 0], "understanding": seen_LNSC[:, :, 0]}
    return {task: curve(images[task], text_NC, choices) for task, text_NC in texts.items()}, bag


def _masked(engine: Engine, task: Task, pieces: Sequence[Piece], codes_PD: np.ndarray) -> tuple[Document, np.ndarray]:
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


def _exact_quantile(values: Tensor) -> Tensor:
    """The element at 95 % of all sorted values, not interpolated."""
    return values.sort(-1).values[..., int(0.95 * values.shape[-1])]


def _members(similar_NN: Tensor, k: int) -> Tensor:
    """Whether column j is among the k neighbors of row i (..., N, N)."""
    return torch.zeros_like(similar_NN, dtype=torch.bool).scatter_(-1, neighbors(similar_NN, k), value=True)

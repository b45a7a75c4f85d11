"""Sampling: prompts in, codes of images or ids of answers out.

Both read all prompts at once and then one token a row at a time, with a cache. Rows are padded on
the right and padding is invisible (see `masks`), so a row's result does not depend on its
neighbours. Guidance runs conditional and unconditional rows in one batch: guided logits are
unconditional + scale * (conditional - unconditional), and both rows read the code that was drawn.

Every draw is keyed by (seed, number of the image, position, depth), so an image stays the same
whatever batch it is drawn in.

Shape suffixes: B images or prompts, R rows (2B with guidance), P positions of an image, D depth,
H hidden size, K codebook rows.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from unifork.batch import BEGIN_IMAGE, TEXT, Batch, Document, pack
from unifork.config import Sampling
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import MODALITIES

_TEXT_TOKEN, _IMAGE_TOKEN = MODALITIES.index("text"), MODALITIES.index("image")


@torch.no_grad()
def generate_images(
    model: UniForkModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    sampling: Sampling,
    image_numbers: Sequence[int] | None = None,
) -> Tensor:
    """Codes (B, P, D) of one image per prompt (token ids up to, without, begin-of-image).

    `image_numbers`, one per prompt, key the draws and are 0, 1, ... by default. A guidance of 1 leaves the
    unconditional rows out; a top_k of 1 takes the likeliest code.
    """
    B, P, D = len(prompts), model.config.positions, model.config.depth
    if B == 0:
        return torch.zeros(0, P, D, dtype=torch.long, device=model.device)
    guided = sampling.guidance != 1.0
    numbers = range(B) if image_numbers is None else image_numbers
    uniform_BPD = torch.stack([draws(sampling.seed, number, P, D) for number in numbers]).to(model.device)
    rows = [*prompts, *([unconditional] * B if guided else [])]
    hidden_RH, context = model.prefill(_packed(model, [_image_prompt(ids, D) for ids in rows]))
    images: list[Tensor] = []
    for position in range(P):

        def choose(logits_RK: Tensor, depth: int, position: int = position) -> Tensor:
            logits_BK = guide(logits_RK, sampling.guidance) if guided else logits_RK.float()
            codes_B = draw(probabilities(logits_BK, sampling), uniform_BPD[:, position, depth])
            return codes_B.repeat(2) if guided else codes_B

        codes_RD = model.image_head.unroll(hidden_RH, model.codebook, choose)
        images.append(codes_RD[:B])
        if position < P - 1:
            hidden_RH = model.step(model.embed_codes(codes_RD), _IMAGE_TOKEN, context)
    return torch.stack(images, 1)


@torch.no_grad()
def answer_texts(
    model: UniForkModel, prompts: Sequence[Document], max_new_tokens: int, stop_id: int
) -> list[list[int]]:
    """The likeliest ids after each prompt of the task understanding, up to and without `stop_id`."""
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    hidden_BH, context = model.prefill(_packed(model, prompts))
    running = set(range(len(prompts)))
    for number in range(max_new_tokens):
        ids_B = model.text_logits(hidden_BH).argmax(-1)
        ids = ids_B.tolist()
        running = {row for row in running if ids[row] != stop_id}
        for row in running:
            answers[row].append(ids[row])
        if not running or number == max_new_tokens - 1:
            break
        hidden_BH = model.step(model.embed_tokens(ids_B), _TEXT_TOKEN, context)
    return answers


def guide(logits_RK: Tensor, scale: float) -> Tensor:
    """Guided logits (B, K), float32; the first half of the rows is conditional, the second is not."""
    conditional, unconditional = logits_RK.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def probabilities(logits_BK: Tensor, sampling: Sampling) -> Tensor:
    """What codes are drawn from: temperature, then the top k, then the top p of what is left.

    The code whose probability crosses top_p is kept; of equal logits at the border of the top k
    all are kept.
    """
    logits_BK = logits_BK.float() / sampling.temperature
    K = logits_BK.shape[-1]
    if sampling.top_k < K:
        least_B1 = logits_BK.topk(sampling.top_k).values[:, -1:]
        logits_BK = logits_BK.masked_fill(logits_BK < least_B1, -torch.inf)
    ordered_BK, order_BK = logits_BK.sort(descending=True, stable=True)
    likely_BK = ordered_BK.softmax(-1)
    before_BK = likely_BK.cumsum(-1).roll(1, -1)
    before_BK[:, 0] = 0.0
    kept_BK = ordered_BK.masked_fill(before_BK > sampling.top_p, -torch.inf).softmax(-1)
    return torch.zeros_like(kept_BK).scatter(1, order_BK, kept_BK)


def draw(probabilities_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """The code at which the running sum of probabilities exceeds a number from [0, 1)."""
    sums_BK = probabilities_BK.double().cumsum(-1)
    threshold_B1 = uniform_B[:, None] * sums_BK[:, -1:]
    return torch.searchsorted(sums_BK, threshold_B1, right=True)[:, 0].clamp(max=sums_BK.shape[1] - 1)


def draws(seed: int, image_number: int, positions: int, depth: int) -> Tensor:
    """The numbers from [0, 1) that decide one image, (P, D) in float64.

    Philox with the whole key: torch's CPU generator keeps 32 bits of its seed.
    """
    stream = np.random.Generator(np.random.Philox(key=[seed, image_number]))
    return torch.from_numpy(stream.random((positions, depth)))


def _packed(model: UniForkModel, documents: Sequence[Document]) -> Batch:
    longest = max(map(len, documents))
    return pack([[document] for document in documents], longest, model.config.depth).to(model.device)


def _image_prompt(ids: Sequence[int], depth: int) -> Document:
    kinds_T = np.full(len(ids) + 1, TEXT)
    kinds_T[-1] = BEGIN_IMAGE
    ids_T = np.array([*ids, 0], np.int64)
    return Document("", "generation", kinds_T, ids_T, np.zeros(len(kinds_T), bool), np.zeros((0, depth), np.int64))

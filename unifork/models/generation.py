"""Sampling: prompts in, codes of images or ids of answers out.

Both read the prompts at once and then one token a row at a time, with a cache that is allocated once.
Rows are padded on the right and padding is invisible (see `masks`), so a row's result does not depend on
its neighbours. Guidance runs conditional and unconditional rows in one batch: guided logits are
unconditional + scale * (conditional - unconditional), and both rows read the code that was drawn. The
unconditional prompt is read once, and so is what prompts of answers begin with alike: template and image.

A position of an image (decoder, depths, draws) reads nothing from the device and always does the same to
the same memory; so on a CUDA device it can be captured once and replayed.

Every draw is keyed by (seed, number of the image, position, depth), so an image stays the same
whatever batch it is drawn in.

Shape suffixes: B images or prompts, R rows (2B with guidance), P positions of an image, D depth,
H hidden size, K codebook rows, W candidates, T tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from unifork.batch import BEGIN_IMAGE, IMAGE, TEXT, Batch, Document, pack
from unifork.config import Sampling
from unifork.models.modeling import UniForkModel
from unifork.vocabulary import MODALITIES, TASKS

_TEXT_TOKEN, _IMAGE_TOKEN = MODALITIES.index("text"), MODALITIES.index("image")
SPARE = 64
"""Candidates beyond the top k: room for codes that are as likely as the last of them."""


@torch.inference_mode()
def generate_images(
    model: UniForkModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    sampling: Sampling,
    image_numbers: Sequence[int] | None = None,
    *,
    capture: bool = False,
) -> Tensor:
    """Codes (B, P, D) of one image per prompt (token ids up to, without, begin-of-image).

    `image_numbers`, one per prompt, key the draws and are 0, 1, ... by default. A guidance of 1 leaves the
    unconditional rows out; a top_k of 1 takes the likeliest code. capture: replay a CUDA graph.
    """
    B, P, D, K = len(prompts), model.config.positions, model.config.depth, model.config.codebook_size
    if B == 0:
        return torch.zeros(0, P, D, dtype=torch.long, device=model.device)
    numbers = range(B) if image_numbers is None else image_numbers
    uniform_PDB = torch.stack([draws(sampling.seed, number, P, D) for number in numbers], -1).to(model.device)
    # more equal logits at the border than there is room for: once more, with all codes
    for width in (candidates(sampling.top_k, K), K):
        codes_PBD, crowded = _generate(model, prompts, unconditional, sampling, uniform_PDB, width, capture)
        if width == K or not crowded:
            break
    return codes_PBD.transpose(0, 1)


def _generate(
    model: UniForkModel,
    prompts: Sequence[Sequence[int]],
    unconditional: Sequence[int],
    sampling: Sampling,
    uniform_PDB: Tensor,
    width: int,
    capture: bool,
) -> tuple[Tensor, Tensor]:
    """Codes (P, B, D), and whether any draw had more equal logits at the border of the top k than candidates."""
    P, D, B = uniform_PDB.shape
    guided = sampling.guidance != 1.0
    every = [*prompts, unconditional] if guided else prompts
    batch = _packed(model, [_image_prompt(ids, D) for ids in every])
    cache = model.new_cache(len(every), batch.kinds_BT.shape[1])
    rows_R = torch.tensor([*range(B), *([B] * B if guided else [])], device=model.device)
    hidden_RH = model.read(batch, cache)[rows_R]
    step = model.decoder(cache.spread(rows_R, P), TASKS.index("generation"), _IMAGE_TOKEN, whole=capture)
    codes_PBD = uniform_PDB.new_zeros(P, B, D, dtype=torch.long)
    latest_RD = codes_PBD.new_zeros(len(rows_R), D)
    position_1, crowded = rows_R.new_zeros(1), rows_R.new_zeros(1).bool()

    def write(hidden_RH: Tensor) -> None:
        uniform_DB = uniform_PDB.index_select(0, position_1)[0]

        def choose(logits_RK: Tensor, depth: int) -> Tensor:
            logits_BK = guide(logits_RK, sampling.guidance) if guided else logits_RK.float()
            codes_BW, likely_BW, crowded_B = probabilities(logits_BK, sampling, width)
            crowded.logical_or_(crowded_B.any())
            codes_B = codes_BW.gather(1, draw(likely_BW, uniform_DB[depth])[:, None])[:, 0]
            return codes_B.repeat(2) if guided else codes_B

        latest_RD.copy_(model.image_head.unroll(hidden_RH, model.codebook, choose))
        codes_PBD.index_copy_(0, position_1, latest_RD[None, :B])
        position_1.add_(1)

    write(hidden_RH)
    _repeat(lambda: write(step(model.embed_codes(latest_RD))), P - 1, capture)
    return codes_PBD, crowded


def _repeat(act: Callable[[], None], times: int, capture: bool) -> None:
    """Call a function that returns nothing; with `capture` it runs once, is captured and then replayed."""
    if capture and times > 1:
        beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            act()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            act()
        act, times = graph.replay, times - 1
    for _ in range(times):
        act()


@torch.inference_mode()
def answer_texts(
    model: UniForkModel, prompts: Sequence[Document], max_new_tokens: int, stop_id: int
) -> list[list[int]]:
    """The likeliest ids after each prompt of the task understanding, up to and without `stop_id`."""
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return answers
    starts, rows, rests = common_starts(prompts)
    batch, rest_batch = _packed(model, starts), _packed(model, rests)
    cache = model.new_cache(len(starts), batch.kinds_BT.shape[1])
    model.read(batch, cache)
    cache = cache.spread(torch.tensor(rows, device=model.device), rest_batch.kinds_BT.shape[1] + max_new_tokens - 1)
    hidden_BH = model.read(rest_batch, cache)
    step = model.decoder(cache, TASKS.index("understanding"), _TEXT_TOKEN)
    running = set(range(len(prompts)))
    for number in range(max_new_tokens):
        ids_B = model.text_logits(hidden_BH).argmax(-1)
        ids = ids_B.tolist()
        running = {row for row in running if ids[row] != stop_id}
        for row in running:
            answers[row].append(ids[row])
        if not running or number == max_new_tokens - 1:
            break
        hidden_BH = step(model.embed_tokens(ids_B))
    return answers


def common_starts(prompts: Sequence[Document]) -> tuple[list[Document], list[int], list[Document]]:
    """What prompts begin with alike: the starts, for each prompt the number of its start, and its rest.

    Prompts share a start when they are equal up to the end of their last image. A rest is never empty.
    """
    groups: dict[tuple[bytes, ...], list[int]] = defaultdict(list)
    for number, prompt in enumerate(prompts):
        end = int(np.append(0, np.flatnonzero(prompt.kinds_T != TEXT) + 1)[-1])
        start = (prompt.kinds_T[:end].tobytes(), prompt.text_ids_T[:end].tobytes(), prompt.codes_ND.tobytes())
        groups[start].append(number)
    starts, rows, rests = [], [0] * len(prompts), list(prompts)
    for row, numbers in enumerate(groups.values()):
        least = min(len(prompts[number]) for number in numbers) - 1
        tokens = np.stack([[prompts[number].kinds_T[:least], prompts[number].text_ids_T[:least]] for number in numbers])
        shared = int(np.append((tokens == tokens[0]).all((0, 1)), False).argmin())
        starts.append(_part(prompts[numbers[0]], 0, shared))
        for number in numbers:
            rows[number], rests[number] = row, _part(prompts[number], shared, len(prompts[number]))
    return starts, rows, rests


def _part(document: Document, start: int, stop: int) -> Document:
    images = [int((document.kinds_T[:end] == IMAGE).sum()) for end in (start, stop)]
    names = ("kinds_T", "text_ids_T", "loss_mask_T")
    tokens = {name: getattr(document, name)[start:stop] for name in names}
    return replace(document, **tokens, codes_ND=document.codes_ND[slice(*images)])


def guide(logits_RK: Tensor, scale: float) -> Tensor:
    """Guided logits (B, K), float32; the first half of the rows is conditional, the second is not."""
    conditional, unconditional = logits_RK.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def candidates(top_k: int, codes: int) -> int:
    """How many of all codes are looked at for the top k: a multiple of 32, which keeps the order of vectorized sums."""
    return min(codes, -(-(top_k + SPARE) // 32) * 32)


def probabilities(logits_BK: Tensor, sampling: Sampling, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """What codes are drawn from: temperature, then the top k, then the top p of what is left.

    Returns codes (B, W) in ascending order, W = `width` likeliest ones, their probabilities (B, W), and whether
    codes as likely as the top k's last have found no room (B). The code whose probability crosses top_p is kept;
    of equal logits at the border of the top k all are kept.
    """
    logits_BK = logits_BK if sampling.temperature == 1.0 else logits_BK / sampling.temperature
    codes_BW = torch.arange(width, device=logits_BK.device).expand(len(logits_BK), -1)
    if width < logits_BK.shape[1]:
        logits_BK, codes_BW = logits_BK.topk(width, sorted=False)
        codes_BW, order_BW = codes_BW.sort()
        logits_BK = logits_BK.gather(1, order_BW)
    ordered_BW, place_BW = logits_BK.sort(descending=True, stable=True)
    border_B1 = ordered_BW[:, min(sampling.top_k, width) - 1, None]
    crowded_B = ordered_BW[:, -1] >= border_B1[:, 0]
    ordered_BW = ordered_BW.masked_fill(ordered_BW < border_B1, -torch.inf)
    likely_BW = ordered_BW.softmax(-1)
    before_BW = likely_BW.cumsum(-1).roll(1, -1)
    before_BW[:, 0] = 0.0
    kept_BW = ordered_BW.masked_fill(before_BW > sampling.top_p, -torch.inf).softmax(-1)
    return codes_BW, torch.zeros_like(kept_BW).scatter(1, place_BW, kept_BW), crowded_B


def draw(probabilities_BK: Tensor, uniform_B: Tensor) -> Tensor:
    """The number of the candidate at which the running sum of probabilities exceeds a number from [0, 1)."""
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
    longest = max(1, *map(len, documents))
    return pack([[doc] if len(doc) else [] for doc in documents], longest, model.config.depth).to(model.device)


def _image_prompt(ids: Sequence[int], depth: int) -> Document:
    kinds_T = np.full(len(ids) + 1, TEXT)
    kinds_T[-1] = BEGIN_IMAGE
    ids_T = np.array([*ids, 0], np.int64)
    return Document("", "generation", kinds_T, ids_T, np.zeros(len(kinds_T), bool), np.zeros((0, depth), np.int64))

"""Decoding with a cache equals reading everything again; draws do not depend on the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_samples import (
    BACKBONES,
    CODES,
    DEPTH,
    GRID,
    PLANS,
    generation,
    noisy_model,
    rows,
    text_only,
    understanding,
)

from unifork.batch import BEGIN_IMAGE, IMAGE, TEXT, Document, pack
from unifork.config import Sampling
from unifork.models import decoder
from unifork.models import generation as decoding
from unifork.models.generation import (
    answer_texts,
    candidates,
    common_starts,
    draw,
    draws,
    generate_images,
    guide,
    probabilities,
)
from unifork.vocabulary import TASKS

torch.set_num_threads(1)
P = GRID * GRID
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]
UNCONDITIONAL = [8, 9, 7, 9]


def prompt_of(document: Document, length: int) -> Document:
    codes = document.codes_ND[: int((document.kinds_T[:length] == IMAGE).sum())]
    cut = (document.kinds_T[:length], document.text_ids_T[:length], document.loss_mask_T[:length])
    return Document(document.key, document.task, *cut, codes)


@pytest.mark.parametrize(("attention", "family"), [*(("sdpa", family) for family in BACKBONES), ("varlen", "qwen2")])
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(plan, attention, family):
    model = noisy_model(plan, family)
    model.set_attn_implementation(attention)
    images = [generation(1, 5), generation(2, 3)]
    prefix = [6, 4]
    full = [model.hidden(rows([document]))[0] for document in images]
    prompts = [prompt_of(d, n) for d, n in zip(images, prefix, strict=True)]
    cache = model.new_cache(2, 6 + P)
    hidden = model.read(pack([[d] for d in prompts], 6, DEPTH), cache)
    step = model.decoder(cache, TASKS.index("generation"), 1)
    for position in range(P):
        for row in range(2):
            assert (hidden[row] - full[row][prefix[row] - 1 + position]).abs().max() < 1e-5
        codes = torch.from_numpy(np.stack([document.codes_ND[position] for document in images]))
        hidden = step(model.embed_codes(codes))


@torch.no_grad()
def read_again(model, ids: list[int], codes: list[list[int]]) -> torch.Tensor:
    """The last hidden state of a prompt and the codes so far, without any cache."""
    kinds = np.array([TEXT] * len(ids) + [BEGIN_IMAGE] + [IMAGE] * len(codes))
    codes_ND = np.array(codes, np.int64).reshape(-1, DEPTH)
    document = Document("", "generation", kinds, np.pad(ids, (0, len(codes) + 1)), kinds < 0, codes_ND)
    return model.hidden(rows([document], tokens=len(kinds)))[0, -1:]


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("plan", PLANS[:4])
@torch.no_grad()
def test_greedy_images_equal_the_uncached_reference(plan, guidance):
    model = noisy_model(plan)
    found = generate_images(model, PROMPTS, UNCONDITIONAL, Sampling(guidance=guidance, top_k=1))
    assert found.shape == (3, P, DEPTH)
    assert len(found.unique()) > 3
    for number, prompt in enumerate(PROMPTS):
        codes: list[list[int]] = []
        for _ in range(P):
            hidden = torch.cat([read_again(model, ids, codes) for ids in (prompt, UNCONDITIONAL)])
            position: list[int] = []
            for depth in range(DEPTH):
                so_far = torch.tensor([position + [0] * (DEPTH - depth)] * 2)
                logits = model.image_head(hidden, so_far, model.codebook)[:, depth]
                position.append(int(guide(logits, guidance).argmax()))
            codes.append(position)
        assert found[number].tolist() == codes


def test_a_image_does_not_depend_on_its_batch():
    model = noisy_model(PLANS[1])
    sampling = Sampling(top_k=15, seed=3)
    together = generate_images(model, PROMPTS, UNCONDITIONAL, sampling)
    alone = generate_images(model, [PROMPTS[1]], UNCONDITIONAL, sampling, image_numbers=[1])
    assert torch.equal(alone[0], together[1])
    assert not torch.equal(generate_images(model, PROMPTS, UNCONDITIONAL, Sampling(top_k=15, seed=4)), together)
    assert generate_images(model, [], UNCONDITIONAL, sampling).shape == (0, P, DEPTH)


@pytest.mark.parametrize("plan", PLANS[:4])
@torch.no_grad()
def test_answers_equal_the_uncached_reference_and_stop(plan):
    model = noisy_model(plan)
    prompts = [prompt_of(understanding(1), 14), prompt_of(text_only(1), 5), prompt_of(understanding(2, 0), 13)]
    wanted = []
    for prompt in prompts:
        kinds, ids = list(prompt.kinds_T), list(prompt.text_ids_T)
        for _ in range(6):
            document = Document(
                "", "understanding", np.array(kinds), np.array(ids), np.zeros(len(ids), bool), prompt.codes_ND
            )
            logits = model.text_logits(model.hidden(rows([document], tokens=len(ids)))[0, -1])
            kinds, ids = [*kinds, TEXT], [*ids, int(logits.argmax())]
        wanted.append(ids[len(prompt) :])
    assert answer_texts(model, prompts, 6, stop_id=-1) == wanted
    stop = wanted[0][3]
    cut = [answer[: answer.index(stop)] if stop in answer else answer for answer in wanted]
    assert answer_texts(model, prompts, 6, stop_id=stop) == cut


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_drawn_images_equal_the_uncached_reference(plan):
    """Every draw from a sort of all logits, of everything read again."""
    model, sampling = noisy_model(plan), Sampling(guidance=3.0, temperature=0.9, top_k=12, top_p=0.8, seed=6)
    found = generate_images(model, PROMPTS, UNCONDITIONAL, sampling, image_numbers=[4, 0, 9])
    for number, prompt, codes in zip([4, 0, 9], PROMPTS, found.tolist(), strict=True):
        uniform = draws(6, number, P, DEPTH)
        for position in range(P):
            hidden = torch.cat([read_again(model, ids, codes[:position]) for ids in (prompt, UNCONDITIONAL)])
            logits = model.image_head(hidden, torch.tensor([codes[position]] * 2), model.codebook)
            for depth in range(DEPTH):
                likely = all_probabilities(guide(logits[:, depth], 3.0), sampling)
                assert draw(likely, uniform[position, depth, None]).tolist() == [codes[position][depth]]


def all_probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The plain rule: a stable sort of every code, and a mask."""
    logits = logits / sampling.temperature
    least = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
    ordered, order = logits.masked_fill(logits < least, -torch.inf).sort(descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
    before[:, 0] = 0.0
    kept = ordered.masked_fill(before > sampling.top_p, -torch.inf).softmax(-1)
    return torch.zeros_like(kept).scatter(1, order, kept)


def spread_out(logits: torch.Tensor, sampling: Sampling, width: int) -> torch.Tensor:
    """Probabilities of all codes from those of the candidates."""
    codes, likely, _ = probabilities(logits, sampling, width)
    assert (codes.diff() > 0).all()
    return torch.zeros_like(logits).scatter(1, codes, likely)


def test_top_k_comes_before_top_p_and_the_crossing_code_is_kept():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    found = spread_out(logits, Sampling(top_k=3, top_p=0.5), 4)
    assert torch.allclose(found, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    assert torch.allclose(spread_out(logits, Sampling(top_k=900, top_p=1.0), 4), logits.exp())
    assert spread_out(logits, Sampling(top_p=0.0), 4).tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("top_k", [1, 50, 900])
def test_candidates_have_bit_for_bit_the_probabilities_of_a_sort_of_all_codes(top_k, scale):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(8, 4096, generator=generator)
    logits[4:] = logits[4:].round(decimals=2)  # with equal ones
    sampling = Sampling(top_k=top_k, temperature=0.7)
    width = candidates(top_k, 4096)
    assert top_k + 64 <= width < top_k + 96
    crowded = probabilities(logits, sampling, width)[2]
    same = (spread_out(logits, sampling, width) == all_probabilities(logits, sampling)).all(1)
    assert (same | crowded).all()
    assert not crowded[:4].any()
    assert torch.equal(spread_out(logits, sampling, 4096), all_probabilities(logits, sampling))


@torch.no_grad()
def test_more_equal_logits_than_candidates_are_drawn_from_all_codes(monkeypatch):
    model, sampling = noisy_model(PLANS[1]), Sampling(top_k=2, seed=1)
    model.image_head.classifier.weight[:] = model.image_head.classifier.weight[:2].repeat(12, 1)[:CODES]
    model.image_head.classifier.bias[:] = 0.0
    wanted = generate_images(model, PROMPTS, UNCONDITIONAL, sampling)
    assert int(wanted.max()) > 8
    monkeypatch.setattr(decoding, "candidates", lambda top_k, codes: 4)
    assert torch.equal(generate_images(model, PROMPTS, UNCONDITIONAL, sampling), wanted)


@pytest.mark.parametrize("plan", PLANS)
def test_what_questions_begin_with_alike_is_read_once_and_answers_stay(plan, monkeypatch):
    model = noisy_model(plan)
    first, second = understanding(1, answer=9), understanding(2, answer=9)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 90, len(first)) for _ in range(4)]
    texts[2][: len(first) - 9] = texts[0][: len(first) - 9]  # also some words alike
    start = first.kinds_T.cumsum() > 0
    prompts = [
        prompt_of(replace(image, text_ids_T=np.where(start & (image.kinds_T == TEXT), ids, image.text_ids_T)), length)
        for image, ids, length in zip([first, second, first, first], texts, [20, 19, 16, 22], strict=True)
    ]
    prompts += [text_only(1, 7), prompt_of(second, 13), text_only(2, 5), prompt_of(first, 6), text_only(3, 1)]
    alone = [answer_texts(model, [prompt], 5, stop_id=-1)[0] for prompt in prompts]
    batches = []
    pack_rows = decoding.pack
    monkeypatch.setattr(decoding, "pack", lambda rows, *given: batches.append(rows) or pack_rows(rows, *given))
    assert answer_texts(model, prompts, 5, stop_id=-1) == alone
    assert answer_texts(model, prompts[::-1], 5, stop_id=-1) == alone[::-1]
    assert [len(rows) for rows in batches[:2]] == [4, len(prompts)]
    assert sum(len(doc.codes_ND) for row in batches[0] for doc in row) <= 2 * P + 3
    starts, numbers, rests = common_starts(prompts)
    for prompt, number, rest in zip(prompts, numbers, rests, strict=True):
        assert len(rest) > 0
        for name in ("kinds_T", "text_ids_T", "codes_ND"):
            joined = np.concatenate([getattr(starts[number], name), getattr(rest, name)])
            assert np.array_equal(joined, getattr(prompt, name))


def test_draws_follow_the_probabilities_and_never_pick_the_impossible():
    given = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    found = draw(given.expand(4000, -1), uniform)
    assert torch.bincount(found, minlength=5).tolist() == [0, 1000, 0, 3000, 0]
    assert torch.equal(draws(1, 2, P, DEPTH), draws(1, 2, P, DEPTH))
    assert not torch.equal(draws(1, 2, P, DEPTH), draws(1, 2 + 2**32, P, DEPTH))


@pytest.mark.parametrize("plan", ["unifork:2", "uni-x:1:1"])
def test_few_rows_and_large_weights_are_multiplied_the_other_way_round(plan, monkeypatch):
    model, sampling = noisy_model(plan), Sampling(seed=3)
    usual, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda rows, *others: usual.append(1) or linear(rows, *others))

    def drawn(prompts):
        usual.clear()
        return generate_images(model, prompts, UNCONDITIONAL, sampling), len(usual)

    single, three = drawn(PROMPTS[:1]), drawn(PROMPTS)
    monkeypatch.setattr(decoder, "LARGE_WEIGHT", 1)
    again, three_again = drawn(PROMPTS[:1]), drawn(PROMPTS)
    assert torch.equal(again[0], single[0])
    assert again[1] < single[1] / 10  # only what reads the prompts
    assert torch.equal(three_again[0], three[0])
    assert three_again[1] > three[1] / 2  # six rows


@pytest.mark.parametrize("bias", [True, False])
@torch.inference_mode()
def test_the_other_way_round_is_the_same_map(bias):
    linear = decoder.Linear(512, 512, bias)
    for count in (1, 2, 3, 4):
        given = torch.randn(count, 1, 512)
        wanted = torch.nn.functional.linear(given, linear.weight, linear.bias)
        torch.testing.assert_close(linear(given), wanted, rtol=1e-5, atol=1e-5)
        assert linear(given).shape == wanted.shape

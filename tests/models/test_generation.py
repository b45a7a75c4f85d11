"""Decoding with a cache equals reading everything again; draws do not depend on the batch."""

import numpy as np
import pytest
import torch
from model_samples import (
    BACKBONES,
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
from unifork.models.generation import answer_texts, draw, draws, generate_images, guide, probabilities

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
    hidden, context = model.prefill(pack([[d] for d in prompts], 6, DEPTH))
    for position in range(P):
        for row in range(2):
            assert (hidden[row] - full[row][prefix[row] - 1 + position]).abs().max() < 1e-5
        codes = torch.from_numpy(np.stack([document.codes_ND[position] for document in images]))
        hidden = model.step(model.embed_codes(codes), 1, context)


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


def test_top_k_comes_before_top_p_and_the_crossing_code_is_kept():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    found = probabilities(logits, Sampling(top_k=3, top_p=0.5))
    assert torch.allclose(found, torch.tensor([[0.0, 4 / 7, 0.0, 3 / 7]]))
    assert torch.allclose(probabilities(logits, Sampling(top_k=900, top_p=1.0)), logits.exp())
    assert probabilities(logits, Sampling(top_p=0.0)).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_draws_follow_the_probabilities_and_never_pick_the_impossible():
    given = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    found = draw(given.expand(4000, -1), uniform)
    assert torch.bincount(found, minlength=5).tolist() == [0, 1000, 0, 3000, 0]
    assert torch.equal(draws(1, 2, P, DEPTH), draws(1, 2, P, DEPTH))
    assert not torch.equal(draws(1, 2, P, DEPTH), draws(1, 2 + 2**32, P, DEPTH))

"""What is processed together follows from the device, keeps an image's questions together and changes no result."""

from types import SimpleNamespace

import numpy as np
import pytest

from unifork import inference
from unifork.config import Sampling
from unifork.inference import Engine, most_tokens_at_once

QUESTIONS = ["what color?", "how many?", "is it red?"]


@pytest.fixture(scope="module")
def engine(tiny_root):
    return Engine.load(tiny_root / "models/unifork-init")


def recorded(monkeypatch, name):
    """How many prompts each call of a function of `inference` gets."""
    calls, function = [], getattr(inference, name)
    monkeypatch.setattr(
        inference, name, lambda model, prompts, *a, **k: calls.append(prompts) or function(model, prompts, *a, **k)
    )
    return calls


def codes_of(engine, images: int) -> np.ndarray:
    config = engine.model.config
    rng = np.random.default_rng(0)
    return rng.integers(0, config.codebook_size, (images, config.positions, config.depth))


def test_results_do_not_depend_on_the_batch(engine, monkeypatch):
    prompts, codes = ["red", "a blue square", "two"], codes_of(engine, 2).repeat(3, 0)
    calls = recorded(monkeypatch, "generate_images")
    found = []
    for batch in (None, 1, 2):
        other = Engine(engine.model, engine.tokenizer, batch)
        found.append((other.generate_images(prompts, Sampling(seed=2)), other.answer_questions(codes, QUESTIONS * 2)))
    assert [len(call) for call in calls] == [3, 1, 1, 1, 2, 1]
    for images, answers in found[1:]:
        assert np.array_equal(images, found[0][0])
        assert answers == found[0][1]


def test_questions_about_an_image_stay_together_and_long_ones_apart(engine, monkeypatch):
    codes = np.concatenate([codes_of(engine, 4)] * 3)  # images in turns
    questions = [text for text in QUESTIONS for _ in range(4)]
    questions[5] = "is it red? " * 30
    calls = recorded(monkeypatch, "answer_texts")
    answers = Engine(engine.model, engine.tokenizer, 6).answer_questions(codes, questions, max_new_tokens=2)
    monkeypatch.undo()
    alone = [engine.answer_questions(codes[n : n + 1], [questions[n]], max_new_tokens=2)[0] for n in range(12)]
    assert answers == alone
    assert [len(call) for call in calls] == [6, 6]
    *short, long = [prompt for call in calls for prompt in call]
    assert len(long) > max(map(len, short))
    numbers = [next(n for n in range(4) if np.array_equal(codes[n], prompt.codes_ND)) for prompt in short]
    assert numbers == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3]


def test_the_batch_follows_the_free_memory_of_a_device(engine, monkeypatch):
    assert most_tokens_at_once(engine.model) == inference.MOST_TOKENS
    dense, config = engine.model.config.backbone_config(), engine.model.config
    layers, weight = len(engine.model.layers), engine.model.embed_tokens.weight
    on_device = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), new_cache=engine.model.new_cache, embed_tokens=engine.model.embed_tokens,
        config=config,
    )  # fmt: skip
    kept = 2 * layers * dense.num_key_value_heads * dense.hidden_size // dense.num_attention_heads
    each = weight.element_size() * (kept + 4 * dense.intermediate_size)
    monkeypatch.setattr(inference, "free_bytes", lambda device: 1000 * each)
    assert most_tokens_at_once(on_device) == 800
    several = Engine(on_device, engine.tokenizer)
    assert list(several._batches(range(5), [300, 300, 300, 500, 900])) == [
        range(2),
        range(2, 3),
        range(3, 4),
        range(4, 5),
    ]
    assert list(several._batches(range(0), [])) == []
    assert [len(part) for part in several._batches(range(600), [1] * 600)] == [256, 256, 88]

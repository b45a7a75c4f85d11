"""The chunked loss is plain cross entropy: sums, gradients, low precision, nothing to learn."""

import pytest
import torch
import torch.nn.functional as F
from model_samples import gradients, largest_difference, mixed_batch, noisy_model, rows, understanding

from unifork.models import losses
from unifork.models.losses import linear_cross_entropy

ROWS, WIDTH, CLASSES = 23, 16, 37


def tensors(dtype, bias=True, count=ROWS):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden, weight, offset = draw(count, WIDTH), draw(CLASSES, WIDTH), draw(CLASSES) if bias else None
    return hidden, weight, offset, torch.randint(0, CLASSES, (count,), generator=generator)


def naive(hidden, weight, bias, target):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="none")


def results(function, arguments, autocast=False):
    """The losses, and the gradients of their sum in which each row has another weight."""
    leaves = [argument for argument in arguments if argument is not None and argument.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = function(*arguments)
    scale = torch.linspace(-1, 2, len(loss), dtype=loss.dtype)
    return [loss.detach(), *torch.autograd.grad((loss * scale).sum(), leaves)]


@pytest.fixture(params=[1, 5 * CLASSES, ROWS * CLASSES], ids=["rows one by one", "5 rows a chunk", "plain"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_losses_and_gradients_are_those_of_plain_cross_entropy(chunk, dtype, tolerance, bias):
    arguments = tensors(dtype, bias)
    found, wanted = results(linear_cross_entropy, arguments), results(naive, arguments)
    assert len(found) == 3 + bias
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_autocast_keeps_float32_losses_and_gradients(chunk):
    arguments = tensors(torch.float32)
    found, wanted = results(linear_cross_entropy, arguments, autocast=True), results(naive, arguments, autocast=True)
    for ours, theirs, name in zip(found, wanted, ["loss", "hidden", "weight", "bias"], strict=True):
        assert ours.dtype == theirs.dtype == torch.float32, name
        # bfloat16 products round at 2^-8; the loss itself sees the same logits in both
        assert (ours - theirs).abs().max() <= (1e-6 if name == "loss" else 2e-2) * theirs.abs().max(), name


@pytest.mark.slow  # for the compiler
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_compiled_chunks_are_the_same(monkeypatch, dtype, tolerance, bias):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * CLASSES)
    arguments = tensors(dtype, bias)
    wanted = results(linear_cross_entropy, arguments)
    losses._on.cache_clear()
    monkeypatch.setattr(losses, "COMPILED_ON", {"cpu"})
    compiled = []
    compiler = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: compiled.append(function.__name__) or compiler(function, **options),
    )
    found = results(linear_cross_entropy, arguments)
    losses._on.cache_clear()
    assert compiled == ["_loss", "_slope"]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_no_rows_give_zero_gradients(chunk):
    found = results(linear_cross_entropy, tensors(torch.float32, count=0))
    assert found[0].shape == (0,)
    assert all(not gradient.any() for gradient in found[1:])


def test_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 5 * CLASSES)
    sizes, linear = [], F.linear
    monkeypatch.setattr(F, "linear", lambda *given: sizes.append(len(given[0])) or linear(*given))
    results(linear_cross_entropy, tensors(torch.float32))
    assert sizes == [5, 5, 5, 5, 3] * 2


@pytest.mark.parametrize("family", ["qwen2", "llama"], ids=["tied", "untied"])
@pytest.mark.parametrize("batch", [mixed_batch(), rows([understanding(1)]), rows([])], ids=["both", "text", "nothing"])
def test_a_model_with_large_vocabularies_learns_the_same(monkeypatch, family, batch):
    model = noisy_model("shared*2 task*2 norm:task", family).double().train()
    found = []
    for size in (losses.CHUNK_LOGITS, 100):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", size)
        out = model(batch)
        (out.text_loss_sum + out.image_loss_sum_D.sum()).backward()
        found.append((out, gradients(model)))
    (plain, plain_gradients), (chunked, chunked_gradients) = found
    assert plain_gradients.keys() == dict(model.named_parameters()).keys()
    for ours, theirs in zip(chunked, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)
    difference, name = largest_difference(chunked_gradients, plain_gradients)
    assert difference <= 1e-10, name

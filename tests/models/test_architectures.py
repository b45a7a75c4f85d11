"""What must hold for every layer plan: it is the dense model at the start, packing changes nothing,
empty rows cost nothing, checkpointing changes no bit."""

import dataclasses

import pytest
import torch
from model_samples import (
    BACKBONES,
    DEPTH,
    JOINT,
    PLANS,
    dense_model,
    generation,
    gradients,
    mixed_batch,
    noisy_model,
    rows,
    text_only,
    understanding,
    warm_model,
)

from unifork.models.layer_plan import KINDS
from unifork.vocabulary import TASKS

torch.set_num_threads(1)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("plan", PLANS)
def test_warm_started_plans_equal_the_dense_model(plan, family):
    document = text_only(3, 20)
    model = warm_model(plan, family)
    with torch.no_grad():
        wanted = dense_model(family)(torch.from_numpy(document.text_ids_T)[None]).logits
        for task in TASKS:
            found = model.hidden(rows([dataclasses.replace(document, task=task)], tokens=20))
            assert torch.equal(model.text_logits(found), wanted)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("plan", JOINT)
def test_all_branches_equal_the_dense_model_on_a_image(plan, family):
    """Both tasks and modalities, without and with padding; the dense model reads the same embeddings.

    Products over fewer rows, those of one modality or with padding, are rounded in another order.
    """
    model = warm_model(plan, family)
    exact = "modality" not in model.routes_needed
    for document in (understanding(1), generation(1)):
        for tokens, tolerance in ((len(document), 0.0 if exact else 1e-5), (64, 1e-5)):
            batch = rows([document], tokens=tokens)
            with torch.no_grad():
                embedded = model.embed(batch)[:, : len(document)]
                wanted = dense_model(family)(inputs_embeds=embedded).logits
                found = model.text_logits(model.hidden(batch))[:, : len(document)]
            assert (found - wanted).abs().max() <= tolerance


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("plan", PLANS)
def test_a_packed_row_equals_its_documents_one_by_one(plan, family):
    model = noisy_model(plan, family)
    documents = [understanding(1), generation(1), text_only(1), generation(2, 2)]
    with torch.no_grad():
        packed = model.hidden(rows(documents, tokens=80))[0]
        together = model(rows(documents, tokens=80))
        alone = [model(rows([document], tokens=len(document))) for document in documents]
        start = 0
        for document in documents:
            single = model.hidden(rows([document], tokens=len(document)))[0]
            assert (packed[start : start + len(document)] - single).abs().max() < 1e-5
            start += len(document)
    for total, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(total, sum(parts), rtol=1e-5, atol=1e-5)


def test_routes_by_slicing_equal_routes_by_gathering():
    model = noisy_model(PLANS[1])
    grouped = rows([understanding(1), text_only(1)], [generation(1), generation(2)])
    assert grouped.tasks_grouped
    found = []
    for batch in (grouped, dataclasses.replace(grouped, tasks_grouped=False)):
        losses = model(batch)
        (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
        found.append((losses, gradients(model)))
    (sliced, sliced_gradients), (gathered, gathered_gradients) = found
    assert all(torch.equal(a, b) for a, b in zip(sliced, gathered, strict=True))
    assert all(torch.equal(sliced_gradients[name], gathered_gradients[name]) for name in sliced_gradients)


@pytest.mark.parametrize("plan", PLANS)
def test_an_empty_row_is_legal_and_teaches_nothing(plan):
    model = noisy_model(plan).train()
    losses = model(rows([]))
    assert losses.text_loss_sum == 0
    assert torch.equal(losses.image_loss_sum_D, torch.zeros(DEPTH))
    (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert all(not gradient.any() for gradient in found.values())


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("document", [understanding(1), generation(1), text_only(1)], ids=lambda d: d.key)
@pytest.mark.parametrize("plan", PLANS)
def test_every_parameter_is_in_the_graph_of_every_batch(plan, document, family):
    model = noisy_model(plan, family).train()
    losses = model(rows([document]))
    (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    other = {"understanding": "generation", "generation": "understanding"}[document.task]
    assert all(not found[name].any() for name in found if f".{other}." in name)


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("plan", PLANS)
def test_activation_checkpointing_changes_no_bit(plan, family):
    model = noisy_model(plan, family).train()
    found = []
    for kinds in ((), (*KINDS, "head")):
        model.set_activation_checkpointing(kinds)
        losses = model(mixed_batch())
        (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
        found.append(gradients(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_losses_are_plain_cross_entropy():
    model = noisy_model(PLANS[1])
    document = understanding(1)
    batch = rows([document], [generation(1)])
    with torch.no_grad():
        losses = model(batch)
        hidden = model.hidden(batch)
        log_words = model.text_logits(hidden[0]).log_softmax(-1)
        text = -sum(log_words[t - 1, document.text_ids_T[t]] for t in document.loss_mask_T.nonzero()[0])
        drawn = generation(1)
        start = int((drawn.kinds_T == 1).argmax())
        codes = torch.from_numpy(drawn.codes_ND)
        log_codes = model.image_head(hidden[1, start - 1 : start - 1 + len(codes)], codes, model.codebook).log_softmax(
            -1
        )
        image = -log_codes.gather(2, codes[..., None])[..., 0].sum(0)
    assert torch.allclose(losses.text_loss_sum, text, rtol=1e-5)
    assert torch.allclose(losses.image_loss_sum_D, image, rtol=1e-5)


def test_images_enter_as_sums_of_code_vectors_between_their_borders():
    model = noisy_model(PLANS[0])
    document = understanding(1, before=1)
    with torch.no_grad():
        found = model.embed(rows([document]))[0]
        codes = torch.from_numpy(document.codes_ND)
        image = model.connector(sum(model.codebook[codes[:, depth]] for depth in range(DEPTH)))
        begin, end = model.connector.token_embedding.weight
        words = model.embed_tokens(torch.from_numpy(document.text_ids_T))
    P = len(codes)
    assert torch.equal(found[0], words[0])
    assert torch.equal(found[1], begin)
    assert torch.allclose(found[2 : 2 + P], image, atol=1e-6)
    assert torch.equal(found[2 + P], end)
    assert torch.equal(found[3 + P : len(document)], words[3 + P :])

"""Tokens reach their branch and come back, and see exactly what they should."""

import pytest
import torch
from model_samples import GRID, generation, mixed_batch, rows, several, text_only, understanding

from unifork.batch import IMAGE, NO_DOCUMENT, TEXT
from unifork.errors import ConfigError
from unifork.models.decoder import Route, batch_routes, gathered, modalities, routed, step_routes
from unifork.models.masks import attention_mask, visible_BTS

NEEDED = frozenset({"none", "task", "modality"})


def test_split_gives_every_branch_its_own_tokens_and_join_undoes_it():
    batch = mixed_batch()
    routes = batch_routes(batch, NEEDED)
    tokens = torch.arange(batch.kinds_BT.numel() * 2).view(-1, 2)
    for route, labels in (("task", batch.tasks_BT), ("modality", modalities(batch.kinds_BT))):
        parts = routes[route].split(tokens)
        for branch, part in enumerate(parts):
            assert torch.equal(part, tokens[labels.flatten() == branch])
        assert torch.equal(routes[route].join(parts), tokens)


def test_grouped_tokens_are_sliced_and_equal_gathered_ones():
    batch = rows([understanding(1), text_only(2)], [generation(1)])
    sliced = batch_routes(batch, NEEDED)["task"]
    assert sliced.order_X is None
    assert sliced.inverse_X is None
    other = gathered(batch.tasks_BT.flatten(), batch.task_counts)
    branches = {"understanding": 2.0, "generation": -3.0}
    tokens = torch.randn(batch.kinds_BT.numel(), 4)
    results = [routed(branches, route, lambda scale, part: scale * part, tokens) for route in (sliced, other)]
    assert torch.equal(*results)
    assert batch_routes(mixed_batch(), NEEDED)["task"].order_X is not None


def test_every_branch_is_called_even_without_tokens_when_there_are_gradients():
    calls = []
    routed(
        {"a": 0, "b": 1},
        Route((3, 0)),
        lambda branch, part: calls.append((branch, len(part))) or part,
        torch.ones(3, 1),
    )
    assert calls == [(0, 3), (1, 0)]


def test_where_nothing_is_reduced_a_branch_without_tokens_is_left_out():
    calls = []
    for route in (Route((3, 0), every=False), step_routes(3, task=1, modality=1)["task"]):
        routed({"a": 0, "b": 1}, route, lambda branch, part: calls.append((branch, len(part))) or part, torch.ones(3))
    assert calls == [(0, 3), (1, 3)]
    assert step_routes(5, task=1, modality=1)["task"].counts == (0, 5)


def test_packed_visibility_is_the_plain_rule():
    batch = mixed_batch()
    seen = visible_BTS(batch.documents_BT, None, 64)
    kinds = modalities(batch.kinds_BT)
    isolated = visible_BTS(batch.documents_BT, kinds, 64)
    for b in range(2):
        for q in range(64):
            for k in range(64):
                plain = k <= q and batch.documents_BT[b, q] == batch.documents_BT[b, k]
                assert bool(seen[b, q, k]) == plain
                assert bool(isolated[b, q, k]) == (plain and bool(kinds[b, q] == kinds[b, k]))
    assert set(batch.kinds_BT.flatten().tolist()) >= {TEXT, IMAGE}


def test_decoding_sees_the_last_rows_of_the_whole_mask_with_padding_on_either_side():
    documents = torch.tensor([[NO_DOCUMENT, NO_DOCUMENT, 0, 0, 0, 0], [0, 0, 0, NO_DOCUMENT, NO_DOCUMENT, 0]])
    whole = visible_BTS(documents, None, 6)
    assert torch.equal(visible_BTS(documents, None, 2), whole[:, -2:])
    assert whole[0, -1].tolist() == [False, False, True, True, True, True]
    assert whole[1, -1].tolist() == [True, True, True, False, False, True]
    assert whole.diagonal(dim1=1, dim2=2).all()


def test_forms_of_the_mask_agree():
    documents = mixed_batch().documents_BT
    boolean = attention_mask("sdpa", documents, None, 64, torch.float32)
    additive = attention_mask("eager", documents, None, 64, torch.float32)
    assert torch.equal(additive == 0, boolean)


def test_unknown_attention_is_refused():
    with pytest.raises(ConfigError, match="sdpa"):
        attention_mask("spda", torch.zeros(1, 2), None, 2, torch.float32)


def test_texts_go_to_the_branches_that_read_text_and_several_images_to_those_of_images():
    batch = rows([text_only(1, 20)], [several(1, 3)], tokens=45)
    routes = batch_routes(batch, NEEDED)
    assert routes["task"].counts == (90, 0)  # understanding, generation
    images = 3 * (GRID * GRID + 2)
    assert routes["modality"].counts == (90 - images, images)
    text, image = (torch.arange(90)[modalities(batch.kinds_BT).flatten() == kind] for kind in (0, 1))
    assert set(text[text < 45].tolist()) == set(range(45))
    seen = visible_BTS(batch.documents_BT, modalities(batch.kinds_BT), 45)[1]
    last = int(image[-1]) - 45
    assert seen[last].nonzero().flatten().tolist() == (image - 45).tolist()  # all images before it, and no word

"""Who sees whom, on every path that attention can take: documents are apart, isolated modalities are apart."""

import copy
import dataclasses
import sys
import types

import numpy as np
import pytest
import torch
from model_samples import (
    BACKBONES,
    PLANS,
    dense_model,
    generation,
    gradients,
    mixed_batch,
    noisy_model,
    rows,
    several,
    text_only,
    understanding,
    warm_model,
)

from unifork.batch import TEXT, pack
from unifork.models import masks
from unifork.models.decoder import modalities
from unifork.models.layer_plan import without_branch
from unifork.models.masks import MASKS, by_kernel, one_by_one, sequences

torch.set_num_threads(1)


def model_with(attention: str, plan: str, family: str = "qwen2"):
    model = noisy_model(plan, family)
    model.set_attn_implementation(attention)
    return model


PATHS = [*((attention, "qwen2") for attention in MASKS), ("sdpa", "llama"), ("eager", "llama")]
"""Attention and family; the other path is not of the family."""


@pytest.mark.parametrize(("attention", "family"), PATHS)
@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_changing_a_document_leaves_the_others_bit_identical(plan, attention, family):
    model = model_with(attention, plan, family)
    first, last = understanding(1), generation(2)
    before, after = (
        model.text_logits(model.hidden(rows([first, middle, last], tokens=60)))[0]
        for middle in (generation(1), generation(7))
    )
    middle = slice(len(first), len(first) + len(generation(1)))
    assert not torch.equal(before[middle], after[middle])
    assert torch.equal(before[: middle.start], after[: middle.start])
    assert torch.equal(before[middle.stop :], after[middle.stop :])


@pytest.mark.parametrize(("attention", "family"), PATHS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("document", [text_only(1), several(1, 2), several(2, 3)], ids=["text", "two", "three"])
def test_a_document_of_any_number_of_images_loses_beside_others_what_it_loses_alone(plan, attention, family, document):
    """The others have no targets, so both the losses and their gradients are those of the document."""
    model = model_with(attention, plan, family).train()
    given = [dataclasses.replace(other, loss_mask_T=other.loss_mask_T & False) for other in (understanding(1),) * 2]
    given.append(dataclasses.replace(several(3, 2), loss_mask_T=np.zeros(len(several(3, 2)), bool)))
    drawn = dataclasses.replace(generation(2), supervised_positions=0)
    alone, beside = rows([document], tokens=len(document)), rows([given[0], document, drawn], given[1:], tokens=100)
    wanted = document.text_ids_T[document.loss_mask_T].tolist()
    results = []
    for batch in (alone, beside):
        assert batch.text_target_S.tolist() == wanted
        assert len(batch.image_target_MD) == 0
        losses = model(batch)
        losses.text_loss_sum.backward()
        results.append((losses.text_loss_sum, losses.image_loss_sum_D.sum(), gradients(model)))
    (text, image, found), (text_beside, image_beside, found_beside) = results
    assert text > 0
    assert image == image_beside == 0
    assert abs(text - text_beside) < 1e-4
    assert all((found[name] - found_beside[name]).abs().max() < 1e-4 for name in found)


@pytest.mark.parametrize("attention", sorted(set(MASKS) - {"sdpa"}))
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("batch", [mixed_batch(), rows([several(1, 3), text_only(1)], [several(2, 2)])])
@torch.no_grad()
def test_attention_implementations_agree(plan, attention, batch):
    wanted = model_with("sdpa", plan).hidden(batch)
    assert (model_with(attention, plan).hidden(batch) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("attention", ["eager", "varlen"])
@pytest.mark.parametrize("plan", PLANS)
def test_gradients_of_attention_implementations_agree(plan, attention):
    found = []
    for name in ("sdpa", attention):
        model = model_with(name, plan).train()
        losses = model(mixed_batch())
        (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
        found.append(gradients(model))
    assert all((found[0][name] - found[1][name]).abs().max() < 1e-4 for name in found[0])


@pytest.mark.parametrize("attention", MASKS)
@torch.no_grad()
def test_isolated_layers_keep_text_and_image_apart_and_others_do_not(attention):
    model = model_with(attention, "uni-x:2:0")
    kept = {}
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: kept.setdefault(index, []).append(output))
    document = understanding(1)
    other = dataclasses.replace(document, text_ids_T=(document.text_ids_T + 1) % 90)
    for text in (document, other):
        model.hidden(rows([text], tokens=len(text)))
    image = torch.from_numpy(document.kinds_T != TEXT)
    same = [torch.equal(before[image], after[image]) for before, after in kept.values()]
    assert same == [True, True, False, False]


@pytest.mark.parametrize(("attention", "family"), PATHS)
@pytest.mark.parametrize("plan", ["uni-x:1:1", "uni-x:4:0", "task_mlp*2 modality_isolated*2 norm:task"])
@torch.no_grad()
def test_isolated_layers_equal_each_modality_of_each_document_read_alone(plan, attention, family):
    """Gather the tokens, read them with transformers' causal layer at their positions, scatter."""
    model = model_with(attention, plan, family)
    batch = mixed_batch()
    kept = {}
    for layer in model.layers:
        if layer.kind.isolated:
            layer.register_forward_hook(lambda module, args, output: kept.update({module.index: (args[0], output)}))
    model.hidden(batch)
    groups = torch.stack([batch.documents_BT, modalities(batch.kinds_BT)], -1)
    assert kept
    for index, (given_XH, found_XH) in kept.items():
        layers = [dense_layer(model, index, branch, family) for branch in ("text", "image")]
        for row, row_groups in enumerate(groups):
            for document, modality in row_groups.unique(dim=0).tolist():
                chosen = (row_groups == torch.tensor([document, modality])).all(-1)
                given, found = (x_XH.view(*groups.shape[:2], -1)[row][chosen] for x_XH in (given_XH, found_XH))
                angles = model.rotary_emb(given[None], batch.positions_BT[row][chosen][None])
                alone = layers[modality](given[None], position_embeddings=angles)[0]
                assert (found - alone).abs().max() < 1e-5


def dense_layer(model, index: int, branch: str, family: str):
    """One branch of a fully split layer as transformers' own layer."""
    layer = copy.deepcopy(dense_model(family).model.layers[index])
    prefix = f"layers.{index}."
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}
    layer.load_state_dict(
        {without_branch(name).removeprefix(prefix): tensor for name, tensor in state.items() if f".{branch}." in name}
    )
    return layer


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_transformers_leaks_between_packed_documents_and_ours_does_not(family):
    """It finds borders in the positions only without a cache, which it makes by default, and without a mask."""
    dense, model = dense_model(family), warm_model("shared", family)
    last = text_only(2, 10)
    found = {"default": [], "mask of ones": [], "neither": [], "ours": [], "ours with a cache": []}
    for first in (text_only(1, 12), text_only(9, 12)):
        batch = rows([first, last], tokens=22)
        packed = {"input_ids": batch.text_ids_BT, "position_ids": batch.positions_BT}
        ones = torch.ones_like(batch.text_ids_BT)
        found["default"].append(dense(**packed).logits)
        found["mask of ones"].append(dense(**packed, attention_mask=ones, use_cache=False).logits)
        found["neither"].append(dense(**packed, use_cache=False).logits)
        found["ours"].append(model.text_logits(model.hidden(batch)))
        found["ours with a cache"].append(model.text_logits(model.hidden(batch, model.new_cache(1, 22))))
    isolated = {name for name, (logits, other) in found.items() if torch.equal(logits[:, 12:], other[:, 12:])}
    assert isolated == {"neither", "ours", "ours with a cache"}


@pytest.mark.parametrize("family", BACKBONES)
@torch.no_grad()
def test_transformers_cuts_a_document_where_its_positions_jump_and_ours_does_not(family):
    dense, model = dense_model(family), warm_model("shared", family)
    found = {"transformers": [], "ours": []}
    for first_id in (3, 4):
        batch = rows([text_only(1, 12)], tokens=12)
        batch.text_ids_BT[0, 0] = first_id
        batch.positions_BT[0, 6:] += 5
        inputs = {"input_ids": batch.text_ids_BT, "position_ids": batch.positions_BT}
        found["transformers"].append(dense(**inputs, use_cache=False).logits)
        found["ours"].append(model.text_logits(model.hidden(batch)))
    cut = {name for name, (logits, other) in found.items() if torch.equal(logits[:, 6:], other[:, 6:])}
    assert cut == {"transformers"}


def awkward_batch():
    """Neither padding nor images in the first row, nothing but padding in the last."""
    return rows([text_only(1, 20)], [generation(2, 3), text_only(1), understanding(2, 0)], [], tokens=64)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(
    "batch",
    [
        mixed_batch(),
        awkward_batch(),
        pack([[text_only(1, 20)]], 20, 3),
        rows([several(1, 3), text_only(1)], [several(2, 2)]),
    ],
    ids=["mixed", "awkward", "full", "several"],
)
def test_sequences_are_the_documents_and_their_branches_in_order(batch, isolated):
    kinds_BT = modalities(batch.kinds_BT)
    found = sequences(batch.documents_BT, kinds_BT if isolated else None, batch.document_counts)
    B, T = kinds_BT.shape
    wanted: dict[tuple[int, ...], list[int]] = {}
    for slot in range(B * T):
        b, t = divmod(slot, T)
        document = int(batch.documents_BT[b, t])
        wanted.setdefault((b, document % (T + 1), int(kinds_BT[b, t]) * isolated), []).append(slot)
    slots = torch.arange(B * T).view(B, 1, T, 1)
    ordered = found.gather(slots)
    assert [part.flatten().tolist() for part in ordered.split(found.lengths)] == [wanted[key] for key in sorted(wanted)]
    assert found.starts_Q1.dtype == torch.int32
    assert found.starts_Q1.diff().tolist() == list(found.lengths)
    assert found.starts_Q1[0] == 0
    assert torch.equal(found.scatter(ordered).flatten(), slots.flatten())


def random_heads(sequence, dtype=torch.float32, device="cpu"):
    """Queries of four heads, keys and values of two."""
    generator = torch.Generator().manual_seed(0)
    X = sum(sequence.lengths)
    return [torch.randn(X, heads, 8, generator=generator).to(device, dtype) for heads in (4, 2, 2)]


def plain(query, key, value, cu_seqlens, scale):
    """Attention by a mask; heads of keys are repeated."""
    number_X = torch.bucketize(torch.arange(len(query)), cu_seqlens[1:], right=True)
    seen = (number_X[:, None] == number_X).tril()
    heads = [part.repeat_interleave(len(query[0]) // len(part[0]), 1).transpose(0, 1) for part in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale).transpose(0, 1)


def torch_with_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert window_size == (-1, 0)
    assert enable_gqa
    assert max_q == max_k == int(cu_seq_q.diff().max())
    return plain(query, key, value, cu_seq_q, scale)


def torch_without(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    assert query.shape == key.shape == value.shape
    return torch_with_groups(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=True
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """With the names of flash-attn 2.8; grouped heads are its default."""
    assert causal
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    return plain(q, k, v, cu_seqlens_q, softmax_scale)


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("kernel", [torch_with_groups, torch_without, flash_attn_varlen_func])
def test_a_kernel_is_given_what_one_call_per_sequence_reads(isolated, kernel, monkeypatch):
    """Stand-ins with the kernels' arguments: where sequences start, the longest, what is causal, shared heads."""
    if kernel is flash_attn_varlen_func:
        monkeypatch.setattr(masks, "KERNEL", "flash-attn")
        monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=kernel))
    else:
        monkeypatch.setattr(masks, "varlen_attn", kernel)
        monkeypatch.setattr(masks, "_TORCH_SHARES_HEADS", kernel is torch_with_groups)
    batch = awkward_batch()
    kinds_BT = modalities(batch.kinds_BT) if isolated else None
    found = sequences(batch.documents_BT, kinds_BT, batch.document_counts)
    heads = random_heads(found)
    assert (by_kernel(*heads, found, 0.3) - one_by_one(*heads, found, 0.3)).abs().max() < 1e-5


def test_the_installed_kernel_takes_our_arguments():
    batch = mixed_batch()
    found = sequences(batch.documents_BT, modalities(batch.kinds_BT), batch.document_counts)
    found = dataclasses.replace(found, starts_Q1=found.starts_Q1.to("meta"))
    heads = random_heads(found, torch.bfloat16, "meta")
    assert by_kernel(*heads, found, 0.3).shape == heads[0].shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's variable-length kernel needs a CUDA device")
@pytest.mark.parametrize("isolated", [False, True])
def test_the_kernel_equals_one_call_per_sequence(isolated):
    batch = awkward_batch().to("cuda")
    kinds_BT = modalities(batch.kinds_BT) if isolated else None
    found = sequences(batch.documents_BT, kinds_BT, batch.document_counts)
    results = []
    for kernel in (by_kernel, one_by_one):
        heads = [part.requires_grad_() for part in random_heads(found, torch.bfloat16, "cuda")]
        attended = kernel(*heads, found, 0.3)
        results.append([attended, *torch.autograd.grad(attended.float().square().sum(), heads)])
    for tensor, other in zip(*results, strict=True):
        assert torch.allclose(tensor, other, rtol=0.02, atol=0.02)

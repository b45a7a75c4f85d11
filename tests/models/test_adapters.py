"""Adapters of a model: where they may be, how they are drawn, what they compute alone and merged."""

import pytest
import torch
from model_samples import BACKBONES, gradients, largest_difference, mixed_batch, new_model, noisy_model

from unifork.config import Lora
from unifork.training.optimizer import NEVER_CALLED, add_adapters

EVERYWHERE = Lora(rank=2, alpha=3, modules=("*",))


def losses_of(model):
    losses = model(mixed_batch())
    return torch.cat([losses.text_loss_sum.reshape(1), losses.image_loss_sum_D])


def factors(model, which):
    return {name: parameter for name, parameter in model.named_parameters() if f".lora_{which}." in name}


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("family", BACKBONES)
def test_every_map_that_can_have_an_adapter_is_called(family, folded):
    model = noisy_model("shared*1 task*1 modality_isolated*1 task_mlp*1 norm:task", family, folded=folded).train()
    maps = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    before, random = losses_of(model), torch.get_rng_state()
    add_adapters(model, EVERYWHERE, seed=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name.removesuffix(".lora_B.default.weight") for name in factors(model, "B")} == maps - {*NEVER_CALLED}
    after = losses_of(model)
    assert torch.equal(after, before)
    after.sum().backward()
    found = gradients(model)
    assert [name for name in factors(model, "B") if not found[name].any()] == []


@torch.no_grad()
def test_merged_the_model_computes_the_same_under_its_own_names():
    model = noisy_model("shared*2 task*2 norm:task")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone, adapters = losses_of(model), add_adapters(model, EVERYWHERE, seed=0)
    for number, factor in enumerate(factors(model, "B").values()):
        factor.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    adapted = losses_of(model)
    assert not torch.allclose(adapted, alone, rtol=1e-2)
    assert adapters.merge_and_unload() is model
    assert torch.allclose(losses_of(model), adapted, rtol=1e-4)
    assert model.state_dict().keys() == before.keys()
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, before[name])}
    assert {"lm_head.weight", "image_head.classifier.weight", "codebook", "connector.linear1.bias"} <= same


def test_gradients_are_those_of_the_product():
    """Of a map `V = W + s B A`: those of A and B are products with that of V in a model that has it whole."""
    model, plain = (noisy_model("shared*2 task*2 norm:task").train() for _ in range(2))
    add_adapters(model, EVERYWHERE, seed=0)
    losses_of(model).sum().backward()
    losses_of(plain).sum().backward()
    found, whole = gradients(model), gradients(plain)
    expected = {}
    for name, a in factors(model, "A").items():
        module = name.removesuffix(".lora_A.default.weight")
        expected[f"{module}.lora_B.default.weight"] = 1.5 * whole[f"{module}.weight"] @ a.detach().T
    difference, name = largest_difference({name: found[name] for name in expected}, expected)
    assert difference < 1e-4, name


def test_they_are_drawn_by_seed_and_name_and_alike_in_branches():
    drawn = []
    for seed, modules in ((0, ("layers.*.q_proj",)), (0, ("*",)), (1, ("*",))):
        model = new_model("shared*2 task*2 norm:task")
        add_adapters(model, Lora(modules=modules), seed)
        name = "layers.3.self_attn.{}.q_proj.lora_A.default.weight"
        pair = [model.get_parameter(name.format(branch)) for branch in ("generation", "understanding")]
        assert torch.equal(*pair)
        assert 0.9 < pair[0].abs().max() * pair[0].shape[1] ** 0.5 <= 1.0
        drawn.append(pair[0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_activation_checkpointing_changes_no_bit():
    model, found = noisy_model("shared*2 task*2 norm:task").train(), []
    add_adapters(model, EVERYWHERE, seed=0)
    for kinds in ((), ("shared", "task", "head")):
        model.set_activation_checkpointing(kinds)
        losses_of(model).sum().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() >= factors(model, "B").keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
def test_compiled_parts_compute_the_same():
    plain, compiled = (noisy_model("shared*2 task*2 norm:task").train() for _ in range(2))
    for model in (plain, compiled):
        add_adapters(model, EVERYWHERE, seed=0)
    compiled.compile_parts()
    for model in (plain, compiled):
        losses_of(model).sum().backward()
    difference, name = largest_difference(gradients(compiled), gradients(plain))
    assert difference < 1e-5, name

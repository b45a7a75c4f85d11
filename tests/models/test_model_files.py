"""Weights: made from a seed or a dense model, written, read back, and refused when they do not fit."""

import json
import re

import pytest
import torch
from model_samples import PLANS, mixed_batch, new_model, noisy_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from unifork.errors import CheckpointError, ConfigError, IdentityError
from unifork.models.layer_plan import without_branch
from unifork.models.modeling import UniForkModel, load_model

torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path):
    noisy_model(PLANS[1]).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_what_is_written_is_read_back(tmp_path, family):
    model = noisy_model(PLANS[1], family)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = load_model(tmp_path)
    wanted = model.state_dict()
    assert wanted.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    assert (again.lm_head.weight is again.embed_tokens.weight) == (family == "qwen2")
    assert all(torch.equal(a, b) for a, b in zip(model(mixed_batch()), again(mixed_batch()), strict=True))
    assert isinstance(AutoModel.from_pretrained(tmp_path), UniForkModel)
    assert AutoConfig.from_pretrained(tmp_path).plan == "shared*2 task*2 norm:task"
    assert json.loads((tmp_path / "config.json").read_text())["plan"] == "shared*2 task*2 norm:task"


def test_large_models_are_written_in_several_files(tmp_path):
    model = noisy_model(PLANS[1])
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path)(mixed_batch())[0], model(mixed_batch())[0])


def test_a_low_precision_model_keeps_its_codebook(folder):
    model = load_model(folder, torch.bfloat16)
    assert model.codebook.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    losses = model(mixed_batch())
    assert losses.text_loss_sum.dtype == losses.image_loss_sum_D.dtype == torch.float32
    model.save_pretrained(folder)
    assert load_model(folder, torch.bfloat16).codebook.dtype == torch.float32


def test_names_carry_the_branch():
    names = noisy_model(PLANS[1]).state_dict().keys()
    assert {
        "layers.3.self_attn.generation.q_proj.weight",
        "layers.3.input_layernorm.understanding.weight",
        "layers.0.mlp.shared.down_proj.weight",
        "norm.generation.weight",
        "connector.token_embedding.weight",
        "codebook",
    } <= names
    assert without_branch("layers.3.self_attn.generation.q_proj.weight") == "layers.3.self_attn.q_proj.weight"
    assert without_branch("image_head.norm.weight") == "image_head.norm.weight"


def test_a_damaged_file_is_an_error(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_model(folder)
    weights.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        load_model(folder)


@pytest.mark.parametrize("problem", ["missing", "unexpected", "of another shape"])
def test_tensors_that_do_not_fit_are_named(folder, problem):
    state = load_file(folder / "model.safetensors")
    name = "layers.2.mlp.generation.up_proj.weight"
    if problem == "missing":
        del state[name]
    elif problem == "unexpected":
        state[name := "layers.9.mlp.shared.up_proj.weight"] = torch.zeros(2, 2)
    else:
        state[name] = torch.zeros(3, 32)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 tensors {problem}: {name}"):
        load_model(folder)


def test_pickles_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled weights can run code"):
        load_model(folder)


def test_another_codebook_is_an_error(folder):
    state = load_file(folder / "model.safetensors")
    state["codebook"][0, 0] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IdentityError, match="codebook"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plan": "shared*2 tsak*2"}, "unknown layer kind 'tsak'"),
        ({"plan": "shared*5"}, "num_hidden_layers=4"),
        ({"backbone": {"model_type": "qwen9"}}, "unknown model_type 'qwen9'"),
        ({"head": {"layers": 2, "heads": 2}}, "head_dim"),
    ],
)
def test_a_wrong_configuration_is_an_error(folder, changes, says):
    edit_config(folder, **changes)
    with pytest.raises(ConfigError, match=says):
        load_model(folder)


def test_the_same_seed_gives_every_plan_the_same_function():
    models = [new_model(plan, seed=1).eval() for plan in PLANS]
    losses = [model(mixed_batch()) for model in models[:5]]
    assert all(torch.allclose(loss.text_loss_sum, losses[0].text_loss_sum, rtol=1e-5) for loss in losses)
    for model in models:
        state = model.state_dict()
        dense = {without_branch(name): tensor for name, tensor in state.items()}
        assert all(torch.equal(dense[without_branch(name)], tensor) for name, tensor in state.items())
    again, other = new_model(PLANS[1], seed=1), new_model(PLANS[1], seed=2)
    assert torch.equal(again.lm_head.weight, models[1].lm_head.weight)
    assert not torch.equal(other.lm_head.weight, models[1].lm_head.weight)


def test_a_new_model_does_not_move_the_global_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    new_model(PLANS[0])
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hiden_size": 32}, "unknown key 'hiden_size'. Did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int"),
        ({"use_sliding_window": True, "max_window_layers": 2}, "sliding-window"),
    ],
)
def test_a_wrong_backbone_is_an_error(folder, changes, says):
    backbone = json.loads((folder / "config.json").read_text())["backbone"]
    edit_config(folder, backbone=backbone | changes)
    with pytest.raises(ConfigError, match=re.escape(says)):
        load_model(folder)

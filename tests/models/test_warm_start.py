"""Dense models as beginnings: every copy of every part is warm, and a branch learns while the other are frozen."""

import copy
import json
import shutil

import pytest
import torch
from model_samples import (
    BACKBONES,
    PLANS,
    dense_model,
    generation,
    new_model,
    rows,
    understanding,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from unifork.assembly import create
from unifork.config import Experiment, OptimizerConfig, Sampling, load
from unifork.errors import CheckpointError, ConfigError, IdentityError
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.models.generation import generate_images
from unifork.models.layer_plan import BRANCHES, without_branch
from unifork.models.warm_start import warm_start
from unifork.training.optimizer import freeze_all_but, make_optimizer, trainable_names

torch.set_num_threads(1)


def test_first_word_embeddings_have_a_deviation_of_their_own():
    """Nothing else changes, and they are the same draws, scaled."""
    plain, wide = (dict(new_model("unifork:2", embedding_range=chosen).named_parameters()) for chosen in (None, 0.32))
    assert torch.allclose(wide.pop("embed_tokens.weight"), plain.pop("embed_tokens.weight") * (0.32 / 0.02))
    assert all(torch.equal(wide[name], parameter) for name, parameter in plain.items())


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("plan", PLANS)
def test_every_copy_of_every_part_is_warm(plan, family):
    """Also those a baseline forgets: the second projections, norms and experts of every plan."""
    model, dense = new_model(plan, family), dense_model(family).state_dict()
    copied = warm_start(model, dense)
    parameters = dict(model.named_parameters())
    warm = {parameter: name for name, copies in copied.items() for parameter in copies}
    assert warm.keys() == {name for name in parameters if not name.startswith(("connector.", "image_head."))}
    for parameter, name in warm.items():
        assert name.removeprefix("model.") == without_branch(parameter)
        assert torch.equal(parameters[parameter], dense[name])
    for index, kind in enumerate(model.plan.kinds):
        for part, module, weight in (("attention", "self_attn", "o_proj.weight"), ("mlp", "mlp", "up_proj.weight")):
            copies = sorted(f"layers.{index}.{module}.{branch}.{weight}" for branch in BRANCHES[kind.route_of(part)])
            assert copied[f"model.layers.{index}.{module}.{weight}"] == tuple(copies)


def test_warm_start_reports_what_it_did(tmp_path):
    model = new_model(PLANS[1])
    dense_model("qwen2").save_pretrained(tmp_path)
    copied = warm_start(model, tmp_path)
    assert copied["model.layers.3.mlp.up_proj.weight"] == (
        "layers.3.mlp.generation.up_proj.weight",
        "layers.3.mlp.understanding.up_proj.weight",
    )
    reached = {name for names in copied.values() for name in names}
    new = {name for name in model.state_dict() if name.startswith(("connector.", "image_head.", "codebook"))}
    assert reached | new | {"lm_head.weight"} == model.state_dict().keys()
    assert not reached & new


def test_warm_start_refuses_what_does_not_fit():
    state = dict(dense_model("qwen2").state_dict())
    gone = state.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"missing: layers\.1\.mlp\.up_proj\.weight"):
        warm_start(new_model(PLANS[1]), state)
    with pytest.raises(CheckpointError, match=r"unexpected: layers\.7\.mlp"):
        warm_start(new_model(PLANS[1]), dict(dense_model("qwen2").state_dict()) | {"model.layers.7.mlp.x": gone})
    state["model.layers.1.mlp.up_proj.weight"] = gone[:3]
    with pytest.raises(CheckpointError, match=r"of another shape: layers\.1\.mlp\.up_proj\.weight \(3, 32\)"):
        warm_start(new_model(PLANS[1]), state)


@pytest.fixture(scope="module")
def vila_u(tmp_path_factory):
    """The language model folder of a VILA-U checkpoint in small: Llama, untied, several files, half precision."""
    folder = tmp_path_factory.mktemp("vila-u") / "llm"
    copy.deepcopy(dense_model("llama")).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def started(plan: str, folder) -> torch.nn.Module:
    model = new_model(plan, "llama")
    warm_start(model, folder)
    return model


PROMPTS, UNCONDITIONAL = [[3, 1, 4], [1, 5]], [9, 2]


@torch.no_grad()
def everything_generated(model) -> list[torch.Tensor]:
    """Hidden states, logits, losses and drawn codes of the task generation."""
    documents = [generation(1), generation(2)]
    hidden = model.hidden(rows(documents))
    codes = generate_images(model, PROMPTS, UNCONDITIONAL, Sampling(guidance=4.0))
    return [hidden, model.text_logits(hidden), *model(rows(documents)), codes]


def test_vila_u_unifork_learns_to_understand_and_generates_as_before(vila_u):
    """The latter half is duplicated for understanding; training it alone changes no bit of generation."""
    source, model = started("shared", vila_u), started("unifork:2", vila_u)
    wanted = everything_generated(source)
    image = rows([generation(1)], tokens=len(generation(1)))
    with torch.no_grad():
        llama = AutoModelForCausalLM.from_pretrained(vila_u, dtype=torch.float32)
        logits = llama(inputs_embeds=source.embed(image)).logits
        assert torch.equal(model.text_logits(model.hidden(image)), logits)
    assert all(torch.equal(found, want) for found, want in zip(everything_generated(model), wanted, strict=True))
    lesson = rows([understanding(1)], [understanding(2)])
    with torch.no_grad():
        read = model.hidden(lesson)
        assert torch.equal(read, source.hidden(lesson))

    patterns = ["layers.*.understanding.*", "norm.understanding.*"]
    names = trainable_names([name for name, _ in model.named_parameters()], patterns, "stage")
    freeze_all_but(model, names)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    supervised = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0), supervised.values()
    )
    losses = []
    for _ in range(5):
        loss = model.train()(lesson).text_loss_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = model.eval().state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == supervised.keys() == set(names)
    assert {name.split(".")[1] for name in names if name.startswith("layers.")} == {"2", "3"}
    with torch.no_grad():
        assert not torch.equal(model.hidden(lesson), read)
    assert all(torch.equal(found, want) for found, want in zip(everything_generated(model), wanted, strict=True))


def test_a_variant_starts_from_a_model_directory_with_its_tokenizers(tiny_root, tmp_path):
    variant, model = load(Experiment, tiny_root / "params.yaml").variants["unifork"], tiny_root / "models/unifork-init"
    variant = variant.model_copy(update={"warm_start": str(model), "backbone": {}, "seed": 7})
    images, texts = tmp_path / "image", model / "text_tokenizer"
    read_official(model / "image_tokenizer", 48).save(images)
    create(variant, images, texts, tmp_path / "out")
    start, found = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    assert start.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in start.items())
    with pytest.raises(CheckpointError, match="its image_size is 48, not 64"):
        read_official(model / "image_tokenizer", 64)
    other = ImageTokenizer.load(images)
    other.quantizer.codebook[0, 0] += 1
    other.save(tmp_path / "other")
    for changes, names, message in [
        ({"plan": "shared*2"}, (images, texts), "its layer_plan is shared task norm:task, the experiment's is shared"),
        ({"head": variant.head.model_copy(update={"head_dim": 8})}, (images, texts), "its head_config is"),
        ({}, (tmp_path / "other", texts), "its codebook_id is"),
    ]:
        with pytest.raises(ConfigError, match=message):
            create(variant.model_copy(update=changes), *names, tmp_path / "refused")
    shutil.copytree(texts, tmp_path / "text")
    path = tmp_path / "text/tokenizer.json"
    plain = json.loads(path.read_text())
    plain["model"]["merges"][-2:] = plain["model"]["merges"][:-3:-1]
    path.write_text(json.dumps(plain))
    with pytest.raises(IdentityError, match="which the model reads; import that one"):
        create(variant, images, tmp_path / "text", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

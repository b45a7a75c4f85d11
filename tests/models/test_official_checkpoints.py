"""Official checkpoints in and out, bit for bit; dense models in and out; parameters as the paper counts them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from model_samples import PLANS, dense_model, noisy_model, text_only
from safetensors.torch import load_file, save_file

from unifork.batch import pack
from unifork.config import HeadConfig, Variant
from unifork.errors import CheckpointError, ConfigError
from unifork.models.conversion import (
    TOKENIZER,
    dense_branch,
    from_official,
    official_config,
    official_names,
    set_head_form,
    to_official,
)
from unifork.models.modeling import UniForkModel, load_model
from unifork.models.parameters import paper_counts, parts, tasks_of
from unifork.models.warm_start import create_model, model_config, warm_start
from unifork.weights import StoredWeights, read_json

torch.set_num_threads(1)
FIXTURES = Path(__file__).parent.parent / "fixtures" / "official_tiny"
STATE = load_file(FIXTURES / "unifork" / "model.safetensors")
CODEBOOK = STATE[f"{TOKENIZER}quantizer.codebooks.0.weight"][:-1]
OWN = {name for name in STATE if not name.startswith(TOKENIZER)}


def imported(folder, allow_pickle=False, **changes):
    plain, tower = read_json(folder / "config.json"), read_json(FIXTURES / "vision_tower" / "config.json")
    config = official_config(plain | changes, tower, CODEBOOK, 4, "encoder", str(folder))
    return from_official(StoredWeights(folder, allow_pickle), config, CODEBOOK)


def checkpoint(tmp_path, state):
    folder = tmp_path / "checkpoint"
    shutil.copytree(FIXTURES / "unifork", folder)
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unfolded_import_goes_back_bit_for_bit(tmp_path, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    model = imported(checkpoint(tmp_path, stored))
    model.save_pretrained(tmp_path / "ours")
    again = to_official(load_model(tmp_path / "ours", dtype))
    assert again.keys() == OWN
    assert all(again[name].dtype == dtype and torch.equal(again[name], stored[name]) for name in OWN)


def test_a_folded_head_goes_back_as_the_same_function(tmp_path):
    hidden, codes = torch.randn(6, 64), torch.randint(0, len(CODEBOOK), (6, 4))
    model = imported(FIXTURES / "unifork")
    wanted = model.image_head(hidden, codes, CODEBOOK)
    set_head_form(model, folded=True)
    with pytest.raises(ConfigError, match="the head's form 'folded'; allowed is 'unfolded'"):
        to_official(model)
    set_head_form(model, folded=False)
    changed = STATE | to_official(model)
    again = imported(checkpoint(tmp_path, changed))
    assert (again.image_head(hidden, codes, CODEBOOK) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_shards_pickles_and_a_single_copy_of_tied_tensors_are_read(tmp_path):
    folder = checkpoint(tmp_path, STATE)
    (folder / "model.safetensors").unlink()
    names = sorted(STATE)
    shards = {"a.safetensors": names[::2], "b.safetensors": [name for name in names[1::2] if name != "lm_head.weight"]}
    for file, held in shards.items():
        save_file({name: STATE[name] for name in held}, folder / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in to_official(imported(folder)).items())
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(STATE, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        imported(folder)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in to_official(imported(folder, True)).items())


def without(state, name):
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: without(s, "model.norm_gen.weight"), r"1 tensors missing: model\.norm_gen\.weight"),
        (lambda s: s | {"model.extra": torch.ones(1)}, r"1 tensors unexpected: model\.extra"),
        (lambda s: s | {"model.norm.weight": torch.ones(3)}, r"model\.norm\.weight \(3,\), wanted \(64,\)"),
        (lambda s: s | {"lm_head.weight": s["lm_head.weight"] + 1}, "lm_head.weight differs from model.embed_tokens"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, says):
    with pytest.raises(CheckpointError, match=says):
        imported(checkpoint(tmp_path, change(STATE)))


def test_a_configuration_that_does_not_fit_is_an_error():
    with pytest.raises(CheckpointError, match=r"missing: .*gen_fork_layers\.2"):
        imported(FIXTURES / "unifork", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match=r"of another shape: .*up_proj\.weight \(128, 64\), wanted \(96, 64\)"):
        imported(FIXTURES / "unifork", intermediate_size=96)
    with pytest.raises(CheckpointError, match="KeyError\\('rqtransformer'\\)"):
        official_config({}, {}, CODEBOOK, 4, "encoder", "here")


@pytest.mark.parametrize("layers", [2, 3])
def test_few_layers_are_an_official_plan_too(layers):
    plain, tower = (read_json(FIXTURES / name / "config.json") for name in ("unifork", "vision_tower"))
    config = official_config(plain | {"num_hidden_layers": layers}, tower, CODEBOOK, 4, "encoder", "here")
    names = official_names(UniForkModel(config))
    assert f"model.gen_fork_layers.{layers - layers // 2 - 1}.mlp.up_proj.weight" in names.values()


@pytest.mark.parametrize(
    ("plan", "family", "says"),
    [("task*4 norm:task", "qwen2", "allowed is 'shared"), ("shared*2 task*2 norm:task", "llama", "backbone 'llama'")],
)
def test_other_architectures_have_no_official_layout(plan, family, says):
    with pytest.raises(ConfigError, match=says):
        official_names(noisy_model(plan, family, folded=False))


@pytest.mark.parametrize("branch", ["understanding", "generation"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_branch_is_a_dense_model_of_transformers(tmp_path, family, branch):
    model = noisy_model(PLANS[1], family)
    dense_branch(model, branch).save_pretrained(tmp_path)
    kind = {"qwen2": transformers.Qwen2ForCausalLM, "llama": transformers.LlamaForCausalLM}[family]
    dense, info = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    text = text_only(1)
    object.__setattr__(text, "task", branch)
    with torch.no_grad():
        ours = model.text_logits(model.hidden(pack([[text]], len(text), 3)))
        theirs = dense(torch.from_numpy(text.text_ids_T)[None]).logits
    assert (ours - theirs).abs().max() < 1e-5


def test_a_branch_that_is_not_everywhere_is_refused():
    with pytest.raises(ConfigError, match="no branch 'understanding' throughout; it has: image, text"):
        dense_branch(noisy_model("modality*4"), "understanding")
    with pytest.raises(ConfigError, match="no branch 'left'"):
        dense_branch(noisy_model("shared*4"), "left")
    assert dense_branch(noisy_model("shared*4"), "generation").config.model_type == "qwen2"


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_dense_directory_starts_a_model(tmp_path, family, shard):
    dense = dense_model(family)
    dense.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    head = HeadConfig(layers=1, heads=2, head_dim=8)
    variant = Variant(plan=PLANS[1], backbone={}, warm_start=str(tmp_path), head=head, stages=())
    model = create_model(variant, CODEBOOK, 4, 4, "encoder", vocab_size=90)
    assert model.config.backbone["vocab_size"] == 97
    back = dense_branch(model, "generation").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in dense.state_dict().items())
    (tmp_path / "stale.safetensors").write_bytes(b"")
    if shard == "20KB":
        warm_start(model, tmp_path)
        next(tmp_path.glob("model-00001*")).unlink()
        with pytest.raises(CheckpointError, match=r"model-00001.*no such file"):
            warm_start(model, tmp_path)


REAL = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("folded", "head", "counts"),
    [
        (False, 401_936_896, {"understanding": 494_032_768, "generation": 759_835_008, "total": 1_211_053_824}),
        (True, 132_147_712, {"understanding": 494_032_768, "generation": 490_045_824, "total": 941_264_640}),
    ],
)
def test_parameters_at_real_size_are_the_papers(folded, head, counts):
    form = HeadConfig(layers=6, heads=32, head_dim=112, folded=folded)
    variant = Variant(plan="shared*12 task*12 norm:task", backbone=REAL, head=form, stages=())
    config = model_config(variant, 151665, codebook_size=16384, code_channels=1024, depth=4, grid=24)
    assert paper_counts(config) == counts
    counted = parts(config)
    assert counted["image_head"] == head
    assert counted["lm_head"] == 0
    tasks = {name: tasks_of(name) for name in counted}
    assert tasks["image_head"] == tasks["layers (generation)"] == ("generation",)
    assert tasks["lm_head"] == ("understanding",)
    assert tasks["layers (shared)"] == ("understanding", "generation")

"""`unifork model`: what goes in comes out, and mistakes end with one error and no directory."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from unifork.cli import app
from unifork.errors import CheckpointError, ConfigError
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.models.modeling import load_model

torch.set_num_threads(1)
OFFICIAL = Path(__file__).parent.parent / "fixtures" / "official_tiny"


def run(*arguments):
    result = CliRunner().invoke(app, ["model", *map(str, arguments)], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "model"
    run("import", OFFICIAL / "unifork", "--out", out)
    return out


def test_an_import_holds_model_and_tokenizers_with_their_ids(imported):
    config, images = load_model(imported).config, ImageTokenizer.load(imported / "image_tokenizer")
    assert (config.codebook_id, config.encoder_id) == (images.codebook_id, images.encoder_id)
    assert not config.head_config().folded
    vocabulary = json.loads((OFFICIAL / "tokenizer" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert vocabulary[str(config.special_tokens["<|im_end|>"])]["content"] == "<|im_end|>"
    assert (imported / "text_tokenizer" / "vocab.json").exists()


def test_export_gives_every_tensor_back(imported, tmp_path):
    run("export", imported, "--out", tmp_path / "back", "--format", "official")
    wanted, found = (load_file(folder / "model.safetensors") for folder in (OFFICIAL / "unifork", tmp_path / "back"))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    run("import", tmp_path / "back", "--out", tmp_path / "again", "--head", "folded")
    assert load_model(tmp_path / "again").config.head_config().folded
    assert (load_model(tmp_path / "again").codebook == load_model(imported).codebook).all()


def test_a_checkpoint_of_mixed_dtypes_comes_back_in_them_and_what_was_trained_since_is_not_rounded(tmp_path):
    """The language model in bfloat16, the tower in float32, as published."""
    from safetensors.torch import save_file

    shutil.copytree(OFFICIAL, tmp_path / "official")
    state = load_file(OFFICIAL / "unifork" / "model.safetensors")
    state = {name: t if ".vision_tower." in name else t.to(torch.bfloat16) for name, t in state.items()}
    save_file(state, tmp_path / "official" / "unifork" / "model.safetensors")
    run("import", tmp_path / "official" / "unifork", "--out", tmp_path / "mixed")
    run("export", tmp_path / "mixed", "--out", tmp_path / "back", "--format", "official")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == state.keys()
    assert all(back[name].dtype == t.dtype and torch.equal(back[name], t) for name, t in state.items())
    ours = load_file(tmp_path / "mixed" / "model.safetensors")
    name = next(name for name in ours if name.endswith("q_proj.weight") and name.startswith("layers.0"))
    save_file(ours | {name: ours[name] + 1e-6}, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    run("export", tmp_path / "mixed", "--out", tmp_path / "trained", "--format", "official")
    trained = load_file(tmp_path / "trained" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(trained, ours[name] + 1e-6)


def test_a_drifted_codebook_gives_other_ids(imported, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(OFFICIAL, tmp_path / "official")
    state = load_file(OFFICIAL / "unifork" / "model.safetensors")
    for name in state:
        if ".codebooks." in name and name.endswith(".weight"):
            state[name][0] += 0.5
    save_file(state, tmp_path / "official" / "unifork" / "model.safetensors")
    run("import", tmp_path / "official" / "unifork", "--out", tmp_path / "drifted")
    before, after = load_model(imported), load_model(tmp_path / "drifted")
    assert before.config.codebook_id != after.config.codebook_id
    assert torch.equal(after.codebook[0], before.codebook[0] + 0.5)


def test_one_branch_is_a_directory_of_transformers(imported, tmp_path):
    run("export", imported, "--out", tmp_path / "dense", "--format", "qwen2", "--branch", "understanding")
    dense = Qwen2ForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense.model.norm.weight, load_model(imported).norm["understanding"].weight)
    assert (tmp_path / "dense" / "vocab.json").exists()


def test_a_new_model_starts_from_a_dense_one(imported, tmp_path, tiny_root):
    dense = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    dense.save_pretrained(tmp_path / "dense")
    tokenizers = tiny_root / "tokenizers"
    options = ["--image-tokenizer", tokenizers / "image", "--text-tokenizer", tokenizers / "text"]
    options += ["--head-layers", 1, "--head-heads", 2, "--head-dim", 8]
    run("create", "--plan", "modality*2", "--backbone", tmp_path / "dense", "--out", tmp_path / "new", *options)
    model = load_model(tmp_path / "new")
    for branch in ("text", "image"):
        assert torch.equal(model.layers[1].mlp[branch].up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)


def test_a_summary_names_parts_and_the_papers_sums(imported):
    text = run("summary", imported)
    assert ", unfolded head\n" in text
    counted = dict(re.findall(r"^(\S.*\S) +([\d,]+)$", text, re.MULTILINE))
    assert counted["total"] == f"{load_model(imported).num_parameters():,}"
    for name in ("image_head", "used for understanding", "as the paper counts: generation"):
        assert name in counted


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["export", "IN", "--format", "onnx"], ConfigError, "unknown format 'onnx'"),
        (["export", "IN", "--format", "llama", "--branch", "text"], ConfigError, "the backbone of .* is qwen2"),
        (["export", "IN", "--format", "qwen2"], ConfigError, "--branch ''"),
        (["export", "IN", "--format", "qwen2", "--branch", "image"], ConfigError, "no branch 'image' throughout"),
        (["import", "CUT"], CheckpointError, "damaged"),
        (["import", OFFICIAL / "unifork", "--head", "bent"], ConfigError, "unknown form 'bent'"),
    ],
)
def test_mistakes_leave_nothing_behind(imported, tmp_path, arguments, error, says):
    cut = tmp_path / "cut"
    shutil.copytree(OFFICIAL / "unifork", cut / "unifork")
    shutil.copytree(OFFICIAL / "vision_tower", cut / "vision_tower")
    weights = cut / "unifork" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    named = {"IN": imported, "CUT": cut / "unifork"}
    with pytest.raises(error, match=says):
        run(*(named.get(a, a) for a in arguments), "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]


def test_what_exists_is_not_overwritten(imported):
    with pytest.raises(ConfigError, match="exists already"):
        run("import", OFFICIAL / "unifork", "--out", imported)

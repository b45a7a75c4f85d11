"""Official tokenizers in every form they come in, and everything that must not be loaded."""

import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unifork import weights
from unifork.config import DecoderConfig, EncoderConfig
from unifork.errors import CheckpointError
from unifork.image_tokenizer.architecture import Architecture
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.weights import TOWER

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official_tiny"
VISION = "rqvaesiglip.siglip_model.vision_model."
CODEBOOKS = "rqvaesiglip.quantizer.codebooks."


@pytest.fixture(scope="session")
def tower_state() -> dict[str, torch.Tensor]:
    state = load_file(OFFICIAL / "unifork" / "model.safetensors")
    return {name.removeprefix(TOWER): t for name, t in state.items() if name.startswith(TOWER)}


@pytest.fixture
def tower(tower_state, tmp_path) -> Path:
    """A `vision_tower` folder."""
    folder = shutil.copytree(OFFICIAL / "vision_tower", tmp_path / "vision_tower")
    save_file(tower_state, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def expected() -> ImageTokenizer:
    return read_official(OFFICIAL / "unifork")


def rewrite(folder: Path, change) -> None:
    """Change the tensors of a folder in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def reconfigure(path: Path, *keys: str, value) -> None:
    plain = json.loads(path.read_text())
    inner = plain
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(plain))


def drop(*starts: str):
    def change(state):
        for name in [name for name in state if name.startswith(starts)]:
            del state[name]

    return change


def without_padding(state):
    for name in [name for name in state if name.startswith(CODEBOOKS) and name.endswith(".weight")]:
        state[name] = state[name][:-1].clone()


FORMS = {
    "as saved": lambda state: None,
    "one codebook": drop(*(f"{CODEBOOKS}{depth}." for depth in (1, 2, 3))),
    "no padding row": without_padding,
    "nothing unused": drop(
        "rqtransformer", "rqvaesiglip.logit", "rqvaesiglip.siglip_model.text", "rqvaesiglip.siglip_model.logit",
        VISION + "head", VISION + "post", *(f"{CODEBOOKS}{depth}.{ema}" for depth in range(4) for ema in ("c", "e")),
    ),
    "with position ids": lambda state: state.update({VISION + "embeddings.position_ids": torch.arange(16)[None]}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_tower_is_the_same_tokenizer(tower, expected, form):
    rewrite(tower, FORMS[form])
    read = read_official(tower)
    assert (read.codebook_id, read.encoder_id) == (expected.codebook_id, expected.encoder_id)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_sharded_and_pickled_weights(tower, tower_state, expected):
    (tower / "model.safetensors").unlink()
    names = sorted(tower_state)
    shards = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, held in shards.items():
        save_file({name: tower_state[name] for name in held}, tower / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (tower / weights.INDEX).write_text(json.dumps(index))
    assert read_official(tower).encoder_id == expected.encoder_id
    index["weight_map"][names[0]] = "model-00002-of-00002.safetensors"
    (tower / weights.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="1 tensors are not where it says"):
        read_official(tower)
    for path in tower.glob("model*"):
        path.unlink()
    torch.save(tower_state, tower / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled .*--allow-pickle"):
        read_official(tower)
    assert read_official(tower, allow_pickle=True).encoder_id == expected.encoder_id
    torch.save({"a": Path("code")}, tower / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="damaged"):
        read_official(tower, allow_pickle=True)


@pytest.mark.parametrize("size", [64, 96, 48])
def test_an_imported_tokenizer_is_like_our_own(tower, tmp_path, size):
    """Directory, identities, canaries; at the tower's own, a larger and a smaller size."""
    read = read_official(tower, image_size=size)
    read.save(tmp_path / "tokenizer")
    loaded = ImageTokenizer.load(tmp_path / "tokenizer")
    assert loaded.architecture.grid == size // 16
    pixels = torch.rand(2, 3, size, size) * 2 - 1
    assert torch.equal(loaded.encode(pixels), read.encode(pixels))
    assert loaded.decode(loaded.encode(pixels)).shape == pixels.shape


def test_half_precision_weights_become_float32(tower):
    rewrite(tower, lambda state: state.update({name: tensor.bfloat16() for name, tensor in state.items()}))
    read = read_official(tower)
    assert {tensor.dtype for tensor in read.state_dict().values()} == {torch.float32}


def grow(state, name, by=1.0):
    state[name] = state[name] + by


FAULTS = {
    "an unknown name": (
        lambda s: s.update({"rqvaesiglip.encoder.conv_in.weight": torch.zeros(1)}),
        "1 tensors of unknown use: rqvaesiglip.encoder.conv_in.weight",
    ),
    "a missing tensor": (drop("rqvaesiglip.decoder.norm_out.bias"), "1 tensors missing: decoder.norm_out.bias"),
    "another shape": (
        lambda s: s.update({"rqvaesiglip.post_quant_conv.bias": torch.zeros(7)}),
        r"of another shape: post_quant_conv.bias \(7,\)",
    ),
    "codebooks that differ": (lambda s: grow(s, CODEBOOKS + "2.weight"), "4 codebooks that are not 4 copies of one"),
    "three codebooks": (drop(CODEBOOKS + "3"), "3 codebooks that are not 4 copies"),
    "a short codebook": (
        lambda s: s.update({f"{CODEBOOKS}{d}.weight": s[f"{CODEBOOKS}{d}.weight"][:9].clone() for d in range(4)}),
        r"of another shape: quantizer.codebook \(9, 32\)",
    ),
    "no codebook": (drop(CODEBOOKS), "1 tensors missing: quantizer.codebook"),
    "no tower": (drop("rqvaesiglip"), "no tensors of a tower"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_refused(tower, fault):
    change, message = FAULTS[fault]
    rewrite(tower, change)
    with pytest.raises(CheckpointError, match=message):
        read_official(tower)


MISFITS = {
    "fewer layers": ("siglip", ("vision_config", "num_hidden_layers"), 3, "tensors unexpected: encoder.layers.3"),
    "more layers": ("siglip", ("vision_config", "num_hidden_layers"), 5, "no encoder layer 4"),
    "another width": ("siglip", ("vision_config", "hidden_size"), 48, "of another shape"),
    "heads that do not divide": ("siglip", ("vision_config", "num_attention_heads"), 5, "no multiple of encoder.heads"),
    "another patch": ("siglip", ("vision_config", "patch_size"), 8, "upscale by 16; allowed is patch_size 8"),
    "another activation": ("siglip", ("vision_config", "hidden_act"), "gelu", "hidden_act"),
    "another codebook": ("tower", ("rqvaesiglip", "n_embed"), 60, r"of another shape: quantizer.codebook \(65, 32\)"),
    "unshared codebooks": ("tower", ("rqvaesiglip", "shared_codebook"), False, "shared_codebook"),
    "other channels": ("tower", ("rqvaesiglip", "ddconfig", "ch"), 64, "of another shape"),
    "attention elsewhere": (
        "tower",
        ("rqvaesiglip", "ddconfig", "attn_resolutions"),
        [8],
        "missing: decoder.up.3.attn",
    ),
    "no decoder": ("tower", ("rqvaesiglip",), {}, r"rqvaesiglip\.ddconfig: Field required"),
    "an unknown SigLIP": ("tower", ("rqvaesiglip", "pretrained_model"), "nowhere", "nowhere: no such folder"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_configurations_that_do_not_fit_the_weights(tower, misfit):
    which, keys, value, message = MISFITS[misfit]
    folder = {"siglip": tower / "siglip_config", "tower": tower}[which]
    reconfigure(folder / "config.json", *keys, value=value)
    with pytest.raises(CheckpointError, match=message):
        read_official(tower)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "siglip_config/config.json"])
def test_missing_and_truncated_files(tower, tmp_path, name):
    whole = (tower / name).read_bytes()
    for left in (len(whole) - 1, len(whole) // 2, 3):
        (tower / name).write_bytes(whole[:left])
        with pytest.raises(CheckpointError, match=str(tower)):
            read_official(tower)
    (tower / name).unlink()
    with pytest.raises(CheckpointError, match=str(tower)):
        read_official(tower)


def test_a_checkpoint_whose_tower_is_described_elsewhere(tmp_path, tower, expected):
    checkpoint = shutil.copytree(OFFICIAL / "unifork", tmp_path / "other" / "checkpoint")
    with pytest.raises(CheckpointError, match=r"vision_tower: no such folder.*--vision-tower"):
        read_official(checkpoint)
    assert read_official(checkpoint, vision_tower=tower).encoder_id == expected.encoder_id
    rewrite(checkpoint, drop("model.vision_tower."))
    with pytest.raises(CheckpointError, match="was it saved without its tower"):
        read_official(checkpoint, vision_tower=tower)


def test_the_codebook_of_a_checkpoint_may_have_drifted(tmp_path, expected):
    root = shutil.copytree(OFFICIAL, tmp_path / "root")
    names = [f"{TOWER}{CODEBOOKS}{depth}.weight" for depth in range(4)]
    rewrite(root / "unifork", lambda state: [grow(state, name, 0.01) for name in names])
    drifted = read_official(root / "unifork")
    assert drifted.codebook_id != expected.codebook_id
    torch.testing.assert_close(drifted.quantizer.codebook, expected.quantizer.codebook + 0.01)


def test_local_files_need_no_network(tower, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    read_official(tower)
    read_official(OFFICIAL / "unifork")


def test_folders_on_the_hub(tower, monkeypatch):
    requests = []

    def download(repository, revision, allow_patterns):
        requests.append((repository, revision, allow_patterns))
        if repository == "no/one":
            raise ConnectionError("no route")
        return str(tower.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read_official("some/model/vision_tower@v1").architecture.depth == 4
    assert requests == [("some/model", "v1", ["vision_tower/*.json", "vision_tower/*.safetensors"])]
    with pytest.raises(CheckpointError, match=r"no/one: no such folder.*the Hub did not give no/one: .*no route"):
        read_official("no/one")
    with pytest.raises(CheckpointError, match="has no folder elsewhere"):
        read_official("some/model/elsewhere")
    with pytest.raises(CheckpointError, match="no name on the Hub"):
        read_official("/not/here")


OTHER = Architecture(
    image_size=24,
    patch_size=8,
    position_grid=3,
    encoder=EncoderConfig(hidden_size=24, layers=3, heads=3, intermediate_size=20),
    depth=3,
    codebook_size=21,
    decoder=DecoderConfig(
        z_channels=5, channels=32, multipliers=(1, 2, 1, 1), blocks=0, attention_levels=(1, 3), norm_groups=32
    ),
)


def test_every_size_follows_from_the_configuration(tmp_path):
    """A tower of other numbers: layers, heads, patches, depth, attention at two resolutions."""
    tokenizer, state = ImageTokenizer(OTHER), {}
    tokenizer.quantizer.codebook.normal_()
    for name, tensor in tokenizer.state_dict().items():
        part, _, rest = name.partition(".")
        vision = VISION + ("encoder." if rest.startswith("layers") else "")
        state[vision + rest if part == "encoder" else f"rqvaesiglip.{name}"] = tensor
    codebook = state.pop("rqvaesiglip.quantizer.codebook")
    state[CODEBOOKS + "0.weight"] = torch.cat([codebook, torch.zeros(1, 24)])
    state[VISION + "encoder.layers.2.mlp.fc1.bias"] = torch.zeros(20)
    save_file(state, tmp_path / "model.safetensors")
    decoder = {"ch": 32, "ch_mult": [1, 2, 1, 1], "num_res_blocks": 0, "z_channels": 5}
    decoder |= {"resolution": 24, "attn_resolutions": [3, 12]}
    rqvae = {"code_shape": [3, 3, 3], "n_embed": 21, "shared_codebook": True, "pretrained_model": "siglip"}
    (tmp_path / "config.json").write_text(json.dumps({"rqvaesiglip": rqvae | {"ddconfig": decoder}}))
    vision = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 3}
    (tmp_path / "siglip").mkdir()
    plain = {"vision_config": vision | {"image_size": 24, "patch_size": 8}}
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(plain))
    read = read_official(tmp_path)
    assert read.architecture == OTHER
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in tokenizer.state_dict().items())


def test_codes_of_an_import_equal_the_official_ones(expected):
    official = load_file(OFFICIAL / "01_tokenizer.safetensors")
    codes = expected.encode(official["native.pixel_values"]).numpy()
    assert np.array_equal(codes, official["native.codes"].flatten(1, 2).numpy())

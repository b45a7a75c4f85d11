"""The tokenizer as a whole: shapes, directories, identities, canaries, and that nothing changes it."""

import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from unifork.errors import CheckpointError, ConfigError, DataError, IdentityError
from unifork.image_tokenizer import canaries
from unifork.image_tokenizer.architecture import Architecture, describe
from unifork.image_tokenizer.encoder import positions_for
from unifork.image_tokenizer.model import ImageTokenizer


def pixels(count=3, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_round_trip_shapes(tokenizer):
    codes = tokenizer.encode(pixels())
    assert codes.shape == (3, 16, 3)
    assert codes.dtype == torch.int64
    assert codes.min() >= 0
    assert codes.max() < 48
    assert codes.unique().numel() > 3
    drawn = tokenizer.decode(codes)
    assert drawn.shape == (3, 3, 32, 32)
    assert not drawn.requires_grad


def test_larger_and_smaller_images(tokenizer):
    assert tokenizer.encode(pixels(1, 48)).shape == (1, 36, 3)
    assert tokenizer.decode(tokenizer.encode(pixels(1, 16))).shape == (1, 3, 16, 16)


def test_positions_follow_the_official_rule():
    table = torch.arange(16.0)[:, None].expand(16, 2)
    assert positions_for(table, 16) is not None
    assert (positions_for(table, 16) == table).all()
    assert (positions_for(table, 9) == table[:9]).all(), "fewer patches: the first rows"
    resized = positions_for(table, 36)[:, 0].reshape(6, 6)
    assert (resized.diff(dim=0) > 0).all(), "more patches: resized as a square"
    assert (resized.diff(dim=1) > 0).all()
    with pytest.raises(DataError, match="17 patches"):
        positions_for(table, 17)


def test_codes_are_nearest_rows_of_what_is_left(tokenizer):
    features = tokenizer.encoder(pixels())
    codes, table = tokenizer.encode(pixels()), tokenizer.quantizer.codebook
    rest = features.clone()
    for depth in range(3):
        assert (torch.cdist(rest, table[None].expand(3, -1, -1)).argmin(-1) == codes[..., depth]).all()
        rest = rest - table[codes[..., depth]]
    torch.testing.assert_close(features - rest, tokenizer.quantizer.lookup(codes))


def test_positions_are_in_raster_order(tokenizer):
    """The top right patch is position 3, both when encoding and when drawing."""
    image, changed = pixels(1), pixels(1)
    changed[..., :8, 24:] *= -1
    moved = (tokenizer.encoder(image) - tokenizer.encoder(changed)).norm(dim=-1)[0]
    assert int(moved.argmax()) == 3
    quantized = tokenizer.quantizer.lookup(tokenizer.encode(image))
    other = quantized.clone()
    other[0, 3] *= -5
    difference = (tokenizer.draw(quantized) - tokenizer.draw(other)).abs().mean(dim=(0, 1))
    assert int(difference.reshape(4, 8, 4, 8).mean(dim=(1, 3)).argmax()) == 3


def test_codes_out_of_range(tokenizer):
    with pytest.raises(DataError, match=r"48.*from 0 to 47"):
        tokenizer.decode(torch.full((1, 16, 3), 48))
    with pytest.raises(DataError, match="3 codes per position"):
        tokenizer.decode(torch.zeros(1, 16, 4, dtype=torch.int64))


def test_no_mode_and_no_forward_changes_the_codebook(tokenizer):
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    host = torch.nn.ModuleDict({"tokenizer": tokenizer}).train()
    assert not any(module.training for module in tokenizer.modules())
    assert not any(parameter.requires_grad for parameter in host.parameters())
    tokenizer.decode(tokenizer.encode(pixels()))
    tokenizer.draw(tokenizer.encoder(pixels()))
    assert all((tokenizer.state_dict()[name] == tensor).all() for name, tensor in before.items())


def test_save_and_load(tokenizer, directory):
    loaded = ImageTokenizer.load(directory)
    assert (loaded.codebook_id, loaded.encoder_id) == (tokenizer.codebook_id, tokenizer.encoder_id)
    assert describe(directory).codebook_id == tokenizer.codebook_id
    codes = tokenizer.encode(pixels())
    assert (loaded.encode(pixels()) == codes).all()
    assert (loaded.decode(codes) == tokenizer.decode(codes)).all()


def test_saving_twice_gives_the_same_bytes(tokenizer, directory, tmp_path):
    tokenizer.save(tmp_path / "again")
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["canaries.json", "canaries.safetensors", "config.json", "model.safetensors"]
    assert all((directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_identities_name_what_they_should(tokenizer):
    codebook_id, encoder_id = tokenizer.codebook_id, tokenizer.encoder_id
    tokenizer.decoder.conv_out.bias += 1
    assert (tokenizer.codebook_id, tokenizer.encoder_id) == (codebook_id, encoder_id), "the decoder takes no part"
    tokenizer.encoder.embeddings.patch_embedding.bias += 1
    assert tokenizer.codebook_id == codebook_id
    assert tokenizer.encoder_id != encoder_id
    tokenizer.quantizer.codebook[0, 0] += 1
    assert tokenizer.codebook_id != codebook_id


def test_other_weights_than_promised(directory):
    state = load_file(directory / "model.safetensors")
    state["encoder.embeddings.patch_embedding.bias"] += 0.5
    save_file(state, directory / "model.safetensors")
    with pytest.raises(IdentityError, match="encoder_id"):
        ImageTokenizer.load(directory)


def flip_canaries(directory, count):
    tensors = load_file(directory / "canaries.safetensors")
    tensors["codes"].view(-1)[:count] = (tensors["codes"].view(-1)[:count] + 1) % 48
    save_file(tensors, directory / "canaries.safetensors")


def test_canaries_are_exact_where_they_were_made(directory):
    flip_canaries(directory, 1)
    with pytest.raises(IdentityError, match="canaries' codes differ, allowed are 0%"):
        ImageTokenizer.load(directory)


def test_canaries_are_bounded_elsewhere(directory, caplog):
    facts = json.loads((directory / "canaries.json").read_text())
    (directory / "canaries.json").write_text(json.dumps(facts | {"device_class": "cuda Imaginary"}))
    flip_canaries(directory, 2)
    with caplog.at_level(logging.WARNING):
        ImageTokenizer.load(directory)
    assert "0.521% of the canaries' codes differ" in caplog.text
    assert "cuda Imaginary" in caplog.text
    flip_canaries(directory, 100)
    with pytest.raises(IdentityError, match="allowed are 5%"):
        ImageTokenizer.load(directory)


def test_canary_images_differ():
    drawn = canaries.images(32)
    assert drawn.shape == (canaries.COUNT, 32, 32, 3)
    assert len(np.unique(drawn.reshape(canaries.COUNT, -1), axis=0)) == canaries.COUNT


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "canaries.safetensors", "canaries.json"])
def test_missing_and_damaged_files(directory, name):
    whole = (directory / name).read_bytes()
    (directory / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=str(directory)):
        ImageTokenizer.load(directory)
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        ImageTokenizer.load(directory)


def test_weights_that_do_not_fit_load_nothing(tokenizer, config):
    state = tokenizer.state_dict()
    smaller = ImageTokenizer(Architecture.of(config.model_copy(update={"codebook_size": 40})))
    before = smaller.encoder_id
    with pytest.raises(CheckpointError, match=r"of another shape: quantizer.codebook \(48, 32\), wanted \(40, 32\)"):
        smaller.load_weights(state, "here")
    assert smaller.encoder_id == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 36}, "no multiple of patch_size"),
        ({"patch_size": 16}, "upscale by 8"),
        ({"codebook_size": 70_000}, "more than 65536"),
    ],
)
def test_configurations_that_do_not_fit(config, change, message):
    with pytest.raises(ConfigError, match=message):
        ImageTokenizer(Architecture.of(config.model_copy(update=change)))

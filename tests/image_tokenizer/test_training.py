"""Training: residual k-means, moving averages, and a run of a few seconds."""

import math
import re

import numpy as np
import pytest
import torch

from unifork.errors import ConfigError, DataError
from unifork.identity import codebook_identity, weights_identity
from unifork.image_tokenizer.codebook_training import CodebookAverages, kmeans, residual_kmeans
from unifork.image_tokenizer.measures import code_use, reconstruction_error
from unifork.image_tokenizer.model import ImageTokenizer, ResidualQuantizer, nearest_rows, residual_codes, to_tensor
from unifork.image_tokenizer.training import Batches, measure, train_tokenizer, without_repeats


def generator():
    return torch.Generator().manual_seed(0)


def two_level_cloud():
    """Four far centers, each with three near ones around it."""
    coarse = 10 * torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    fine = torch.tensor([[1.0, 1], [-1, 1], [0, -1]])
    return (coarse[:, None] + fine).reshape(-1, 2).repeat(20, 1)


def test_kmeans_finds_separate_centers():
    centers = kmeans(two_level_cloud(), 12, generator())
    assert (torch.cdist(two_level_cloud(), centers).min(1).values < 1e-4).all()


def test_residual_kmeans_shares_rows_over_depths():
    cloud = two_level_cloud()
    table = residual_kmeans(cloud, 7, 2, generator())  # 4 rows for the far centers, 3 for what is left
    codes, residuals = residual_codes(cloud, table, 2)
    assert table.shape == (7, 2)
    assert (residuals[:, -1] - table[codes[:, -1]]).abs().max() < 1e-4, "7 rows at depth 2 describe 12 points exactly"
    with pytest.raises(DataError, match="7 rows needs as many vectors, got 5"):
        residual_kmeans(cloud[:5], 7, 2, generator())


def test_averages_follow_moving_vectors_and_refill_unused_rows():
    quantizer = ResidualQuantizer(7, 2, 2)
    averages = CodebookAverages(quantizer, two_level_cloud(), 0.8, generator())
    moved = two_level_cloud() * 1.5 + 0.5
    refilled = 0
    for _ in range(60):
        codes, residuals = residual_codes(moved, quantizer.codebook, 2)
        refilled += averages.update(codes, residuals, refill=True)
    left = residuals[:, -1] - quantizer.codebook[codes[:, -1]]
    assert left.norm(dim=1).mean() < 1.0
    quantizer.codebook[0] = 1e6
    averages.sum_KC[0], averages.count_K[0] = 1e6, 0.01
    codes, residuals = residual_codes(moved, quantizer.codebook, 2)
    assert averages.update(codes, residuals, refill=False) == 0
    assert averages.update(codes, residuals, refill=True) >= 1
    assert quantizer.codebook.abs().max() < 100


def test_nearest_rows_of_nothing():
    assert nearest_rows(torch.zeros(0, 2), torch.zeros(3, 2)).shape == (0,)


@pytest.fixture(scope="module")
def trained(config, blocks, tmp_path_factory):
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("trained") / "tokenizer"
    lines = []
    groups = {"left": blocks[:64], "right": blocks[32:80]}
    report = train_tokenizer(config, groups, {"held": blocks[80:]}, directory, lines.append)
    return directory, report, lines


def test_training_reduces_the_error(trained, blocks):
    directory, report, lines = trained
    flat = np.broadcast_to(blocks[80:].mean(axis=(0, 1, 2)).astype(np.uint8), blocks[80:].shape)
    assert report["mean_absolute_levels"] < 0.8 * reconstruction_error(blocks[80:], flat)["mean_absolute_levels"]
    assert report["codes"]["codebook_usage"] > 10
    assert len(report["codes"]["depths"]) == 3
    assert re.search(r"step 60/60 loss \d\.\d{4} \(codes\)", lines[-1])
    assert measure(ImageTokenizer.load(directory), {"held": blocks[80:]})["psnr_db"] == report["psnr_db"]


def test_training_is_repeatable_and_leaves_nothing_behind(trained, config, blocks, tmp_path):
    directory, _, _ = trained
    torch.rand(3)  # the global generator must not matter
    groups = {"left": blocks[:64], "right": blocks[32:80]}
    train_tokenizer(config, groups, {"held": blocks[80:]}, tmp_path / "tokenizer", lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    for path in directory.iterdir():
        assert path.read_bytes() == (tmp_path / "tokenizer" / path.name).read_bytes()


def test_batches_take_fixed_parts_in_passes():
    groups = {"a": np.arange(10), "b": 100 + np.arange(4)}
    batches = Batches(groups, 4, seed=0, shares={})
    steps = np.stack([batches.take(step) for step in range(10)])
    assert ((steps < 100).sum(1) == 2).all()
    assert sorted(steps[:5, :2].ravel()) == list(range(10)), "one pass sees every image once"
    assert sorted(steps[2:4, 2:].ravel()) == [100, 101, 102, 103]
    assert (batches.take(7) == steps[7]).all(), "a step is a function of its number"
    weighted = Batches(groups, 4, seed=0, shares={"b": 3}).take(0)
    assert ((weighted < 100).sum(), (weighted >= 100).sum()) == (1, 3)
    with pytest.raises(ConfigError, match="'c'"):
        Batches(groups, 4, seed=0, shares={"c": 1})


def test_images_that_repeat_are_supervised_once(blocks):
    groups = without_repeats({"crop": blocks[:4], "pad": blocks[2:6], "same": blocks[:3]})
    assert {name: len(group) for name, group in groups.items()} == {"crop": 4, "pad": 2}
    assert (groups["pad"] == blocks[4:6]).all()


def test_codes_of_a_patch_depend_on_the_patch_alone(trained, blocks):
    """`local`, the default: the same patch has the same codes at every place and beside any other."""
    tokenizer = ImageTokenizer.load(trained[0])
    image = to_tensor(blocks[:1])
    codes = tokenizer.encode(image).reshape(4, 4, 3)
    moved = tokenizer.encode(image.roll((8, 16), dims=(2, 3))).reshape(4, 4, 3)
    assert (moved == codes.roll((1, 2), dims=(0, 1))).all()
    assert codes.reshape(16, 3).unique(dim=0).shape[0] > 1


def test_wrong_input(config, blocks, tmp_path):
    with pytest.raises(DataError, match=r"images are of shapes \{'x': \(96, 32, 16, 3\)\}"):
        train_tokenizer(config, {"x": blocks[:, :, :16]}, {"held": blocks}, tmp_path / "t")
    late = config.model_copy(update={"training": config.training.model_copy(update={"quantize_from_step": 60})})
    with pytest.raises(ConfigError, match="quantize_from_step 60 must be below steps 60"):
        train_tokenizer(late, {"x": blocks}, {"held": blocks}, tmp_path / "t")


def test_code_use_counts_bits():
    codes = np.array([[[0, 1], [2, 1], [0, 3], [2, 3]]])
    use = code_use(codes)
    assert math.isclose(use["bits_per_position"], 2)
    assert [round(depth["perplexity"], 6) for depth in use["depths"]] == [2, 2]
    assert [depth["codebook_usage"] for depth in use["depths"]] == [2, 2]
    assert use["codebook_usage"] == 4


def test_identities_know_names_shapes_and_numbers():
    table = torch.arange(6.0).reshape(3, 2)
    assert codebook_identity(table, 4, 6) == codebook_identity(table.double(), 4, 6)
    assert (
        len({codebook_identity(*args) for args in [(table, 4, 6), (table, 3, 6), (table, 4, 5), (-table, 4, 6)]}) == 4
    )
    state = {"b": table, "a": table.bfloat16()}
    assert weights_identity(state) == weights_identity(dict(reversed(state.items())))
    assert weights_identity(state) != weights_identity({"b": table.reshape(2, 3), "a": table.bfloat16()})
    assert weights_identity({"a": table}) != weights_identity({"c": table})

"""The command line and the pipeline program around an official tokenizer, as people run them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from crashes import run
from PIL import Image
from tiny import REPOSITORY
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import Experiment, ImageTokenizerConfig, ImportedTokenizer, load, parse
from unifork.errors import ConfigError, DataError, IdentityError
from unifork.experiments import params_text, resolve
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.images import VARIANTS

OFFICIAL = REPOSITORY / "tests/fixtures/official_tiny"
IMPORT = {"import": str(OFFICIAL / "unifork"), "image_size": 32}


def unifork(*arguments) -> str:
    """What a command prints; its exception where it fails."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "tokenizer"
    printed = unifork("tokenizer", "import", OFFICIAL / "unifork", "--out", out, "--image-size", 96)
    assert ImageTokenizer.load(out).codebook_id in printed
    return out


@pytest.mark.parametrize("view", VARIANTS)
def test_images_to_codes_and_back(directory, tmp_path, view):
    images = [OFFICIAL / "images" / f"img{n}.png" for n in (0, 4, 6)]
    codes, again = tmp_path / "codes.npz", tmp_path / "again.npz"
    for file in (codes, again):
        unifork("tokenizer", "encode", *images, "--tokenizer", directory, "--view", view, "--out", file)
    stored = np.load(codes)
    assert stored["codes"].shape == (3, 6, 6, 4)
    assert list(stored["names"]) == ["img0.png", "img4.png", "img6.png"]
    assert np.array_equal(stored["codes"], np.load(again)["codes"])
    unifork("tokenizer", "decode", codes, "--tokenizer", directory, "--out", tmp_path / "drawn")
    drawn = sorted((tmp_path / "drawn").iterdir())
    assert [path.name for path in drawn] == ["0000-img0.png", "0001-img4.png", "0002-img6.png"]
    assert Image.open(drawn[0]).size == (96, 96)


def test_what_cannot_be_encoded_or_decoded(directory, tmp_path):
    image, codes = OFFICIAL / "images" / "img2.png", tmp_path / "codes.npz"
    encode, decode = ("tokenizer", "encode", "--tokenizer", directory), ("tokenizer", "decode", "--tokenizer")
    with pytest.raises(DataError, match=r"missing\.png: no such file"):
        unifork(*encode, tmp_path / "missing.png", "--out", codes)
    with pytest.raises(ConfigError, match="unknown view 'corp'"):
        unifork(*encode, image, "--view", "corp", "--out", codes)
    with pytest.raises(DataError, match="no file of `unifork tokenizer encode`"):
        unifork(*decode, directory, image, "--out", tmp_path)
    unifork(*encode, image, "--out", codes)
    other = tmp_path / "other"
    unifork("tokenizer", "import", OFFICIAL / "unifork", "--out", other)
    with pytest.raises(IdentityError, match="codes of the codebook"):
        unifork(*decode, other, codes, "--out", tmp_path)


@pytest.fixture
def root(tiny_root, tmp_path) -> Path:
    """An experiment with filtered images whose tokenizer is imported."""
    for name in ("datasets", "experiments", "clusters", "data"):
        shutil.copytree(tiny_root / name, tmp_path / name)
    text = yaml.safe_dump({"extends": "tiny", "image_tokenizer": IMPORT})
    (tmp_path / "experiments" / "imported.yaml").write_text(text)
    experiment = resolve("imported", tmp_path / "experiments", tmp_path / "datasets")
    (tmp_path / "params.yaml").write_text(params_text(experiment))
    return tmp_path


@pytest.mark.slow
def test_the_stage_imports(root):
    assert load(Experiment, root / "params.yaml").image_tokenizer.source == IMPORT["import"]
    run(root, ("pipelines.image_tokenizer",))
    imported, expected = ImageTokenizer.load(root / "tokenizers/image"), read_official(OFFICIAL / "unifork", 32)
    assert (imported.codebook_id, imported.encoder_id) == (expected.codebook_id, expected.encoder_id)
    report = yaml.safe_load((root / "tokenizers/image/report.json").read_text())
    assert report["detector"]
    assert report["images"] <= 64


def test_a_tokenizer_is_trained_or_imported_and_never_both():
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    trained = params["image_tokenizer"]
    assert isinstance(parse(Experiment, params, "params").image_tokenizer, ImageTokenizerConfig)
    imported = parse(Experiment, params | {"image_tokenizer": IMPORT}, "params")
    assert imported.image_tokenizer == ImportedTokenizer(**IMPORT)
    with pytest.raises(ConfigError, match=r"image_tokenizer\.\(imported\): unknown key 'patch_size'"):
        parse(Experiment, params | {"image_tokenizer": trained | IMPORT}, "params")
    with pytest.raises(ConfigError, match=r"image_tokenizer\.\(trained\)\.encoder: Field required"):
        parse(Experiment, params | {"image_tokenizer": {"image_size": 48}}, "params")

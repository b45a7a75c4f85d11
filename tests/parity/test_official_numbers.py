"""Every number of a folder of official reference numbers, and that a wrong one is noticed.

UNIFORK_FIXTURES names another folder of the same layout.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from benchmarks.parity import model
from benchmarks.parity.__main__ import app
from benchmarks.parity.comparison import Comparison
from benchmarks.parity.run import AREAS, Verdict, verdicts, write
from unifork.errors import DataError

OURS = Path(__file__).parents[1] / "fixtures" / "official_tiny"
FOLDER = Path(os.environ.get("UNIFORK_FIXTURES", OURS))
INPUTS = (".pixel_values",)
GIVEN = re.compile(
    r"teacher\.(embed_from_body|code)|generate_cfg\S+\.hidden|sampling\.logits|text\.prompt_ids"
    r"|batch\.(images_\w+|input_ids|is_gen|attention_mask)"
)
"""What the model's part was given and is not compared."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def found() -> dict[str, list[Verdict]]:
    """The verdicts of each area, made once."""
    return {area.__name__: list(verdicts(FOLDER, [area])) for area in AREAS}


@pytest.mark.parametrize("area", [area.__name__ for area in AREAS])
def test_official_numbers(found, area):
    assert found[area]
    assert [str(verdict) for verdict in found[area] if not verdict.passed] == []


def test_every_tensor_of_tokenizer_and_preprocessing_is_compared_and_written(found, tmp_path):
    compared = [verdict.comparison for area in found.values() for verdict in area]
    write(compared, FOLDER, tmp_path)
    ours, official = load_file(tmp_path / "01_tokenizer.safetensors"), load_file(FOLDER / "01_tokenizer.safetensors")
    assert ours.keys() == {name for name in official if not name.endswith(INPUTS)}
    assert all(ours[name].dtype == official[name].dtype for name in ours)
    assert all(ours[name].shape == official[name].shape for name in ours)
    pixels, expected = np.load(tmp_path / "04_preprocess.npz"), np.load(FOLDER / "04_preprocess.npz")
    assert set(pixels.files) == set(expected.files)
    assert all(np.array_equal(pixels[name], expected[name]) for name in pixels.files)


@pytest.mark.parametrize("item", ["02_head", "03_llm", "05_generate"])
def test_every_computed_tensor_of_the_model_is_compared(found, item):
    stored = {name for name in load_file(FOLDER / f"{item}.safetensors") if not GIVEN.fullmatch(name)}
    assert stored == {verdict.tensor for verdict in found["benchmarks.parity.model"] if verdict.item == item}


@pytest.fixture
def copy(tmp_path) -> Path:
    return shutil.copytree(FOLDER, tmp_path / "fixtures")


def run(folder: Path, *options: str):
    return CliRunner().invoke(app, [str(folder), *options], catch_exceptions=False)


def test_a_wrong_tensor_and_a_missing_file_are_named_and_fail_the_command(copy):
    official = load_file(copy / "01_tokenizer.safetensors")
    official["native.codes"][0, 0, 0, 0] += 1
    save_file(official, copy / "01_tokenizer.safetensors")
    (copy / "04_preprocess.npz").unlink()
    result = run(copy)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert any("native.codes" in line and "DIFFERENT" in line for line in lines)
    assert any("smaller.codes" in line and "equal" in line for line in lines), "the rest is still compared"
    assert any("preprocessing" in line and "FileNotFoundError" in line for line in lines)


def test_drifted_weights_fail(copy):
    state = load_file(copy / "unifork" / "model.safetensors")
    for name in [name for name in state if name.endswith("patch_embedding.bias")]:
        state[name] += 0.5
    save_file(state, copy / "unifork" / "model.safetensors")
    wrong = {verdict.tensor for area in AREAS for verdict in verdicts(copy, [area]) if not verdict.passed}
    assert {"native.pre_quant_features", "bigger.patch_plus_pos_embeddings"} <= wrong


def test_a_changed_weight_of_the_model_fails(copy):
    state = load_file(copy / "unifork" / "model.safetensors")
    state["model.norm_gen.weight"][0] += 0.01
    save_file(state, copy / "unifork" / "model.safetensors")
    wrong = {verdict.tensor for verdict in verdicts(copy, [model]) if not verdict.passed}
    assert {"gen.last_hidden", "gen.loss", "guided_logits"} <= wrong
    assert not {"und.last_hidden", "und.loss", "teacher.logits"} & wrong


def test_a_folder_that_is_not_there():
    with pytest.raises(DataError, match="nowhere: no such folder"):
        run(Path("nowhere"))


@pytest.mark.parametrize(
    ("expected", "actual", "agrees"),
    [
        (torch.zeros(2), torch.tensor([0.0, 0.05]), True),
        (torch.zeros(2), torch.tensor([0.0, 0.2]), False),
        (torch.zeros(2), torch.zeros(1, 2), False),
        (torch.zeros(2), torch.tensor([0.0, float("nan")]), False),
        (torch.arange(2), torch.arange(2), True),
    ],
)
def test_what_agrees(expected, actual, agrees):
    verdict = Verdict("item", "tensor", Comparison("item", "tensor", expected, actual, absolute=0.1))
    assert verdict.passed is agrees
    assert "item tensor: differs by" in str(verdict)

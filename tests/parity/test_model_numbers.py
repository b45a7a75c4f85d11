"""The model gives the original's numbers."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unifork.parity import model
from unifork.parity.model import GENERATE, GRADS, HEAD, LLM, Original, comparisons

torch.set_num_threads(1)
FOLDER = Path(os.environ.get("UNIFORK_FIXTURES") or Path(__file__).parent.parent / "fixtures" / "official_tiny")


@pytest.fixture(scope="module")
def compared():
    return list(comparisons(FOLDER))


@pytest.mark.parametrize("item", [HEAD, LLM, GRADS, GENERATE])
def test_the_model_gives_the_originals_numbers(compared, item):
    mine = [comparison for comparison in compared if comparison.item == item]
    assert mine
    assert [(c.tensor, c.difference, c.absolute) for c in mine if not c.agrees] == []


def test_a_changed_weight_is_noticed():
    original = Original.read(FOLDER)
    with torch.no_grad():
        original.model.norm["generation"].weight[0] += 0.01
    assert not all(comparison.agrees for comparison in model._forward(original))


def test_every_computed_tensor_of_the_folder_is_compared(compared):
    given = (
        r"teacher\.(embed_from_body|code)|generate_cfg\S+\.hidden|sampling\.logits|text\.prompt_ids|input_ids|attention_mask"
        r"|batch\.(images_\w+|input_ids|is_gen|attention_mask)"
    )
    for item in (HEAD, LLM, GENERATE):
        stored = {name for name in load_file(FOLDER / f"{item}.safetensors") if not re.fullmatch(given, name)}
        assert stored == {comparison.tensor for comparison in compared if comparison.item == item}

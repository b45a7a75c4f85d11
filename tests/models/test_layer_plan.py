"""Plans are read exactly, written shortest, and refused when wrong."""

import pytest

from unifork.errors import ConfigError
from unifork.models.layer_plan import KINDS, LayerPlan

PAPER_PLANS = {
    "shared*24": ["shared"] * 24,
    "shared*12 task*12 norm:task": ["shared"] * 12 + ["task"] * 12,
    "modality*24 norm:modality": ["modality"] * 24,
    "(shared modality_mlp)*12": ["shared", "modality_mlp"] * 12,
    "modality_isolated*9 shared*14 modality_isolated*5": ["modality_isolated"] * 9
    + ["shared"] * 14
    + ["modality_isolated"] * 5,
}


@pytest.mark.parametrize("text", PAPER_PLANS)
def test_plans_of_the_comparison_are_read_and_written_back(text):
    plan = LayerPlan.parse(text, len(PAPER_PLANS[text]))
    assert list(plan.layers) == PAPER_PLANS[text]
    assert str(plan) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("shared shared  task", "shared*2 task"),
        ("shared modality_mlp shared modality_mlp", "(shared modality_mlp)*2"),
        ("( shared*2 task )*4 task", "(shared*2 task)*4 task"),
        ("norm:shared task", "task"),
    ],
)
def test_one_way_to_write_a_plan(text, canonical):
    assert str(LayerPlan.parse(text)) == canonical
    assert LayerPlan.parse(canonical) == LayerPlan.parse(text)


def test_unknown_kind_names_itself_and_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        LayerPlan.parse("shared*2 tsak*2")
    assert "'tsak'" in str(caught.value)
    assert "'task'" in str(caught.value)
    assert all(kind in str(caught.value) for kind in KINDS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no layers"),
        ("norm:task", "no layers"),
        ("shared*0", "at least 1"),
        ("shared**2", "shared**2"),
        ("shared*two", "whole number"),
        ("(shared task*2", "'('"),
        ("shared norm:branch", "norm route 'branch'"),
        ("shared norm:task norm:shared", "2 times"),
    ],
)
def test_malformed_plans_say_what_is_wrong(text, says):
    with pytest.raises(ConfigError, match="layer plan") as caught:
        LayerPlan.parse(text)
    assert says in str(caught.value)


def test_depth_must_fit_the_backbone():
    with pytest.raises(ConfigError, match=r"4 layers, the backbone num_hidden_layers=6"):
        LayerPlan.parse("shared*2 task*2", 6)

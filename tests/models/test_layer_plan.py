"""Plans are read exactly, written in one way, and refused when wrong."""

import pytest

from unifork.errors import ConfigError
from unifork.models.layer_plan import KINDS, PRESETS, LayerPlan

PRESET_PLANS = {
    ("shared", 24): "shared*24",
    ("generation-expert", 24): "shared*24",
    ("understanding-expert", 24): "shared*24",
    ("unifork:12", 24): "shared*12 task*12 norm:task",
    ("unifork:16", 32): "shared*16 task*16 norm:task",
    ("unifork:0", 4): "task*4 norm:task",
    ("unifork:4", 4): "shared*4 norm:task",
    ("mot", 24): "modality*24 norm:modality",
    ("hard-moe", 24): " ".join(["shared modality_mlp"] * 12),
    ("hard-moe", 5): "shared modality_mlp shared modality_mlp shared",
    ("uni-x:9:5", 28): "modality_isolated*9 shared*14 modality_isolated*5",
    ("uni-x:0:2", 4): "shared*2 modality_isolated*2",
}
"""Preset and number of layers -> the plan that config.json keeps."""


@pytest.mark.parametrize(("preset", "layers"), PRESET_PLANS)
def test_presets_are_the_plans_of_the_comparison(preset, layers):
    text = PRESET_PLANS[preset, layers]
    plan = LayerPlan.parse(preset, layers)
    assert plan == LayerPlan.parse(text, layers)
    assert str(plan) == text


def test_every_preset_is_tried():
    assert {spelling.split(":")[0] for spelling in PRESETS} == {preset.split(":")[0] for preset, _ in PRESET_PLANS}


@pytest.mark.parametrize(
    ("text", "layers", "says"),
    [
        ("unifrok:2", 4, "unknown preset or layer kind 'unifrok'. Did you mean 'unifork:M'"),
        ("mott", 4, "Known: generation-expert, hard-moe, modality, "),
        ("unifork", 4, "write unifork:M with whole numbers of layers"),
        ("uni-x:9", 28, "write uni-x:FIRST:LAST"),
        ("unifork:two", 4, "write unifork:M"),
        ("mot:3", 4, "write mot"),
        ("uni-x:9:5", 12, "has 14 layers, the backbone num_hidden_layers=12"),
        ("mot", None, "needs the number of layers"),
        ("task*rest shared*rest", 4, "*rest twice"),
        ("(shared task*rest)*2", 4, "*rest inside a group"),
    ],
)
def test_wrong_presets_say_what_is_wrong(text, layers, says):
    with pytest.raises(ConfigError, match="layer plan") as caught:
        LayerPlan.parse(text, layers)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("shared shared  task", "shared*2 task"),
        ("(shared modality_mlp)*2", "shared modality_mlp shared modality_mlp"),
        ("( shared*2 task )*2 task", "shared*2 task shared*2 task*2"),
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
        ("shared*0", "no layers"),
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

"""Patterns, schedules, turns, and what an update does to a branch without tokens."""

import sys
from pathlib import Path

import pytest
import torch

from unifork.config import Experiment, OptimizerConfig
from unifork.errors import ConfigError
from unifork.experiments import resolve
from unifork.training.loop import turns
from unifork.training.optimizer import learning_rate, make_optimizer, trainable_names
from unifork.training.strategies import strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from model_samples import generation, noisy_model, rows, understanding

NAMES = ["connector.first.weight", "layers.0.mlp.shared.up.weight", "layers.1.mlp.generation.up.weight", "norm.weight"]


def test_patterns_choose_in_the_order_of_the_model_and_can_take_out():
    assert trainable_names(NAMES, ["norm.*", "layers.*"], "x") == [NAMES[1], NAMES[2], NAMES[3]]
    assert trainable_names(NAMES, ["*", "!layers.*.shared.*"], "x") == [NAMES[0], NAMES[2], NAMES[3]]


def test_a_pattern_without_a_match_is_an_error_with_near_names():
    with pytest.raises(ConfigError, match=r"'conector\.\*' matches none of the 4.*connector\.first\.weight"):
        trainable_names(NAMES, ["conector.*"], "track joint")


def test_schedules():
    constant = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=4)
    assert [learning_rate(constant, step, 10) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=0)
    rates = [learning_rate(cosine, step, 100) for step in range(100)]
    assert rates == sorted(rates, reverse=True)
    assert rates[49] == pytest.approx(0.5, abs=0.01)
    assert rates[99] == pytest.approx(0.0, abs=1e-12)


def stage(interleave, **steps):
    experiment: Experiment = resolve("demo")
    base = experiment.stages["s3"]
    tracks = {name: base.tracks["generation"].model_copy(update={"steps": count}) for name, count in steps.items()}
    return base.model_copy(update={"tracks": tracks, "interleave": interleave})


def test_turns_hold_every_step_of_every_track_once_and_in_order():
    for interleave in ("sequential", "concurrent", 1, 3, 50):
        order = turns(stage(interleave, generation=7, understanding=4))
        assert [step for name, step in order if name == "generation"] == list(range(7))
        assert [step for name, step in order if name == "understanding"] == list(range(4))
        assert len(order) == 11


def test_how_tracks_take_turns():
    assert turns(stage("sequential", g=2, u=2)) == [("g", 0), ("g", 1), ("u", 0), ("u", 1)]
    assert turns(stage(1, g=2, u=2)) == [("g", 0), ("u", 0), ("g", 1), ("u", 1)]
    assert turns(stage(2, g=3, u=1)) == [("g", 0), ("g", 1), ("u", 0), ("g", 2)]
    assert turns(stage("concurrent", g=4, u=2)) == [("g", 0), ("g", 1), ("u", 0), ("g", 2), ("g", 3), ("u", 1)]


def test_a_branch_that_is_left_out_decays_as_with_a_gradient_of_zero():
    found = []
    for every in (True, False):
        model = noisy_model("shared*2 task*2 norm:task").train()
        sharing = strategy("none", 1)
        sharing.wrap(model)
        assert model.every_branch is False
        model.every_branch = every
        named = dict(model.named_parameters())
        optimizer = make_optimizer(
            OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0), named.values()
        )
        sharing.start({"all": (optimizer, named)})
        sharing.turn("all")
        for document in (generation(1), understanding(1), understanding(2)):  # then none of generation
            losses = model(rows([document]))
            (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
            sharing.update({"all": list(named.values())}, 1.0)
            model.zero_grad()
        found.append({name: parameter.detach().clone() for name, parameter in named.items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])

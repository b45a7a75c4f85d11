"""Compiled parts compute the same, in few graphs, whatever the number of tokens."""

import pytest
from model_samples import generation, gradients, largest_difference, mixed_batch, noisy_model, rows, understanding
from torch._dynamo.utils import counters

pytestmark = pytest.mark.slow


def test_gradients_are_those_of_the_plain_model_in_few_graphs():
    plain, compiled = (noisy_model("shared*2 task*2 norm:task").train() for _ in range(2))
    for model in (plain, compiled):
        model.set_attn_implementation("varlen")
    compiled.compile_parts()
    assert dict(compiled.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    counters.clear()
    graphs = []
    long = rows([understanding(1), understanding(2), generation(1), generation(4, 7)], tokens=96)
    for batch in (mixed_batch(), rows([understanding(3), generation(2)], tokens=50), long):
        for model in (plain, compiled):
            losses = model(batch)
            (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
        difference, name = largest_difference(gradients(compiled), gradients(plain))
        assert difference < 1e-5, name
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] <= 6  # of 12 norms, 6 MLPs and 2 blocks
    assert graphs[-1] <= graphs[0] + 2

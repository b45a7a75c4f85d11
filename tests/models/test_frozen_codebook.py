"""Training cannot move a codebook. (The official quantizer's drifts: it learns whenever it is in training mode.)"""

from pathlib import Path

import pytest
import torch
from model_samples import mixed_batch, noisy_model

from unifork.config import OptimizerConfig
from unifork.errors import ConfigError
from unifork.image_tokenizer.conversion import read_official
from unifork.training.optimizer import make_optimizer, trainable_names

OFFICIAL = Path(__file__).parents[1] / "fixtures" / "official_tiny" / "unifork"


def test_train_steps_of_model_and_tokenizer_together_move_no_codebook():
    """Both in one module that is set to training mode before every step, as trainers do; all is handed to AdamW."""
    model, tokenizer = noisy_model("shared*2 task*2 norm:task"), read_official(OFFICIAL)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(pixels)
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    codebook = model.codebook.clone()
    norm = model.norm.state_dict()["generation.weight"].clone()
    host = torch.nn.ModuleDict({"model": model, "tokenizer": tokenizer})
    settings = OptimizerConfig(learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.1)
    optimizer = make_optimizer(settings, host.parameters())
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate
    for _ in range(2):
        host.train()
        tokenizer.train()
        assert torch.equal(tokenizer.encode(pixels), codes)
        losses = model(mixed_batch())
        (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(model.norm.state_dict()["generation.weight"], norm), "the model does learn"
    assert torch.equal(model.codebook, codebook)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tokenizer.state_dict().items())


def test_no_pattern_of_a_stage_can_name_the_codebook():
    names = [name for name, _ in noisy_model("shared*4").named_parameters()]
    with pytest.raises(ConfigError, match="codebook"):
        trainable_names(names, ("codebook",), "stage")

"""Sharded over two ranks with one task each, gradients are those of one process."""

import pytest
import torch
from distributed_testing import run_distributed
from model_samples import generation, gradients, noisy_model, rows, understanding
from torch.distributed.fsdp import fully_shard

from unifork.batch import Batch
from unifork.models.layer_plan import KINDS

CASES = [
    ("shared*2 task*2 norm:task", ()),
    ("modality*1 (shared modality_mlp)*1 modality_isolated*1 norm:modality", (*KINDS, "head")),
]
"""Plan, and what is recomputed in the backward pass."""
DOCUMENTS = [[understanding(1), understanding(2)], [generation(1), generation(2)]]


def backward(model, batch: Batch, world_size: int) -> None:
    """The contract: world size * sum / global count, because sharding averages over ranks."""
    words = sum(int(document.loss_mask_T.sum()) for document in DOCUMENTS[0])
    codes = sum(document.codes_ND.size for document in DOCUMENTS[1])
    losses = model(batch)
    (world_size * (losses.text_loss_sum / words + losses.image_loss_sum_D.sum() / codes)).backward()


def sharded(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    found = []
    for plan, checkpointing in CASES:
        model = noisy_model(plan).train()
        model.set_activation_checkpointing(checkpointing)
        for module in (*model.layers, *model.image_head.blocks, model):
            fully_shard(module)
        backward(model, rows(DOCUMENTS[rank]), world_size)
        found.append({name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()})
    return found


@pytest.mark.slow
def test_one_task_per_rank_gives_the_gradients_of_one_process():
    torch.set_num_threads(1)
    results = run_distributed(sharded, 2)
    for number, (plan, _) in enumerate(CASES):
        model = noisy_model(plan).train()
        backward(model, rows(*DOCUMENTS), 1)
        wanted = gradients(model)
        for result in results:
            assert result[number].keys() == wanted.keys()
            for name, gradient in wanted.items():
                assert (result[number][name] - gradient).abs().max() < 1e-5, name

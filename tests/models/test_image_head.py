"""The head is causal over depth and its depth loop equals the teacher-forced pass."""

import torch
from model_samples import CODES, DEPTH, codebook, noisy_model

HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
CODE = torch.randint(0, CODES, (5, DEPTH), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_code_affects_later_depths_only():
    head = noisy_model("shared*4").image_head
    before = head(HIDDEN, CODE, codebook())
    for depth in range(DEPTH):
        changed = CODE.clone()
        changed[:, depth] = (changed[:, depth] + 1) % CODES
        after = head(HIDDEN, changed, codebook())
        assert torch.equal(after[:, : depth + 1], before[:, : depth + 1])
        assert depth == DEPTH - 1 or not torch.equal(after[:, depth + 1 :], before[:, depth + 1 :])


@torch.no_grad()
def test_the_depth_loop_equals_the_teacher_forced_pass():
    head = noisy_model("shared*4").image_head
    seen = []

    def choose(logits, depth):
        seen.append(logits)
        return CODE[:, depth]

    assert torch.equal(head.unroll(HIDDEN, codebook(), choose), CODE)
    assert (torch.stack(seen, 1) - head(HIDDEN, CODE, codebook())).abs().max() < 1e-5


@torch.no_grad()
def test_attention_may_be_wider_than_the_hidden_size():
    block = noisy_model("shared*4").image_head.blocks[0]
    assert block.q_proj.weight.shape == (40, 32)
    assert block.o_proj.weight.shape == (32, 40)

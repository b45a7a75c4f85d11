"""The head is causal over depth, its depth loop equals the teacher-forced pass, and its two forms are one function."""

import copy

import pytest
import torch
from model_samples import CODES, DEPTH, codebook, noisy_model

from unifork.config import HeadConfig
from unifork.errors import ConfigError
from unifork.models.image_head import ImageHead

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


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_both_forms_are_one_function(dtype, relative):
    published = noisy_model("shared*4", folded=False).image_head.to(dtype)
    hidden, codes = HIDDEN.to(dtype), codebook().to(dtype)
    wanted = published(hidden, CODE, codes)
    head = copy.deepcopy(published)
    for folded in (True, True, False, False):
        head.set_form(folded=folded)
        assert (head(hidden, CODE, codes) - wanted).abs().max() <= relative * wanted.abs().max()
        assert torch.equal(head.unroll(hidden, codes, lambda logits, depth: CODE[:, depth]), CODE)
    assert {n: t.shape for n, t in head.state_dict().items()} == {n: t.shape for n, t in published.state_dict().items()}


def test_a_narrow_folded_head_has_no_published_form():
    with pytest.raises(ConfigError, match="heads \\* head_dim = 8 is narrower than hidden_size 32"):
        ImageHead(HeadConfig(layers=1, heads=2, head_dim=4), 32, 8, 23, 3).set_form(folded=False)

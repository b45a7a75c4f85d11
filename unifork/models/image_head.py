"""The image head: a small transformer over code depth that predicts the D codes of one position.

In: the backbone's vector at the position before, and the codes so far. Out: logits over the K codes
for each depth. The sequence it reads is the projected backbone vector, then the projected sum of the
code vectors of depths 0..d-1 for d = 1..D-1; depth d is predicted from item d. All depths share
the codebook and the classifier.

It has two forms. The original puts one more linear map in front of query, key and value and one
behind the output projection. Two linear maps in a row are one, so the folded head, the default, is
the same function with less than a third of the weights; the head runs D times per image token and
is most of the cost of training and sampling. Trained on, the two forms take different ways: the
optimizer sees other parameters. Attention may be wider than the hidden size (heads * head_dim).

Shape suffixes: M positions, D depth, R = M*D, L items of the sequence (at most D), H hidden size,
C code channels, K codebook rows, E head size, O and I outputs and inputs of a linear map.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from unifork.config import HeadConfig
from unifork.errors import ConfigError
from unifork.models.decoder import Linear
from unifork.models.losses import linear_cross_entropy

HEAD = "head"
"""The image head, where kinds of layers are named."""
KeyValue = tuple[Tensor, Tensor]
Choose = Callable[[Tensor, int], Tensor]
"""Picks codes (M) from logits (M, K) at a depth."""


class HeadBlock(nn.Module):
    """Pre-norm attention over depth, then a pre-norm MLP with exact GELU."""

    kind_name = HEAD

    def __init__(self, hidden_size: int, config: HeadConfig) -> None:
        super().__init__()
        inner, wide = config.heads * config.head_dim, config.mlp_ratio * hidden_size
        width = hidden_size if config.folded else inner
        self.head_dim = config.head_dim
        self.activation_checkpointing = False
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.in_proj = nn.Identity() if config.folded else nn.Linear(hidden_size, inner)
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.o_proj = nn.Linear(inner, width)
        self.out_proj = nn.Identity() if config.folded else nn.Linear(inner, hidden_size)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.fc1 = nn.Linear(hidden_size, wide)
        self.fc2 = nn.Linear(wide, hidden_size)

    def forward(self, x_MLH: Tensor) -> Tensor:
        """A whole sequence at once, as in training."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(self._layer, x_MLH, use_reentrant=False, preserve_rng_state=False))
        return self._layer(x_MLH)

    def step(self, x_M1H: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """The next item, given keys and values of the items before; returns them with its own added."""
        query, key, value = self._heads(x_M1H)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        return self._rest(x_M1H, F.scaled_dot_product_attention(query, key, value)), (key, value)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the outer maps into the projections; the same function with fewer weights."""
        if isinstance(self.in_proj, nn.Linear) and isinstance(self.out_proj, nn.Linear):
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(self, name, _product(getattr(self, name), self.in_proj))
            self.o_proj = _product(self.out_proj, self.o_proj)
            self.in_proj = self.out_proj = nn.Identity()

    @torch.no_grad()
    def unfold(self) -> None:
        """Put identities, padded with zeros, in front and behind: the published form of the same function.

        Raises ConfigError when attention is narrower than the hidden size, where no identity fits.
        """
        if isinstance(self.in_proj, nn.Linear):
            return
        inner, hidden_size = self.q_proj.weight.shape
        if inner < hidden_size:
            raise ConfigError(
                f"image head: heads * head_dim = {inner} is narrower than hidden_size {hidden_size}; "
                "a folded head has an unfolded form from that width on"
            )
        eye_HH = torch.eye(hidden_size).to(self.q_proj.weight)
        identity = _linear(eye_HH, torch.zeros_like(eye_HH[0]))
        self.in_proj, self.out_proj = _padded(identity, inner, hidden_size), _padded(identity, hidden_size, inner)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, _padded(getattr(self, name), inner, inner))

    def _layer(self, x_MLH: Tensor) -> Tensor:
        query, key, value = self._heads(x_MLH)
        return self._rest(x_MLH, F.scaled_dot_product_attention(query, key, value, is_causal=True))

    def _heads(self, x_MLH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        normed = self.in_proj(self.attention_norm(x_MLH))
        query, key, value = (
            project(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value

    def _rest(self, x_MLH: Tensor, attended: Tensor) -> Tensor:
        x_MLH = x_MLH + self.out_proj(self.o_proj(attended.transpose(1, 2).flatten(2)))
        return cast(Tensor, x_MLH + self.fc2(F.gelu(self.fc1(self.mlp_norm(x_MLH)))))


def _linear(weight_OI: Tensor, bias_O: Tensor) -> nn.Linear:
    linear = Linear(weight_OI.shape[1], weight_OI.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight_OI), nn.Parameter(bias_O)
    return linear


def _product(outer: nn.Linear, inner: nn.Linear) -> nn.Linear:
    """One map for two in a row, multiplied in float64."""
    weight_OI = outer.weight.double() @ inner.weight.double()
    bias_O = outer.weight.double() @ inner.bias.double() + outer.bias.double()
    return _linear(weight_OI.to(outer.weight.dtype), bias_O.to(outer.bias.dtype))


def _padded(linear: nn.Linear, outputs: int, inputs: int) -> nn.Linear:
    """The same map with zero rows and columns added."""
    rows, columns = outputs - linear.out_features, inputs - linear.in_features
    return _linear(F.pad(linear.weight, (0, columns, 0, rows)), F.pad(linear.bias, (0, rows)))


class ImageHead(nn.Module):
    """Predicts codes depth by depth; the codebook is an argument, it belongs to the model."""

    def __init__(
        self, config: HeadConfig, hidden_size: int, code_channels: int, codebook_size: int, depth: int
    ) -> None:
        super().__init__()
        self.depth = depth
        self.code_proj = nn.Linear(code_channels, hidden_size)
        self.hidden_proj = nn.Linear(hidden_size, hidden_size)
        self.depth_embedding = nn.Embedding(depth, hidden_size)
        self.blocks = nn.ModuleList([HeadBlock(hidden_size, config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, codebook_size)

    def forward(self, hidden_MH: Tensor, codes_MD: Tensor, codebook_KC: Tensor) -> Tensor:
        """Logits (M, D, K); those of depth d depend on the backbone's vector and codes 0..d-1 only."""
        return cast(Tensor, self.classifier(self._read(hidden_MH, codes_MD, codebook_KC)))

    def loss(self, hidden_MH: Tensor, codes_MD: Tensor, codebook_KC: Tensor) -> Tensor:
        """Cross entropy (M, D) of the codes under those logits, which are never whole."""
        x_RH = self._read(hidden_MH, codes_MD, codebook_KC).flatten(0, 1)
        loss_R = linear_cross_entropy(x_RH, self.classifier.weight, self.classifier.bias, codes_MD.flatten())
        return loss_R.view(codes_MD.shape)

    def _read(self, hidden_MH: Tensor, codes_MD: Tensor, codebook_KC: Tensor) -> Tensor:
        sums_MDC = codebook_KC[codes_MD[:, : self.depth - 1]].cumsum(1)
        items = [self.hidden_proj(hidden_MH)[:, None], self._project_codes(sums_MDC)]
        x_MLH = torch.cat(items, 1) + self.depth_embedding.weight
        for block in self.blocks:
            x_MLH = block(x_MLH)
        return cast(Tensor, self.norm(x_MLH))

    def unroll(self, hidden_MH: Tensor, codebook_KC: Tensor, choose: Choose) -> Tensor:
        """Codes (M, D), each picked by `choose` from the logits given those before it."""
        blocks = cast(list[HeadBlock], list(self.blocks))
        past: list[KeyValue | None] = [None] * len(blocks)
        sums_MC = codebook_KC.new_zeros(len(hidden_MH), codebook_KC.shape[1])
        codes: list[Tensor] = []
        for depth in range(self.depth):
            item = self._project_codes(sums_MC) if depth else self.hidden_proj(hidden_MH)
            x_M1H = (item + self.depth_embedding.weight[depth])[:, None]
            for number, block in enumerate(blocks):
                x_M1H, past[number] = block.step(x_M1H, past[number])
            codes.append(choose(self.classifier(self.norm(x_M1H))[:, 0], depth))
            sums_MC = sums_MC + codebook_KC[codes[-1]]
        return torch.stack(codes, 1)

    def set_form(self, *, folded: bool) -> None:
        """Bring every block into one of the forms, in place. Raises ConfigError, see `HeadBlock.unfold`."""
        for block in cast(list[HeadBlock], list(self.blocks)):
            block.fold() if folded else block.unfold()

    def _project_codes(self, sums: Tensor) -> Tensor:
        return cast(Tensor, self.code_proj(sums.to(self.code_proj.weight.dtype)))

"""The convolutional decoder of VQGAN: a map of summed code rows in, pixels out.

In: (B, Z, G, G). Out: (B, 3, S, S), about -1 to 1, not clipped; each level but the last run doubles
the side. Structure and names are those of VQGAN as VILA-U uses it (official key names:
`decoder.up.LEVEL.block.N.conv1.weight`), level 0 is the full resolution and runs last. The decoder
takes no part in `encoder_id`: two decoders may draw the same codes differently.

Shape suffixes: B images, Z channels of the map, C channels, H height, W width, P positions.
"""

from collections import OrderedDict
from itertools import pairwise
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from unifork.config import DecoderConfig


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, SiLU, 3x3 convolution, twice; a 1x1 convolution carries the input over new channels."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in, groups)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm2 = _norm(channels_out, groups)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Input plus what the block adds."""
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return cast(Tensor, self.nin_shortcut(x_BCHW) + h_BCHW)


class AttentionBlock(nn.Module):
    """Attention with one head over all positions of the map; projections are 1x1 convolutions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Input plus what the positions tell each other."""
        normed_BCHW = self.norm(x_BCHW)
        query_BPC, key_BPC, value_BPC = (
            project(normed_BCHW).flatten(2).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        mixed_BPC = F.scaled_dot_product_attention(query_BPC, key_BPC, value_BPC)
        return cast(Tensor, x_BCHW + self.proj_out(mixed_BPC.transpose(1, 2).reshape(x_BCHW.shape)))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where asked, and the upsampling above level 0.

    Upsampling repeats each pixel twice in both directions; a 3x3 convolution follows.
    """

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, groups: int, *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(
            AttentionBlock(channels_out, groups) if attention else nn.Identity() for _ in range(blocks)
        )
        self.upsample: nn.Module = nn.Identity()
        if upsample:
            repeat, conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(channels_out, channels_out, 3, padding=1)
            self.upsample = nn.Sequential(OrderedDict(repeat=repeat, conv=conv))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of twice the side, or of the same at level 0."""
        for block, attention in zip(self.block, self.attn, strict=True):
            x_BCHW = attention(block(x_BCHW))
        return cast(Tensor, self.upsample(x_BCHW))


class Decoder(nn.Module):
    """From the map after the 1x1 convolution to pixels."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = nn.Sequential(
            OrderedDict(
                block_1=ResidualBlock(widths[-1], widths[-1], groups),
                attn_1=AttentionBlock(widths[-1], groups),
                block_2=ResidualBlock(widths[-1], widths[-1], groups),
            )
        )
        self.up = nn.ModuleList(
            Level(before, width, config.blocks + 1, groups, attention=n in config.attention_levels, upsample=n > 0)
            for n, (width, before) in enumerate(pairwise([*widths, widths[-1]]))
        )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, map_BZHW: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) of a map (B, Z, G, G)."""
        x_BCHW = self.mid(self.conv_in(map_BZHW))
        for level in reversed(self.up):
            x_BCHW = level(x_BCHW)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x_BCHW))))


def zero_last_convolutions(decoder: nn.Module) -> None:
    """Start every residual block of a fresh decoder as the identity, which speeds up early training."""
    for module in decoder.modules():
        if isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.weight)

"""The convolutional decoder of VQGAN: a map of summed code rows in, pixels out.

In: (B, Z, G, G). Out: (B, 3, S, S), about -1 to 1, not clipped; each level but the last run doubles
the side. Structure and names are those of VQGAN as VILA-U uses it (official key names:
`decoder.up.LEVEL.block.N.conv1.weight`), level 0 is the full resolution and runs last. The decoder
takes no part in `encoder_id`: two decoders may draw the same codes differently.

Shape suffixes: B pictures, Z channels of the map, C channels, H height, W width, P positions.
"""

from itertools import pairwise
from typing import cast

import torch
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
        if channels_in != channels_out:
            self.nin_shortcut = nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Input plus what the block adds."""
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        if hasattr(self, "nin_shortcut"):
            x_BCHW = self.nin_shortcut(x_BCHW)
        return cast(Tensor, x_BCHW + h_BCHW)


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


class Upsample(nn.Module):
    """Each pixel repeated twice in both directions, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of twice the side."""
        doubled_BCHW = F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")
        return cast(Tensor, self.conv(doubled_BCHW))


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of the same shape."""
        return cast(Tensor, self.block_2(self.attn_1(self.block_1(x_BCHW))))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where asked, and the upsampling."""

    def __init__(
        self, channels_in: int, channels_out: int, blocks: int, groups: int, *, attention: bool, upsample: bool
    ) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * blocks
        self.block = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(AttentionBlock(channels_out, groups) for _ in range(blocks if attention else 0))
        if upsample:
            self.upsample = Upsample(channels_out)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """A map of twice the side, or of the same at level 0."""
        for index, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[index](x_BCHW)
        return self.upsample(x_BCHW) if hasattr(self, "upsample") else x_BCHW


class Decoder(nn.Module):
    """From the map after the 1x1 convolution to pixels."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        groups = config.norm_groups
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        lowest = len(widths) - 1
        self.up = nn.ModuleList(
            Level(
                widths[min(level + 1, lowest)],
                widths[level],
                config.blocks + 1,
                groups,
                attention=level in config.attention_levels,
                upsample=level > 0,
            )
            for level in range(len(widths))
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
    with torch.no_grad():
        for module in decoder.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.zero_()

"""The SigLIP vision encoder: pixels in, one feature vector per patch out.

In: pixels from -1 to 1, (B, 3, H, W). Out: features (B, N, C), patches in raster order: the output
of the second to last layer, without a norm. This is what VILA-U and UniFork quantize
(rqvaesiglip/modeling: the loop over layers stops after index n - 2), so the last layer of the
configuration is never built. Layers, patch convolution and names are transformers' SigLIP, which
makes loading official weights a renaming.

Shape suffixes: B images, H height, W width, N positions, C channels, G patches along a side.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer, SiglipVisionEmbeddings

from unifork.config import EncoderConfig
from unifork.errors import DataError


class VisionEncoder(nn.Module):
    """Patch embedding, a table of positions, and all layers but the last of a SigLIP encoder.

    position_grid: patches along a side of the position table, at other image sizes it is resized.
    """

    def __init__(self, config: EncoderConfig, patch_size: int, position_grid: int) -> None:
        super().__init__()
        siglip = SiglipVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            image_size=patch_size * position_grid,
            patch_size=patch_size,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
        )
        siglip._attn_implementation = "sdpa"
        self.embeddings = SiglipVisionEmbeddings(siglip)
        self.layers = nn.ModuleList(SiglipEncoderLayer(siglip) for _ in range(config.layers - 1))

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """The features that are quantized, (B, N, C)."""
        features_BNC = self.embed(pixels_BCHW)
        for layer in self.layers:
            features_BNC = layer(features_BNC, attention_mask=None)
        return features_BNC

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """Patch and position embeddings added, the input of the first layer, (B, N, C)."""
        patches_BCGG = self.embeddings.patch_embedding(pixels_BCHW)
        patches_BNC: Tensor = patches_BCGG.flatten(2).transpose(1, 2)
        return patches_BNC + positions_for(self.embeddings.position_embedding.weight, patches_BNC.shape[1])

    def start_local(self, *, stay: bool) -> None:
        """Zero the positions and what attention adds in a fresh encoder.

        Codes of the same patch are then equal wherever it lies and whatever lies around it; the
        decoder knows places and neighbours already. With `stay` they remain zero in training: of
        the patches of the demo's flat shapes the codes carry as many bits as the patches, instead
        of more than twice as many (measured), and a language model has only those to learn.
        """
        outward = [self.embeddings.position_embedding.weight]
        for layer in self.layers:
            outward += list(cast(SiglipEncoderLayer, layer).self_attn.out_proj.parameters())
        for parameter in outward:
            nn.init.zeros_(parameter).requires_grad_(not stay)


def positions_for(table_RC: Tensor, count: int) -> Tensor:
    """Position embeddings for `count` patches, (count, C), from a table of R rows.

    As the official code does it (siglip/modeling_siglip.py): as it is when the counts agree; more
    patches than rows: resized as a square, bicubic, align_corners false, no antialiasing; fewer:
    the first rows of the flat table, which mixes up rows of the image but is what the weights of
    a smaller image would have seen there.
    """
    rows = table_RC.shape[0]
    if count <= rows:
        return table_RC[:count]
    old_side, new_side = int(rows**0.5), int(count**0.5)
    if old_side**2 != rows or new_side**2 != count:
        raise DataError(f"{count} patches do not fit a table of {rows} positions: only squares can be resized")
    square_1CGG = table_RC.t().reshape(1, -1, old_side, old_side)
    resized_1CGG = F.interpolate(square_1CGG, size=(new_side, new_side), mode="bicubic", align_corners=False)
    return resized_1CGG.flatten(2)[0].t()

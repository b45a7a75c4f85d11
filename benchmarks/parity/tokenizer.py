"""The image tokenizer against the official one: features, codes, sums of rows, images.

The weights are those of the tower inside the folder's UniFork checkpoint. Inputs are of three sizes:
that of the position table, larger and smaller.

Shape suffixes: B images, S side in pixels, N positions, G positions along a side, D code depth,
C channels.
"""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.parity.comparison import Comparison, Reference
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer, commitment_loss

ITEM = "01_tokenizer"
INPUT = "pixel_values"
FLOAT32 = (1e-4, 0.0)
"""What the fixtures' README allows float32 features and images: absolute, and as a share of the value."""
LOSS = (1e-5, 1e-5)
"""What it allows losses, here also as a share: the loss grows with the square of the features."""
EXACT = (0.0, 0.0)
TOLERANCES = {"codes": EXACT, "embed_code_with_depth": EXACT, "commitment_loss": LOSS}
"""By name, where it is not FLOAT32."""
BFLOAT16_TIMES = 2.0
"""bfloat16 images depend on the kernel: two of them may lie on opposite sides of the float32 image."""


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Every tensor of 01_tokenizer.safetensors but the inputs.

    Raises FileNotFoundError, KeyError or CheckpointError for a folder of another layout.
    """
    reference = Reference(folder, ITEM)
    tokenizer = read_official(folder / "unifork")
    for (case,) in reference.matching(rf"(.+)\.{INPUT}"):
        outputs = _outputs(tokenizer, reference[f"{case}.{INPUT}"])
        for stored, name in reference.matching(rf"({case}\.(?!{INPUT})(.+))"):
            tolerance = TOLERANCES.get(name, FLOAT32)
            if name.startswith("decoded_bf16"):
                official = (reference[stored].float() - reference[f"{case}.decoded_fp32"]).abs().max()
                tolerance = (BFLOAT16_TIMES * float(official), 0.0)
            yield Comparison(ITEM, stored, reference[stored], outputs[name], *tolerance)


@torch.no_grad()
def _outputs(tokenizer: ImageTokenizer, pixels_BCSS: Tensor) -> dict[str, Tensor]:
    """What the tokenizer makes of images, by official names and in official shapes."""
    features_BNC, codes_BND = tokenizer.encoder(pixels_BCSS), tokenizer.encode(pixels_BCSS)
    rows_BNDC = tokenizer.quantizer.codebook[codes_BND]
    # rounds as straight-through does
    quantized_BNC = features_BNC + (tokenizer.quantizer.lookup(codes_BND) - features_BNC)
    half = deepcopy(tokenizer).to(torch.bfloat16)
    half.quantizer.codebook = tokenizer.quantizer.codebook  # as `load` does
    map_BCGG = as_map(quantized_BNC).permute(0, 3, 1, 2)
    return {
        "patch_plus_pos_embeddings": tokenizer.encoder.embed(pixels_BCSS),
        "pre_quant_features": as_map(features_BNC),
        "codes": as_map(codes_BND),
        "z_q": as_map(quantized_BNC),
        "embed_code_with_depth": as_map(rows_BNDC),
        "depth_sum_minus_z_q_maxabs": (rows_BNDC.sum(2) - quantized_BNC).abs().max().reshape(1),
        "commitment_loss": commitment_loss(features_BNC.flatten(0, 1), rows_BNDC.cumsum(2).flatten(0, 1)).reshape(1),
        "decoded_fp32": tokenizer.decode(codes_BND),
        # the 1x1 convolution in float32, the decoder in bfloat16, as the official model does
        "decoded_bf16_mixed": half.decoder(tokenizer.post_quant_conv(map_BCGG).bfloat16()),
        # everything in bfloat16, from the sum of code rows, as the official inference script does
        "decoded_bf16_infer": half.decode(codes_BND),
    }


def as_map(positions: Tensor) -> Tensor:
    """(B, N, ...) as (B, G, G, ...)."""
    side = int(positions.shape[1] ** 0.5)
    return positions.reshape(len(positions), side, side, *positions.shape[2:])

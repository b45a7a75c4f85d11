"""The image tokenizer against the official one: features, codes, sums of rows, pictures.

The weights are those of the tower inside the folder's UniFork checkpoint. Inputs are of three sizes:
that of the position table, larger and smaller.

Shape suffixes: B pictures, S side in pixels, N positions, G positions along a side, D code depth,
C channels.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.image_tokenizer.quantizer import commitment_loss
from unifork.parity.comparison import Comparison

ITEM = "01_tokenizer"
INPUT = "pixel_values"
FLOAT32 = 1e-4
"""What the fixtures' README allows float32 features and pictures."""
LOSS = 1e-5
"""What it allows losses, here also as a share: the loss grows with the square of the features."""
BFLOAT16_TIMES = 2.0
"""bfloat16 pictures depend on the kernel: two of them may lie on opposite sides of the float32 picture."""


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Every tensor of 01_tokenizer.safetensors but the inputs.

    Raises FileNotFoundError, KeyError or CheckpointError for a folder of another layout.
    """
    expected = load_file(folder / f"{ITEM}.safetensors")
    tokenizer = read_official(folder / "unifork")
    for case in sorted(name.removesuffix(f".{INPUT}") for name in expected if name.endswith(f".{INPUT}")):
        wanted = {name.removeprefix(f"{case}."): t for name, t in expected.items() if name.startswith(f"{case}.")}
        outputs = Outputs(tokenizer, wanted.pop(INPUT))
        for name, tensor in sorted(wanted.items()):
            absolute, relative = _tolerance(name, wanted)
            yield Comparison(ITEM, f"{case}.{name}", tensor, OUTPUTS[name](outputs), absolute, relative)


class Outputs:
    """What the tokenizer makes of pictures, in the official shapes."""

    @torch.no_grad()
    def __init__(self, tokenizer: ImageTokenizer, pixels_BCSS: Tensor) -> None:
        self.tokenizer = tokenizer
        self.embedded_BNC = tokenizer.encoder.embed(pixels_BCSS)
        self.features_BNC = tokenizer.encoder(pixels_BCSS)
        self.codes_BND = tokenizer.encode(pixels_BCSS)
        self.rows_BNDC = tokenizer.quantizer.codebook[self.codes_BND]
        sum_BNC = tokenizer.quantizer.lookup(self.codes_BND)
        self.quantised_BNC = self.features_BNC + (sum_BNC - self.features_BNC)  # rounds as straight-through does
        self.rounding = (self.rows_BNDC.sum(2) - self.quantised_BNC).abs().max()

    def commitment(self) -> Tensor:
        """The commitment loss, (1,)."""
        return commitment_loss(self.features_BNC.flatten(0, 1), self.rows_BNDC.cumsum(2).flatten(0, 1)).reshape(1)

    def decoded(self) -> Tensor:
        """The pictures (B, C, S, S) in float32."""
        return self.tokenizer.decode(self.codes_BND)

    @torch.no_grad()
    def decoded_half(self) -> Tensor:
        """Everything in bfloat16, from the sum of code rows, as the official inference script does."""
        return self._half().decode(self.codes_BND)

    @torch.no_grad()
    def decoded_mixed(self) -> Tensor:
        """The 1x1 convolution in float32, the decoder in bfloat16, as the official model does."""
        map_BCGG = as_map(self.quantised_BNC).permute(0, 3, 1, 2)
        drawn_BCSS: Tensor = self._half().decoder(self.tokenizer.post_quant_conv(map_BCGG).bfloat16())
        return drawn_BCSS

    def _half(self) -> ImageTokenizer:
        half = deepcopy(self.tokenizer).to(torch.bfloat16)
        half.quantizer.codebook = self.tokenizer.quantizer.codebook  # as `load` does
        return half


def as_map(positions: Tensor) -> Tensor:
    """(B, N, ...) as (B, G, G, ...)."""
    side = int(positions.shape[1] ** 0.5)
    return positions.reshape(len(positions), side, side, *positions.shape[2:])


OUTPUTS: dict[str, Callable[[Outputs], Tensor]] = {
    "patch_plus_pos_embeddings": lambda out: out.embedded_BNC,
    "pre_quant_features": lambda out: as_map(out.features_BNC),
    "codes": lambda out: as_map(out.codes_BND),
    "z_q": lambda out: as_map(out.quantised_BNC),
    "embed_code_with_depth": lambda out: as_map(out.rows_BNDC),
    "depth_sum_minus_z_q_maxabs": lambda out: out.rounding.reshape(1),
    "commitment_loss": Outputs.commitment,
    "decoded_fp32": Outputs.decoded,
    "decoded_bf16_mixed": Outputs.decoded_mixed,
    "decoded_bf16_infer": Outputs.decoded_half,
}
"""The fixtures' names of outputs."""


def _tolerance(name: str, wanted: dict[str, Tensor]) -> tuple[float, float]:
    """The largest absolute difference, and the part that may grow with the value."""
    if name in ("codes", "embed_code_with_depth"):
        return 0.0, 0.0
    if name == "commitment_loss":
        return LOSS, LOSS
    if name.startswith("decoded_bf16"):
        return BFLOAT16_TIMES * float((wanted[name].float() - wanted["decoded_fp32"]).abs().max()), 0.0
    return FLOAT32, 0.0

"""The image tokenizer as a whole: pixels to codes, codes to pixels, and its directory on disk.

In: the bytes of views (B, S, S, 3), as pixels (B, 3, S, S) from -1 to 1. Out: codes (B, N, D), int64,
positions in raster order; and back. A directory holds `config.json` (architecture and the two
identities), `model.safetensors` and the canaries. Loading checks all of it and makes no network access.

The tokenizer is always in evaluation mode and its parameters ask for no gradient: whoever trains
one says so through `unifork.image_tokenizer.training`.

The residual quantizer: a feature vector becomes D row numbers of one shared codebook.

In: features (..., C). Out: codes (..., D), each the nearest row to what the rows before it left
over; back again: the sum of the rows. Nothing here learns: the codebook is a frozen table, and
`codebook_training` is the only code that writes to it. (The official quantizer updates its moving
averages whenever the module is in training mode, so its codebook drifts while the language model
is trained.)

Shape suffixes: B images, S side in pixels, N positions, G positions along a side, D code depth,
C channels, M vectors, K codebook rows.
"""

import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from unifork.errors import DataError, IdentityError
from unifork.identity import codebook_identity, weights_identity
from unifork.image_tokenizer import canaries
from unifork.image_tokenizer.architecture import CONFIG_FILE, Architecture, Description, describe
from unifork.image_tokenizer.decoder import Decoder
from unifork.image_tokenizer.encoder import VisionEncoder
from unifork.shards.manifest import whole_folder, write_json
from unifork.weights import check_fit, read_tensors, shapes_of

ROWS_AT_ONCE = 16384
"""Vectors compared with the codebook in one product; bounds the memory at real size to 1 GiB."""
BLOCK = 1024
"""Vectors in one product where few are left: the bits of a product may depend on its shape."""


class ResidualQuantizer(nn.Module):
    """A codebook of K rows and how often it is looked into per position."""

    codebook: Tensor

    def __init__(self, codebook_size: int, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.register_buffer("codebook", torch.zeros(codebook_size, width))

    def quantize(self, features: Tensor) -> Tensor:
        """Codes (..., D), int64, of features (..., C)."""
        codes_MD, _ = residual_codes(features.reshape(-1, features.shape[-1]), self.codebook, self.depth)
        return codes_MD.view(*features.shape[:-1], self.depth)

    def lookup(self, codes: Tensor) -> Tensor:
        """The sum of the code rows, (..., C), of codes (..., D). Raises DataError for codes out of range."""
        rows = self.codebook.shape[0]
        if codes.shape[-1] != self.depth or (codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < rows):
            raise DataError(
                f"codes of shape {tuple(codes.shape)} with values {int(codes.min())} to {int(codes.max())}: "
                f"allowed are {self.depth} codes per position, each from 0 to {rows - 1}"
            )
        return self.codebook[codes].sum(-2)


@torch.no_grad()
def residual_codes(features_MC: Tensor, codebook_KC: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Codes (M, D) and the residuals each of them was chosen for (M, D, C).

    Computed in float32 whatever the dtype of the features: a distance in bfloat16 cannot tell
    neighbouring rows apart.
    """
    rest_MC = features_MC.to(torch.float32)
    codebook_KC = codebook_KC.to(torch.float32)
    codes, residuals = [], []
    for _ in range(depth):
        codes.append(nearest_rows(rest_MC, codebook_KC))
        residuals.append(rest_MC)
        rest_MC = rest_MC - codebook_KC[codes[-1]]
    return torch.stack(codes, dim=1), torch.stack(residuals, dim=1)


def commitment_loss(features_MC: Tensor, partial_MDC: Tensor) -> Tensor:
    """The official one: the mean over depths of the mean squared distance between features and partial sums of rows."""
    return (features_MC[:, None] - partial_MDC).square().mean()


@torch.no_grad()
def nearest_rows(vectors_MC: Tensor, codebook_KC: Tensor) -> Tensor:
    """The nearest codebook row of each vector by squared distance in float32, of equally near ones the first; (M,)."""
    square_K = codebook_KC.square().sum(1)
    product = PRODUCTS.get(codebook_KC.device.type)
    parts = torch.split(vectors_MC, ROWS_AT_ONCE)
    if product is None:
        return torch.cat([plain_argmin(part_MC, codebook_KC, square_K) for part_MC in parts])
    return torch.cat([candidates_first(part_MC, codebook_KC, square_K, product) for part_MC in parts])


def plain_argmin(vectors_MC: Tensor, codebook_KC: Tensor, square_K: Tensor) -> Tensor:
    """The definition: a product in float32, and the first of the least distances."""
    square_M1 = vectors_MC.square().sum(1, keepdim=True)
    return torch.addmm(square_M1 + square_K, vectors_MC, codebook_KC.t(), alpha=-2.0).argmin(1)


def half_product(unit_MC: Tensor, codebook_KC: Tensor) -> Tensor:
    """Unit vectors times codebook rows: float16 in, sums in float32 (CUDA alone). Scaled, so that no row overflows."""
    scale = codebook_KC.abs().amax().clamp_min(TINY)
    return torch.mm(unit_MC.half(), (codebook_KC / scale).half().t(), out_dtype=torch.float32).mul_(scale)


TINY = 1e-30
PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cuda": half_product}
"""Device type: a product with inputs of float16, far cheaper there than float32's. A CPU has none."""


def candidates_first(
    vectors_MC: Tensor, codebook_KC: Tensor, square_K: Tensor, product: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`plain_argmin` with most of its work done in float16. product: unit vectors times rows, as `half_product`.

    A row is a candidate where the errors of both products may make it the nearest. A vector with one candidate has its
    code; the others go through `plain_argmin` in blocks of one shape. The bounds hold for all vectors (Higham, Accuracy
    and Stability of Numerical Algorithms, 3.1). Of the product of x and y: float16 changes it by 2^-10 |x| |y|, and by
    sqrt(C) 2^-24 |x| times the largest row where numbers are too small for it; the sum of C terms by C 2^-23 |x| |y|.
    Of a distance in float32: (C + 4) 2^-24 (|x| + |y|)^2. The nearest row is no longer than |x| and its distance.
    """
    C = codebook_KC.shape[1]
    share, floor, single = 2**-10 + 2**-18 + C * 2**-23, C**0.5 * 2**-24 * square_K.amax().sqrt(), (C + 16) * 2**-24
    size_M1 = vectors_MC.norm(dim=1, keepdim=True).clamp_min(TINY)
    # (|x - y|^2 - |x|^2) / 2|x|, the order of which is that of the distances
    cost_MK = product(vectors_MC / size_M1, codebook_KC).neg_().addr_(0.5 / size_M1[:, 0], square_K)
    least_M1, code_M1 = cost_MK.min(1, keepdim=True)
    error_M1 = share * square_K[code_M1].sqrt() + floor
    reach_M1 = size_M1 + (size_M1**2 + 2.01 * size_M1 * (least_M1 + error_M1)).clamp_min(0).sqrt() * 1.01
    margin_M1 = error_M1 + share * reach_M1 + floor + single * (size_M1 + reach_M1) ** 2 / size_M1
    doubtful_X = ((cost_MK <= least_M1 + margin_M1).sum(1) != 1).nonzero()[:, 0]
    for start in range(0, len(doubtful_X), BLOCK):
        block_Y = doubtful_X[start : start + BLOCK]
        block_YC = F.pad(vectors_MC[block_Y], (0, 0, 0, BLOCK - len(block_Y)))
        code_M1[block_Y, 0] = plain_argmin(block_YC, codebook_KC, square_K)[: len(block_Y)]
    return code_M1[:, 0]


WEIGHTS_FILE = "model.safetensors"
VALUE_OF_BYTE = torch.from_numpy(((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5))


def to_tensor(pixels_BSSC: np.ndarray | Tensor) -> Tensor:
    """Bytes as the encoder reads them: float32 (B, C, S, S), from -1 to 1, on the device of the bytes.

    A table of 256 values, made in the official order: times 1/255 in float64, rounded to float32,
    minus 0.5, over 0.5. (Times a float32 1/255 gives other last bits.)
    """
    bytes_BCSS = torch.as_tensor(pixels_BSSC).permute(0, 3, 1, 2)
    return VALUE_OF_BYTE.to(bytes_BCSS.device).index_select(0, bytes_BCSS.reshape(-1).int()).view(bytes_BCSS.shape)


def to_bytes(pixels_BCSS: Tensor) -> np.ndarray:
    """What the decoder drew, about -1 to 1, as bytes (B, S, S, C)."""
    bytes_BCSS = ((pixels_BCSS.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(bytes_BCSS.permute(0, 2, 3, 1).cpu().numpy())


class ImageTokenizer(nn.Module):
    """SigLIP encoder, residual quantizer and convolutional decoder, frozen."""

    canary_flips = 0.0
    """Share of the canaries' codes that were others when it was loaded: on another device, or in another dtype."""

    def __init__(self, architecture: Architecture, place: str = "image tokenizer") -> None:
        super().__init__()
        architecture.check(place)
        self.architecture = architecture
        self.encoder = VisionEncoder(architecture.encoder, architecture.patch_size, architecture.position_grid)
        width = architecture.encoder.hidden_size
        self.quantizer = ResidualQuantizer(architecture.codebook_size, width, architecture.depth)
        self.post_quant_conv = nn.Conv2d(width, architecture.decoder.z_channels, 1)
        self.decoder = Decoder(architecture.decoder)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in evaluation mode: a tokenizer inside a model must not change with the model's mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, pixels_BCSS: Tensor) -> Tensor:
        """Codes (B, N, D), int64. The batch shape may change last bits; see `code_encoder`."""
        weight = self.post_quant_conv.weight
        return self.quantizer.quantize(self.encoder(pixels_BCSS.to(weight.device, weight.dtype)))

    def encode_bytes(self, pixels_BSSC: np.ndarray) -> Tensor:
        """Codes (B, N, D), on the CPU, of the bytes of views, which travel to the device as bytes."""
        return self.encode(to_tensor(torch.from_numpy(pixels_BSSC).to(self.post_quant_conv.weight.device))).cpu()

    @torch.no_grad()
    def decode(self, codes_BND: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), about -1 to 1, not clipped."""
        return self.draw(self.quantizer.lookup(codes_BND.to(self.post_quant_conv.weight.device)))

    def draw(self, quantized_BNC: Tensor) -> Tensor:
        """Pixels of summed code rows; with gradients, for training."""
        batch, positions, width = quantized_BNC.shape
        side = int(positions**0.5)
        map_BCGG = quantized_BNC.transpose(1, 2).reshape(batch, width, side, side)
        return cast(Tensor, self.decoder(self.post_quant_conv(map_BCGG.to(self.post_quant_conv.weight.dtype))))

    @property
    def codebook_id(self) -> str:
        """The name of the codebook; see `unifork.identity`."""
        return codebook_identity(self.quantizer.codebook, self.architecture.depth, self.architecture.grid)

    @property
    def encoder_id(self) -> str:
        """The name of everything that decides a code: encoder and codebook, not the decoder."""
        state = self.state_dict()
        return weights_identity({k: v for k, v in state.items() if k.startswith(("encoder.", "quantizer."))})

    @property
    def environment(self) -> dict[str, Any]:
        """What the last bits of features, and so rare codes, depend on beside weights and batch shape."""
        weight = self.post_quant_conv.weight
        return {
            "device_class": device_class(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "libraries": {name: version(name) for name in ("torch", "transformers", "pillow")},
        }

    def save(self, directory: Path | str) -> None:
        """Write the directory next to its place and swap it in, so that it is whole or as it was."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        promises = Description(architecture=self.architecture, codebook_id=self.codebook_id, encoder_id=self.encoder_id)
        with whole_folder(Path(directory)) as partial:
            save_file(state, partial / WEIGHTS_FILE, metadata={"format": "pt"})
            canaries.write(partial, self.architecture.image_size, self.encode_bytes, self.environment)
            write_json(partial / CONFIG_FILE, promises.model_dump(mode="json"))

    @classmethod
    def load(
        cls, directory: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ImageTokenizer":
        """A saved tokenizer, its identities compared and its canaries re-encoded.

        Raises CheckpointError when files are missing or damaged, IdentityError when the weights
        are not those named in config.json or encode the canaries to other codes.
        """
        directory = Path(directory)
        promises = describe(directory)
        tokenizer = cls(promises.architecture, str(directory / CONFIG_FILE))
        path = directory / WEIGHTS_FILE
        tokenizer.load_weights(read_tensors(path), str(path))
        for name in ("codebook_id", "encoder_id"):
            found, promised = getattr(tokenizer, name), getattr(promises, name)
            if found != promised:
                raise IdentityError(f"{directory}: {name} of the weights is {found}, {CONFIG_FILE} promises {promised}")
        codebook_KC = tokenizer.quantizer.codebook
        tokenizer.to(device=device, dtype=dtype)
        tokenizer.quantizer.codebook = codebook_KC.to(device)  # stays float32: distances need it
        tokenizer.canary_flips = canaries.check(directory, tokenizer.encode_bytes, tokenizer.environment)
        return tokenizer

    def load_weights(self, state: Mapping[str, Tensor], place: str) -> None:
        """Copy a state dict in, all of it or nothing. Raises CheckpointError naming what does not fit."""
        check_fit(place, shapes_of(state), shapes_of(self.state_dict()))
        self.load_state_dict(dict(state))


def device_class(device: torch.device) -> str:
    """The model of an accelerator, or a CPU's architecture and vector instructions."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type

"""The image tokenizer as a whole: pixels to codes, codes to pixels, and its directory on disk.

In: pixels (B, 3, S, S) from -1 to 1. Out: codes (B, N, D), int64, positions in raster order; and
back. A directory holds `config.json` (architecture and the two identities), `model.safetensors`
and the canaries. Loading checks all of it and makes no network access.

The tokenizer is always in evaluation mode and its parameters ask for no gradient: whoever trains
one says so through `unifork.image_tokenizer.training`.

Shape suffixes: B pictures, S side in pixels, N positions, G positions along a side, D code depth,
C channels.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unifork.errors import CheckpointError, IdentityError
from unifork.identity import codebook_identity, weights_identity
from unifork.image_tokenizer import canaries
from unifork.image_tokenizer.architecture import CONFIG_FILE, Architecture, describe
from unifork.image_tokenizer.decoder import Decoder
from unifork.image_tokenizer.encoder import VisionEncoder
from unifork.image_tokenizer.quantizer import ResidualQuantizer

WEIGHTS_FILE = "model.safetensors"


class ImageTokenizer(nn.Module):
    """SigLIP encoder, residual quantiser and convolutional decoder, frozen."""

    def __init__(self, architecture: Architecture, place: str = "image tokenizer") -> None:
        super().__init__()
        architecture.check(place)
        self.architecture = architecture
        self.encoder = VisionEncoder(architecture.encoder, architecture.patch_size, architecture.position_grid)
        self.quantizer = ResidualQuantizer(
            architecture.codebook_size, architecture.encoder.hidden_size, architecture.depth
        )
        self.post_quant_conv = nn.Conv2d(architecture.encoder.hidden_size, architecture.decoder.z_channels, 1)
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
        return self.quantizer.quantise(self.encoder(pixels_BCSS.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def decode(self, codes_BND: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), about -1 to 1, not clipped."""
        return self.draw(self.quantizer.lookup(codes_BND.to(self.post_quant_conv.weight.device)))

    def draw(self, quantised_BNC: Tensor) -> Tensor:
        """Pixels of summed code rows; with gradients, for training."""
        batch, positions, width = quantised_BNC.shape
        side = int(positions**0.5)
        map_BCGG = quantised_BNC.transpose(1, 2).reshape(batch, width, side, side)
        drawn_BCSS: Tensor = self.decoder(self.post_quant_conv(map_BCGG.to(self.post_quant_conv.weight.dtype)))
        return drawn_BCSS

    @property
    def codebook_id(self) -> str:
        """The name of the codebook; see `unifork.identity`."""
        return codebook_identity(self.quantizer.codebook, self.architecture.depth, self.architecture.grid)

    @property
    def encoder_id(self) -> str:
        """The name of everything that decides a code: encoder and codebook, not the decoder."""
        state = self.state_dict()
        return weights_identity({k: v for k, v in state.items() if k.startswith(("encoder.", "quantizer."))})

    def save(self, directory: Path | str) -> None:
        """Write the directory. Every file appears whole or not at all, config.json last."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CONFIG_FILE).unlink(missing_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        temporary = directory / f".{WEIGHTS_FILE}.tmp"
        save_file(state, temporary, metadata={"format": "pt"})
        _publish(temporary, directory / WEIGHTS_FILE)
        canaries.write(self, directory)
        plain = {
            "architecture": self.architecture.model_dump(mode="json"),
            "codebook_id": self.codebook_id,
            "encoder_id": self.encoder_id,
        }
        temporary = directory / f".{CONFIG_FILE}.tmp"
        temporary.write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n")
        _publish(temporary, directory / CONFIG_FILE)

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
        try:
            state = load_file(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged: {error}") from None
        tokenizer.load_weights(state, str(path))
        for name in ("codebook_id", "encoder_id"):
            found, promised = getattr(tokenizer, name), getattr(promises, name)
            if found != promised:
                raise IdentityError(f"{directory}: {name} of the weights is {found}, {CONFIG_FILE} promises {promised}")
        codebook_KC = tokenizer.quantizer.codebook
        tokenizer.to(device=device, dtype=dtype)
        tokenizer.quantizer.codebook = codebook_KC.to(device)  # stays float32: distances need it
        canaries.check(tokenizer, directory)
        return tokenizer

    def load_weights(self, state: Mapping[str, Tensor], place: str) -> None:
        """Copy a state dict in, all of it or nothing. Raises CheckpointError naming what does not fit."""
        own = self.state_dict()
        faults = [f"missing {name}" for name in sorted(own.keys() - state.keys())]
        faults += [f"unexpected {name}" for name in sorted(state.keys() - own.keys())]
        faults += [
            f"{name} has shape {tuple(state[name].shape)}, the configuration says {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in state and state[name].shape != tensor.shape
        ]
        if faults:
            more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
            raise CheckpointError(f"{place}: does not fit its configuration: {'; '.join(faults[:5])}{more}")
        self.load_state_dict(dict(state))


def _publish(temporary: Path, path: Path) -> None:
    """Rename a finished file into place once its bytes are on disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)

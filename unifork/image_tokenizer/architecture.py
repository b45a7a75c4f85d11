"""What a tokenizer directory says of itself without its network being loaded: architecture and identities.

In: `config.json` of the directory, or the configuration of an experiment. Nothing here needs torch, so that
drivers and pages know what codes will look like at no cost. Whoever makes codes loads the weights
(`unifork.image_tokenizer.model`), which are checked against what stands here.
"""

from pathlib import Path
from typing import Self

from pydantic import PositiveInt

from unifork.config import ImageTokenizerConfig, ImportedTokenizer, StrictModel, TokenizerShape, parse
from unifork.errors import ConfigError
from unifork.images import SMALLEST_SIDE
from unifork.weights import read_json

CONFIG_FILE = "config.json"
LARGEST_CODEBOOK = 2**16
"""Codes are stored as 16-bit integers."""


class Architecture(TokenizerShape):
    """What must be known to build a tokenizer, however it was made (trained here or imported)."""

    position_grid: PositiveInt
    """Side of the encoder's table of positions; 16 upstream, where images have 24 x 24 patches."""

    @classmethod
    def of(cls, config: ImageTokenizerConfig) -> Self:
        """The architecture an experiment asks for."""
        shared = {name: getattr(config, name) for name in TokenizerShape.model_fields}
        return cls(position_grid=config.grid, **shared)

    def check(self, place: str) -> None:
        """Raise ConfigError where the numbers do not fit each other."""
        size, patch, decoder = self.image_size, self.patch_size, self.decoder
        hidden, heads, rows = self.encoder.hidden_size, self.encoder.heads, self.codebook_size
        groups, levels, upscaling = decoder.norm_groups, len(decoder.multipliers), 2 ** (len(decoder.multipliers) - 1)
        widths = [decoder.channels * multiplier for multiplier in decoder.multipliers]
        narrow, above = [w for w in widths if w % groups], [n for n in decoder.attention_levels if n >= levels]
        faults = {
            f"image_size {size} is no multiple of patch_size {patch}": size % patch,
            f"image_size {size} is less than {SMALLEST_SIDE}": size < SMALLEST_SIDE,
            f"encoder.hidden_size {hidden} is no multiple of encoder.heads {heads}": hidden % heads,
            f"codebook_size {rows} is more than {LARGEST_CODEBOOK}": rows > LARGEST_CODEBOOK,
            f"decoder.multipliers has {levels} levels, which upscale by {upscaling}; allowed is patch_size {patch}": (
                upscaling != patch
            ),
            f"decoder channels {narrow} of {widths} are no multiples of decoder.norm_groups {groups}": narrow,
            f"decoder.attention_levels {above} are not below {levels}": above,
        }
        for fault, found in faults.items():
            if found:
                raise ConfigError(f"{place}: {fault}")


class Description(StrictModel):
    """`config.json` of a tokenizer directory."""

    architecture: Architecture
    codebook_id: str
    """Identity of the codebook; see `unifork.identity`."""
    encoder_id: str
    """Identity of everything that decides a code."""


def describe(directory: Path | str) -> Description:
    """What a tokenizer directory says of itself.

    Raises CheckpointError where `config.json` is missing or damaged, ConfigError where a value is not allowed.
    """
    path = Path(directory) / CONFIG_FILE
    return parse(Description, read_json(path), str(path))


def architecture_of(config: ImageTokenizerConfig | ImportedTokenizer, directory: Path | str) -> Architecture | None:
    """What an experiment's tokenizer looks like; an imported one, once it lies in its directory."""
    if isinstance(config, ImageTokenizerConfig):
        return Architecture.of(config)
    return describe(directory).architecture if (Path(directory) / CONFIG_FILE).exists() else None

"""The two tokenizers of an experiment: trained here, or taken from others with the key `import`."""

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from unifork.config.base import Fraction01, StrictModel


class EncoderConfig(StrictModel):
    """The SigLIP vision encoder; one layer more is listed than runs, as in VILA-U."""

    hidden_size: PositiveInt
    """Width C, also the width of a code vector."""
    layers: PositiveInt
    """Layers of the encoder; the output of the second to last is quantized, the last never runs."""
    heads: PositiveInt
    """Attention heads."""
    intermediate_size: PositiveInt
    """Width of the MLP."""


class DecoderConfig(StrictModel):
    """The convolutional decoder of VQGAN."""

    z_channels: PositiveInt
    """Channels after the 1x1 convolution in front of the decoder."""
    channels: PositiveInt
    """Channels at full resolution."""
    multipliers: tuple[PositiveInt, ...]
    """Channels at each resolution as multiples of `channels`, full resolution first; each step halves."""
    blocks: NonNegativeInt
    """Residual blocks per resolution, one of them extra, as VQGAN counts (2 means 3, 0 means 1)."""
    attention_levels: tuple[NonNegativeInt, ...]
    """Levels (0 is full resolution) whose blocks are followed by attention."""
    norm_groups: PositiveInt
    """Groups of the group norms (32 upstream)."""


class TokenizerTraining(StrictModel):
    """How the demo's small tokenizer is trained; large ones are imported."""

    datasets: tuple[str, ...]
    """Data sets whose filtered images it learns from, in the views they serve."""
    shares: dict[str, PositiveFloat] = {}
    """Weight in every batch of a data set's view, by `<data set>/<view>`; those not named weigh 1."""
    steps: PositiveInt
    """Optimizer steps."""
    quantize_from_step: NonNegativeInt
    """Step at which the codebook is initialized by residual k-means and quantization begins."""
    batch_images: PositiveInt
    """Images per step."""
    learning_rate: PositiveFloat
    """Peak learning rate of AdamW; decays to zero along a cosine."""
    warmup_steps: NonNegativeInt
    """Steps of linear warm-up."""
    commitment: PositiveFloat
    """Weight of the commitment loss beside the reconstruction loss."""
    ema_decay: Fraction01
    """Decay of the codebook's moving averages."""
    local: bool = True
    """Whether the encoder's attention and positions stay at zero: codes of a patch then depend on it alone."""
    held_out_images: PositiveInt
    """Images kept out of training and used for the reported errors."""


class TokenizerShape(StrictModel):
    """What an image tokenizer looks like, however it is made."""

    image_size: PositiveInt
    """Side of both views in pixels."""
    patch_size: PositiveInt
    """Side of a patch in pixels; the grid is image_size / patch_size."""
    encoder: EncoderConfig
    depth: PositiveInt
    """Codes per position, D."""
    codebook_size: PositiveInt
    """Rows of the one codebook shared by all depths, K, without any padding row."""
    decoder: DecoderConfig

    @property
    def grid(self) -> int:
        """Positions along one side of the image."""
        return self.image_size // self.patch_size


class ImageTokenizerConfig(TokenizerShape):
    """The residual-quantized autoencoder that turns images into codes."""

    training: TokenizerTraining
    seed: NonNegativeInt
    """Seed of initialization and of the order of images."""


class ImportedTokenizer(StrictModel):
    """An official tokenizer, which brings its architecture along."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: str = Field(alias="import")
    """A `vision_tower` folder, a UniFork checkpoint or the `image_tokenizer` of a model directory: a local folder, or
    OWNER/NAME[/FOLDER][@REVISION] of the Hub."""
    image_size: PositiveInt
    """Side of both views in pixels; the position table is resized as the official code does."""
    vision_tower: str | None = None
    """Folder with the configuration of a UniFork checkpoint's tower, where the checkpoint names none that is here."""


def _how_it_comes(tokenizer: Any) -> str:
    """Whether a tokenizer, as plain data or typed, is imported or trained."""
    typed = (ImportedTokenizer, TextTokenizerImport)
    imported = "import" in tokenizer if isinstance(tokenizer, dict) else isinstance(tokenizer, typed)
    return "(imported)" if imported else "(trained)"


AnyTokenizer = Annotated[
    Annotated[ImageTokenizerConfig, Tag("(trained)")] | Annotated[ImportedTokenizer, Tag("(imported)")],
    Discriminator(_how_it_comes),
]


class TextTokenizerConfig(StrictModel):
    """The small byte-level BPE of the demo; large models bring their own."""

    vocab_size: PositiveInt
    """Entries, special tokens included."""
    datasets: tuple[str, ...]
    """Data sets whose texts it is trained on."""


class TextTokenizerImport(StrictModel):
    """The text tokenizer of a language model, instead of a trained one."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: str = Field(alias="import")
    """Tokenizer directory (needs no network), or OWNER/NAME[/FOLDER][@REVISION] of the Hub."""


AnyTextTokenizer = Annotated[
    Annotated[TextTokenizerConfig, Tag("(trained)")] | Annotated[TextTokenizerImport, Tag("(imported)")],
    Discriminator(_how_it_comes),
]

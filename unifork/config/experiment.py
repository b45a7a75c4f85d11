"""`params.yaml`: everything an experiment is, and nothing about where it runs."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag

from unifork.config.base import Fraction01, StrictModel, load
from unifork.errors import unknown
from unifork.vocabulary import Task


class Followed(StrictModel):
    """Paths that DVC follows for a data set beside its card. The card again, where that names no files."""

    source: str
    """What rows are made from; for `download`."""
    lists: str
    """Takedown lists and benchmark images of filter rules."""
    others: str
    """The other sets that it is compared with."""


class DatasetUse(StrictModel):
    """How much of a data set an experiment takes."""

    rows: PositiveInt | None = None
    """Number of rows to take from the source; None takes all."""
    shard_rows: PositiveInt
    """Rows per shard of the source; filtering makes shards smaller, never larger."""
    track: Literal["whole", "manifest"] = "whole"
    """What DVC sees of its folders: everything, which it copies to its cache and to remotes, or the manifests alone,
    which name every shard by its hash; then image bytes lie on disk once."""
    follows: Followed | None = None
    """Written by `unifork use`."""


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


class ImageTokenizerConfig(StrictModel):
    """The residual-quantized autoencoder that turns images into codes."""

    image_size: PositiveInt
    """Side of both views in pixels."""
    patch_size: PositiveInt
    """Side of a patch in pixels; the grid is image_size / patch_size."""
    encoder: EncoderConfig
    depth: PositiveInt
    """Codes per position, D."""
    codebook_size: PositiveInt
    """Rows of the one codebook shared by all depths, K."""
    decoder: DecoderConfig
    training: TokenizerTraining
    seed: NonNegativeInt
    """Seed of initialization and of the order of images."""

    @property
    def grid(self) -> int:
        """Positions along one side of the image."""
        return self.image_size // self.patch_size


class ImportedTokenizer(StrictModel):
    """An official tokenizer, which brings its architecture along."""

    model_config = ConfigDict(serialize_by_alias=True)

    source: str = Field(alias="import")
    """A `vision_tower` folder or a UniFork checkpoint: a local folder, or OWNER/NAME[/FOLDER][@REVISION] of the Hub."""
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


class HeadConfig(StrictModel):
    """The residual depth transformer that predicts the codes of a position one by one."""

    layers: PositiveInt
    """Blocks."""
    heads: PositiveInt
    """Attention heads."""
    head_dim: PositiveInt
    """Width of one attention head."""
    mlp_ratio: PositiveInt = 4
    """MLP width as a multiple of the backbone's hidden size."""
    folded: bool = True
    """False: with the linear maps in front of and behind attention that the published head has besides."""


class Variant(StrictModel):
    """One architecture, and the stages it goes through."""

    plan: str
    """Layer plan in run-length notation, for example `shared*12 task*12 norm:task`, or a preset, here `unifork:12`."""
    backbone: dict[str, Any]
    """Keys of the transformers configuration of the dense model (`model_type` qwen2 or llama).

    Empty: those of `warm_start`'s own configuration."""
    warm_start: str | None = None
    """Folder of the dense model every branch starts as a copy of, or its name on the Hub; None draws weights."""
    head: HeadConfig
    stages: tuple[str, ...]
    """Names of the stages, in order."""
    seed: NonNegativeInt = 0
    """Seed of the initialization."""


class MixtureEntry(StrictModel):
    """One part of a mixture."""

    dataset: str
    """Name of a data set of the experiment."""
    task: Task
    """How it is read; the card must offer this task."""
    text: str
    """Text column, one of those the card offers for the task."""
    template: str
    """Prompt template, a key of `unifork.documents.prompts.TEMPLATES`."""
    weight: PositiveFloat
    """Share of the documents; weights are normalized over the mixture, and none is rounded."""

    @property
    def prepared(self) -> str:
        """Name of its prepared documents, which follow from nothing else."""
        return f"{self.dataset}-{self.text}-{self.template}"


class OptimizerConfig(StrictModel):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["constant", "cosine"]
    """Constant, or a cosine to zero at the last step."""
    warmup_steps: NonNegativeInt
    """Steps of linear warm-up from zero."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay."""
    betas: tuple[Fraction01, Fraction01] = (0.9, 0.999)
    """Decay of the first and second moments."""
    clip_norm: PositiveFloat = 1.0
    """Largest norm of the gradient over all trained tensors."""


class Track(StrictModel):
    """One sequence of optimizer steps over one mixture."""

    mixture: tuple[MixtureEntry, ...]
    steps: PositiveInt
    """Optimizer steps of this track."""
    batch_documents: PositiveInt
    """Documents per step, over all workers."""
    trainable: tuple[str, ...]
    """Glob patterns of parameter names; everything else is frozen."""
    optimizer: OptimizerConfig
    prompt_drop: Fraction01 = 0.0
    """Share of generation documents whose prompt is replaced by the dropped-prompt token."""
    supervised_positions: PositiveInt | None = None
    """Positions of a generated image that are supervised, the first in reading order; None learns all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of the products (autocast); weights, gradients, optimizer and losses are float32 in both."""


class Sampling(StrictModel):
    """How codes are drawn."""

    guidance: PositiveFloat = 4.0
    """Classifier-free guidance scale; 1 switches it off."""
    temperature: PositiveFloat = 1.0
    """Divides the guided logits."""
    top_k: PositiveInt = 900
    """Codes kept before top-p."""
    top_p: Fraction01 = 0.96
    """Probability mass kept; the code that crosses it is kept too."""
    negative_prompt: str | None = None
    """Prompt of the unconditional rows in the template of the others; None takes the dropped prompt of training."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""


class LossBand(StrictModel):
    """Bounds of the losses. A uniform prediction costs ln V nats per word and ln K per code."""

    first_text: PositiveFloat | None = None
    """Text loss in nats expected of the first step, as of a warm-started model; None: at most a uniform prediction."""
    warn: PositiveFloat = 0.15
    """Relative distance of a first step's loss from the expected one that is reported."""
    stop: PositiveFloat = 2.0
    """Multiple of a uniform prediction above which any step's loss stops the run."""


class Stage(StrictModel):
    """One training run: its tracks and how they take turns."""

    tracks: dict[str, Track]
    interleave: Literal["sequential", "concurrent"] | PositiveInt = "sequential"
    """`sequential`: one track after the other; a number N: N steps of each in turn; `concurrent`: side by side in
    proportion to their steps, so that all end together. The weights are the same."""
    context: PositiveInt
    """Longest document in tokens; longer ones are left out and counted."""
    checkpoint_every: PositiveInt
    """Steps (over all tracks) between checkpoints."""
    checkpoint_minutes: PositiveFloat | None = Field(default=None, exclude_if=lambda minutes: minutes is None)
    """A checkpoint is also made when the last one is that many minutes old; None: by steps alone."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept on disk; the newest always is. With 1 there is none to fall back to where it is damaged."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts whose images show the progress of generation after the stage."""
    sampling: Sampling = Sampling()
    """How those images are drawn."""
    loss_band: LossBand = LossBand()
    """When a loss is reported and when it stops the run."""
    seed: NonNegativeInt = 0
    """Seed of order, prompt dropping and sampling."""


class Benchmark(StrictModel):
    """What an experiment changes of a benchmark, a card of `evals`."""

    options: dict[str, Any] = {}
    """Options of the suite instead of the card's, such as `samples`."""
    sampling: Sampling | None = None
    """How images are drawn; None: as the card says."""
    follows: str | None = None
    """Written by `unifork use`: the folder of the benchmark's files; a page of text where none is there."""


class StageRun(StrictModel):
    """One entry of `dvc.yaml`'s train stage, written by `unifork use`; derived, never edited."""

    variant: str
    stage: str
    after: str
    """Folder of the model it starts from."""
    codes: str
    """The deepest folder that holds all codes it reads."""
    prepared: str
    """The deepest folder that holds all prepared documents it reads."""


class PreparedSet(StrictModel):
    """One entry of `dvc.yaml`'s prepare stage, written by `unifork use`; derived, never edited."""

    dataset: str
    text: str
    template: str
    codes: str
    """Folder of the codes in the view of the template's task."""


class Experiment(StrictModel):
    """Everything an experiment is, and nothing about where it runs."""

    name: str
    seed: NonNegativeInt = 0
    """Seed of the data (generators, splits)."""
    datasets: dict[str, DatasetUse]
    image_tokenizer: AnyTokenizer
    """Trained here, or with the key `import` taken from others."""
    text_tokenizer: AnyTextTokenizer
    """Likewise."""
    variants: dict[str, Variant]
    stages: dict[str, Stage]
    benchmarks: dict[str, Benchmark]
    """Cards of `evals`, and what is changed of them."""
    prepared: dict[str, PreparedSet] = {}
    """Written by `unifork use`: every text column of a data set that some stage reads with some template."""
    runs: dict[str, StageRun] = {}
    """Written by `unifork use`: every stage of every variant, with its inputs."""
    evaluations: dict[str, dict[str, str]] = {}
    """Written by `unifork use`: every benchmark of every variant, with its model."""
    examined: dict[str, dict[str, str]] = {}
    """Written by `unifork use`: where networks look at images, those of every variant and the references."""
    scored: dict[str, tuple[str, ...]] = {}
    """Written by `unifork use`: the benchmarks of every variant."""

    def dataset(self, name: str) -> DatasetUse:
        """How the experiment uses a data set. Raises ConfigError when it does not."""
        if name not in self.datasets:
            raise unknown("data set", name, self.datasets, "params.yaml: datasets")
        return self.datasets[name]


def load_experiment() -> Experiment:
    """The experiment of the working directory. Raises ConfigError."""
    return load(Experiment, "params.yaml")

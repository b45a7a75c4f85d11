"""What a user writes, typed: data cards, experiments and clusters.

Three kinds of file, three owners: `datasets/*.yaml` says what the data is, `params.yaml` (written
by `unifork use NAME` from `experiments/`) what the experiment is, `clusters/*.yaml` where it runs.
No key lives in two of them. Everything is frozen, unknown keys are errors.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from unifork.errors import ConfigError, unknown
from unifork.vocabulary import Task, View

Fraction01 = Annotated[float, Field(ge=0.0, le=1.0)]


class Plain(BaseModel):
    """Base of every configuration: plain data, frozen, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint(self) -> str:
        """A short hash of all values, stable across processes and machines."""
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(plain: Any) -> str:
    """Sixteen hex digits of the SHA-256 of plain data written as canonical JSON."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------- cards


class Source(Plain):
    """Where the pictures come from: a kind of source known to `unifork.data.sources`."""

    kind: str
    """Name of the source, a key of `unifork.data.sources.SOURCES`."""
    options: dict[str, Any] = {}
    """What this kind of source needs to know; checked by the source itself."""


class TaskUse(Plain):
    """How one task reads a data set."""

    view: View
    """Which view of a picture becomes codes; generation reads crops, understanding pads."""
    texts: tuple[str, ...]
    """Text columns that a mixture may choose from for this task."""


class FilterRule(Plain):
    """One rule of `unifork.data.filters`, applied in the order of the card."""

    rule: str
    """Name of the rule, a key of `unifork.data.filters.RULES`."""
    options: dict[str, Any] = {}
    """The rule's thresholds."""


class Card(Plain):
    """One data set: what it is, where it comes from, who may use it and how it is read."""

    name: str
    """Name of the data set; the file is called the same."""
    title: str
    """One line for people."""
    homepage: str
    """Where the data set is described by its makers."""
    licence: str
    """SPDX identifier of the pictures' licence, or a short name where none exists."""
    attribution: str
    """Whom to credit, as the licence asks."""
    redistribute_codes: bool
    """Whether codes, which can be decoded to pictures, may be published."""
    source: Source
    matte: tuple[int, int, int] = (255, 255, 255)
    """RGB colour (0 to 255) put behind transparent pictures."""
    columns: tuple[str, ...] = ()
    """Source columns kept beside the fixed ones."""
    tasks: dict[Task, TaskUse]
    """The tasks this set serves."""
    filters: tuple[FilterRule, ...] = ()
    """Rules of the filter stage, in order."""


# ------------------------------------------------------------------------------------- experiments


class DatasetUse(Plain):
    """How much of a data set an experiment takes."""

    rows: PositiveInt | None = None
    """Number of rows to take from the source; None takes all."""
    shard_rows: PositiveInt
    """Rows per shard of the source; filtering makes shards smaller, never larger."""


class EncoderConfig(Plain):
    """The SigLIP vision encoder; one layer more is listed than runs, as in VILA-U."""

    hidden_size: PositiveInt
    """Width C, also the width of a code vector."""
    layers: PositiveInt
    """Layers of the encoder; the output of the second to last is quantised, the last never runs."""
    heads: PositiveInt
    """Attention heads."""
    intermediate_size: PositiveInt
    """Width of the MLP."""


class DecoderConfig(Plain):
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


class TokenizerTraining(Plain):
    """How the demo's small tokenizer is trained; large ones are imported."""

    datasets: tuple[str, ...]
    """Data sets whose filtered pictures it learns from, in equal parts of the views they serve."""
    steps: PositiveInt
    """Optimizer steps."""
    quantise_from_step: NonNegativeInt
    """Step at which the codebook is initialised by residual k-means and quantisation begins."""
    batch_images: PositiveInt
    """Pictures per step."""
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
    """Pictures kept out of training and used for the reported errors."""


class ImageTokenizerConfig(Plain):
    """The residual-quantised autoencoder that turns pictures into codes."""

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
    """Seed of initialisation and of the order of pictures."""

    @property
    def grid(self) -> int:
        """Positions along one side of the picture."""
        return self.image_size // self.patch_size


class TextTokenizerConfig(Plain):
    """The small byte-level BPE of the demo; large models bring their own."""

    vocab_size: PositiveInt
    """Entries, special tokens included."""
    datasets: tuple[str, ...]
    """Data sets whose texts it is trained on."""


class HeadConfig(Plain):
    """The residual depth transformer that predicts the codes of a position one by one."""

    layers: PositiveInt
    """Blocks."""
    heads: PositiveInt
    """Attention heads."""
    head_dim: PositiveInt
    """Width of one attention head."""
    mlp_ratio: PositiveInt = 4
    """MLP width as a multiple of the backbone's hidden size."""


class Variant(Plain):
    """One architecture, and the stages it goes through."""

    plan: str
    """Layer plan in run-length notation, for example `shared*12 task*12 norm:task`."""
    backbone: dict[str, Any]
    """Keys of the transformers configuration of the dense model (`model_type` qwen2 or llama)."""
    head: HeadConfig
    stages: tuple[str, ...]
    """Names of the stages, in order."""
    seed: NonNegativeInt = 0
    """Seed of the initialisation."""


class MixtureEntry(Plain):
    """One part of a mixture."""

    dataset: str
    """Name of a data set of the experiment."""
    task: Task
    """How it is read; the card must offer this task."""
    text: str
    """Text column, one of those the card offers for the task."""
    template: str
    """Prompt template, a key of `unifork.data.prompts.TEMPLATES`."""
    weight: PositiveFloat
    """Share of the documents; weights are normalised over the mixture."""


class OptimizerConfig(Plain):
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


class Track(Plain):
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


class Sampling(Plain):
    """How codes are drawn."""

    guidance: PositiveFloat = 4.0
    """Classifier-free guidance scale; 1 switches it off."""
    temperature: PositiveFloat = 1.0
    """Divides the guided logits."""
    top_k: PositiveInt = 900
    """Codes kept before top-p."""
    top_p: Fraction01 = 0.96
    """Probability mass kept; the code that crosses it is kept too."""
    seed: NonNegativeInt = 0
    """Seed of the draws."""


class Stage(Plain):
    """One training run: its tracks and how they take turns."""

    tracks: dict[str, Track]
    interleave: Literal["sequential"] | PositiveInt = "sequential"
    """`sequential`: one track after the other; a number N: N steps of each in turn."""
    context: PositiveInt
    """Longest document in tokens; longer ones are quarantined."""
    checkpoint_every: PositiveInt
    """Steps (over all tracks) between checkpoints."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints kept on disk; the newest always is."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts whose pictures show the progress of generation after the stage."""
    sampling: Sampling = Sampling()
    """How those pictures are drawn."""
    seed: NonNegativeInt = 0
    """Seed of order, prompt dropping and sampling."""


class Benchmark(Plain):
    """One evaluation."""

    kind: str
    """A key of `unifork.evaluation.benchmarks.BENCHMARKS`."""
    samples: PositiveInt
    """Prompts or questions per score and split."""
    sampling: Sampling = Sampling()
    """Used by benchmarks that generate pictures; text is decoded greedily."""


class Run(Plain):
    """One entry of `dvc.yaml`'s train stage, written by `unifork use`; derived, never edited."""

    variant: str
    stage: str
    after: str
    """Folder of the model it starts from."""
    codes: str
    """The deepest folder that holds all codes it reads."""


class Experiment(Plain):
    """Everything an experiment is, and nothing about where it runs."""

    name: str
    seed: NonNegativeInt = 0
    """Seed of the data (generators, splits)."""
    datasets: dict[str, DatasetUse]
    image_tokenizer: ImageTokenizerConfig
    text_tokenizer: TextTokenizerConfig
    variants: dict[str, Variant]
    stages: dict[str, Stage]
    benchmarks: dict[str, Benchmark]
    runs: dict[str, Run] = {}
    """Written by `unifork use`: every stage of every variant, with its inputs."""
    evaluations: dict[str, dict[str, str]] = {}
    """Written by `unifork use`: every benchmark of every variant, with its model."""


# ---------------------------------------------------------------------------------------- clusters


class HopResources(Plain):
    """Workers of one data hop."""

    workers: NonNegativeInt = 0
    """Actors of the Ray Data job; 0 works in the stage's own process, for small data."""
    cpus: PositiveFloat = 1.0
    """CPUs each actor asks for."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs each actor asks for."""


class TrainResources(Plain):
    """Workers of a training stage."""

    workers: NonNegativeInt = 0
    """Ray Train worker processes; 0 is Ray Train's local mode, in the stage's own process."""
    cpus: PositiveFloat = 1.0
    """CPUs each worker asks for."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs each worker asks for."""
    threads: PositiveInt = 1
    """Torch threads per worker; part of what makes results bit-equal on a CPU."""
    row_tokens: PositiveInt = 512
    """Tokens of a packed row; changes only the speed. At least the longest document."""
    rows_per_microbatch: PositiveInt = 1
    """Rows a device processes at once; changes only the speed."""
    strategy: Literal["ddp", "fsdp2"] = "ddp"
    """How workers share the model; one worker needs neither."""
    max_restarts: NonNegativeInt = 0
    """How often a failed worker group is started again from the last checkpoint."""


class Cluster(Plain):
    """Where things run. Never a parameter of DVC: results do not depend on it."""

    name: str
    address: str | None = None
    """Job server (`http://HOST:8265`) to submit stages to; None runs them here."""
    cpus: PositiveInt | None = None
    """CPUs given to the local Ray; None takes what the machine has."""
    gpus: NonNegativeInt | None = None
    """GPUs given to the local Ray; None takes what the machine has."""
    object_store_mb: PositiveInt = 200
    """Object store of the local Ray in MiB; jobs pass paths, not pictures."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of submitted jobs, beside the working directory."""
    root: str | None = None
    """The folder of the experiment as the cluster sees it; None where it has the same path as here."""
    python: str | None = None
    """Python of the cluster's nodes; None where this very interpreter is on shared storage."""
    hops: dict[str, HopResources] = {}
    """Resources of `download`, `filter` and `encode`; the CPUs of `image_tokenizer` are the threads of its training."""
    train: TrainResources = TrainResources()
    train_stages: dict[str, TrainResources] = {}
    """Resources of single stages, by stage name, instead of `train`."""

    def for_stage(self, stage: str) -> TrainResources:
        """Resources of a training stage."""
        return self.train_stages.get(stage, self.train)


# ----------------------------------------------------------------------------------------- loading

Config = TypeVar("Config", bound=Plain)


def read_yaml(path: Path | str) -> Any:
    """The plain data of a YAML file. Raises ConfigError when it is missing or malformed."""
    try:
        return yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


def load(model: type[Config], path: Path | str) -> Config:
    """A YAML file as a typed configuration. Raises ConfigError naming file, key, value and rule."""
    return parse(model, read_yaml(path), str(path))


def parse(model: type[Config], plain: Any, place: str) -> Config:
    """Plain data as a typed configuration. Raises ConfigError naming place, key, value and rule."""
    try:
        return model.model_validate(plain)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or '(top)'}: {fault['msg']} (got {fault['input']!r:.80})"
            for fault in error.errors()
        )
        raise ConfigError(f"{place}: {faults}") from None


def load_card(name: str, folder: Path | str = "datasets") -> Card:
    """The card of a data set. Raises ConfigError when the file and its name disagree."""
    path = Path(folder) / f"{name}.yaml"
    if not path.exists():
        raise unknown("data set", name, (p.stem for p in Path(folder).glob("*.yaml")), str(folder))
    card = load(Card, path)
    if card.name != name:
        raise ConfigError(f"{path}: name is {card.name!r}, but the file is called {name!r}")
    return card

"""`params.yaml`: everything an experiment is, and nothing about where it runs."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from unifork.config.base import Fraction01, StrictModel, load
from unifork.config.optimization import Averaging, Lora, OptimizerConfig
from unifork.config.tokenizers import AnyTextTokenizer, AnyTokenizer
from unifork.errors import ConfigError, one_of
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
    """Folder of the dense model every branch starts as a copy of, or its name on the Hub; None draws weights.

    A model directory of this project starts the variant as it is, where plan, head and tokenizers are its own."""
    head: HeadConfig
    stages: tuple[str, ...]
    """Names of the stages, in order."""
    seed: NonNegativeInt = 0
    """Its training seed, written by `unifork use`."""
    embedding_range: PositiveFloat | None = Field(default=None, exclude_if=lambda deviation: deviation is None)
    """Standard deviation of the first word embeddings; None: the backbone's `initializer_range`, as of all matrices."""


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


class Track(StrictModel):
    """One sequence of optimizer steps over one mixture."""

    mixture: tuple[MixtureEntry, ...]
    steps: PositiveInt
    """Optimizer steps of this track."""
    batch_documents: PositiveInt
    """Documents per step, over all workers."""
    trainable: tuple[str, ...]
    """Glob patterns of parameter names; everything else is frozen."""
    without_branches: tuple[str, ...] | None = Field(default=None, exclude_if=lambda patterns: patterns is None)
    """Such patterns instead, for variants whose plan has no branches for tasks; None: none may be without."""
    optimizer: OptimizerConfig
    prompt_drop: Fraction01 = 0.0
    """Share of generation documents whose prompt is replaced by the dropped-prompt token."""
    supervised_positions: PositiveInt | None = None
    """Positions of a generated image that are supervised, the first in reading order; None learns all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Number type of products and activations; weights, optimizer and losses are float32 in both."""


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


class Validation(StrictModel):
    """What a stage measures on the rows that the cards of its data sets hold out; without such rows nothing."""

    every: PositiveInt = 500
    """Steps (over all tracks) between validations; the first and the last state are always looked at."""
    documents: PositiveInt = 128
    """Held-out documents of each part of a mixture whose losses are taken, at most; evenly spaced in file order."""
    answers: NonNegativeInt = 64
    """Of those, how many are also answered at the end, for exact match and token F1."""
    prompts: NonNegativeInt = 10
    """Held-out prompts of the stage that are drawn at its end."""


class Stage(StrictModel):
    """One training run: its tracks and how they take turns."""

    extend: str | None = Field(default=None, exclude_if=lambda stage: stage is None)
    """Stage whose optimizer state and order of documents go on; gives what is not written here, but for warm-ups."""
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
    validation: Validation = Validation()
    """What is measured on held-out rows."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts whose images show the progress of generation after the stage."""
    sampling: Sampling = Sampling()
    """How those images are drawn."""
    loss_band: LossBand = LossBand()
    """When a loss is reported and when it stops the run."""
    ema: Averaging | None = Field(default=None, exclude_if=lambda ema: ema is None)
    """Weights averaged over the steps; None: none are."""
    lora: Lora | None = Field(default=None, exclude_if=lambda lora: lora is None)
    """Adapters, which `trainable` of a track names `*.lora_A.*` and `*.lora_B.*`; the maps beneath are frozen. The
    stage's model has them added to its weights. None: there are none."""

    @model_validator(mode="after")
    def _no_average_of_adapters(self) -> Self:
        if self.lora and self.ema:
            raise ValueError("lora and ema exclude each other: a product of averages is not the average of products")
        return self

    @property
    def entries(self) -> list[MixtureEntry]:
        """The parts of all mixtures."""
        return [entry for track in self.tracks.values() for entry in track.mixture]


NOT_IN_THE_WEIGHTS: dict[str, Any] = {
    "checkpoint_every": True, "checkpoint_minutes": True, "keep_checkpoints": True, "validation": True,
    "sample_prompts": True, "sampling": True, "loss_band": True, "ema": {"export": True},
}  # fmt: skip
"""Fields of a stage that decide nothing about its weights."""


class Benchmark(StrictModel):
    """What an experiment changes of a benchmark, a card of `datasets/evals`."""

    options: dict[str, Any] = {}
    """Options of the suite instead of the card's, such as `samples`."""
    sampling: Sampling | None = None
    """How images are drawn; None: as the card says."""
    follows: str | None = None
    """Written by `unifork use`: the folder of the benchmark's files; a page of text where none is there."""


ANALYSES = ("alignment", "conflict", "entropy")


class Analysis(StrictModel):
    """What is looked at inside models, and the choices that the papers leave open."""

    alignment: tuple[str, ...] = ()
    """Stages after which alignment of images and texts is measured in every variant."""
    conflict: tuple[str, ...] = ()
    """Stages after which gradient conflict is measured, between documents of the stage."""
    entropy: tuple[str, ...] = ()
    """Stages whose documents' conditional entropy is measured."""
    prompts: str | None = None
    """Benchmark whose texts are the prompts of an alignment; null: captions of held-out rows."""
    pairs: PositiveInt = 500
    """Prompts of an alignment, documents of each kind in a gradient conflict; fewer where there are fewer."""
    documents: PositiveInt = 20_000
    """Documents that are looked through, at most."""
    k: PositiveInt = 10
    """Neighbors."""
    rows: Literal["l2", "raw", "centered-l2", "clamped-l2", "row-clamped-l2"] = "l2"
    """What is done to states before inner products are taken, a key of `unifork.analysis.alignment.ROWS`."""
    text: Literal["branch", "generation", "query"] = "branch"
    """Whose text an image is compared with: the prompt as the task of the curve reads it, the prompt as generation
    reads it in both curves, or for understanding the query behind the image, which attention lets see the image."""
    last: Literal["normed", "raw"] = "normed"
    """Whether the last state is taken after the final norm; also that of the text."""
    generation_template: str = "generate"
    """How prompts are written."""
    understanding_template: str = "answer"
    """How the query is written."""
    query: str = "Provide a one-sentence caption for the image:"
    """What is asked about an image."""
    between: Literal["tasks", "images"] = "tasks"
    """Kinds of documents whose gradients are compared: of the two tasks, or text alone and with an image."""
    seed: NonNegativeInt = 0
    """Of prompts, documents, pairings and halves."""
    batch: PositiveInt = 64
    """Documents of one call; in a gradient conflict those of a mini-batch."""

    def of_stage(self, stage: str) -> tuple[str, ...]:
        """The analyses that follow a stage."""
        return tuple(kind for kind in ANALYSES if stage in getattr(self, kind))


class AnalyzedRun(StrictModel):
    """One entry of `dvc.yaml`'s analyze stage, written by `unifork use`; derived, never edited."""

    kinds: tuple[str, ...]
    start: str
    """Folder of the untrained model."""
    prompts: str
    """Folder of the items whose texts are prompts; a page of text where there are none."""


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
    data_seed: NonNegativeInt = 0
    """Seed of what all runs share: generated data, splits, items of benchmarks."""
    training_seed: NonNegativeInt = 0
    """Seed of initialization, order of documents and dropped prompts."""
    seeds: tuple[NonNegativeInt, ...] = ()
    """Several training seeds instead: each variant runs with each of them, as `<variant>-seed<N>`."""
    datasets: dict[str, DatasetUse]
    image_tokenizer: AnyTokenizer
    """Trained here, or with the key `import` taken from others."""
    text_tokenizer: AnyTextTokenizer
    """Likewise."""
    variants: dict[str, Variant]
    stages: dict[str, Stage]
    benchmarks: dict[str, Benchmark]
    """Cards of `datasets/evals`, and what is changed of them."""
    band: str | None = None
    """File of earlier runs' scores, beside which those of this one are shown."""
    text_evals: tuple[str, ...] = ()
    """Cards of `datasets/evals/text`, run by lm-evaluation-harness."""
    prepared: dict[str, PreparedSet] = {}
    """Written by `unifork use`: every text column of a data set that some stage reads with some template."""
    runs: dict[str, StageRun] = {}
    """Written by `unifork use`: every stage of every variant, with its inputs."""
    analyses: Analysis = Analysis()
    """What is looked at inside the models of its stages."""
    analyzed: dict[str, AnalyzedRun] = {}
    """Written by `unifork use`: every run that is analyzed, with what that reads."""
    evaluations: dict[str, dict[str, str]] = {}
    """Written by `unifork use`: every benchmark of every variant, with its model."""
    text_runs: dict[str, dict[str, str]] = {}
    """Written by `unifork use`: the same of text, with the folder of its files; a page of text where none is there."""
    examined: dict[str, dict[str, str]] = {}
    """Written by `unifork use`: where networks look at images, those of every variant and the references."""
    scored: dict[str, tuple[str, ...]] = {}
    """Written by `unifork use`: the benchmarks of every variant."""

    def dataset(self, name: str) -> DatasetUse:
        """How the experiment uses a data set. Raises ConfigError when it does not."""
        one_of("data set", name, self.datasets, "params.yaml: datasets")
        return self.datasets[name]

    @property
    def groups(self) -> dict[str, dict[int, str]]:
        """The variants that the file of the experiment names, each by training seed with its name here."""
        found: dict[str, dict[int, str]] = {}
        for name, variant in self.variants.items():
            group = name.removesuffix(f"-seed{variant.seed}") if self.seeds else name
            found.setdefault(group, {})[variant.seed] = name
        return found

    @property
    def firsts(self) -> dict[str, str]:
        """The first training seed's variant of each group."""
        return {group: names[min(names)] for group, names in self.groups.items()}

    @property
    def all_benchmarks(self) -> tuple[str, ...]:
        """Names of its benchmarks, those of text behind the others."""
        return (*self.benchmarks, *self.text_evals)

    def steps_before(self, stage: str) -> dict[str, int]:
        """Steps of each track in the stages that a stage extends."""
        if (extended := self.stages[stage].extend) is None:
            return dict.fromkeys(self.stages[stage].tracks, 0)
        before = self.steps_before(extended)
        return {name: before[name] + track.steps for name, track in self.stages[extended].tracks.items()}


def load_experiment() -> Experiment:
    """The experiment of the working directory. Raises ConfigError, also for edits that are not whole."""
    found = load(Experiment, "params.yaml")
    runs = {f"{name}-{stage}" for name, variant in found.variants.items() for stage in variant.stages}
    read = {entry.prepared for run in found.runs.values() for entry in found.stages[run.stage].entries}
    derived: tuple[tuple[str, set[Any], set[Any]], ...] = (
        ("variants.*.seed", {each.seed for each in found.variants.values()}, {*(found.seeds or [found.training_seed])}),
        ("runs", {*found.runs}, runs),
        ("prepared", {*found.prepared}, read | {*found.prepared}),
    )
    for key, *sets in derived:
        written, needed = (", ".join(map(str, sorted(names))) for names in sets)
        if written != needed:
            raise ConfigError(
                f"params.yaml: {key}: {written}, but the rest of the file needs {needed}. `unifork use` alone writes "
                f"what follows from an experiment: change experiments/{found.name}.yaml"
            )
    return found

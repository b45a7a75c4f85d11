"""What an experiment costs, before anything runs: parameters, documents, tokens, FLOPs, disk, GPU hours.

In: an experiment with its cards. Out: plain numbers. Models are built on the meta device, so a count
is of the model that would be trained. What cannot be counted before there is data is an assumption
(`Assumptions`); GPU hours exist only for a chip of `PEAK_TFLOPS` at an utilisation that is given.

FLOPs of one document, multiply and add counted apart, embeddings, norms and biases not at all:

- a matrix of W weights: 2W per token forward; 2W more backward where it learns or lies behind
  something that does; 2W more for its own gradient where it learns;
- attention: 4 * keys * heads * head_dim per query forward, twice that backward; a query sees
  (length + 1) / 2 keys on average, because only the causal half is counted;
- the vocabulary: at supervised text tokens alone;
- the image head: D items at every supervised position, each through all blocks and the classifier.

Padding and recomputed activations cost time, not FLOPs of this count: they lower the utilisation.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from pydantic import PositiveInt

from unifork.config import Card, Experiment, ImageTokenizerConfig, MixtureEntry, Track, Variant
from unifork.config.base import Fraction01, Plain
from unifork.documents.prompts import SYSTEM, Template, template_named
from unifork.errors import ConfigError, unknown
from unifork.models.modeling import UniForkModel
from unifork.models.parameters import paper_counts, parts, tasks_of, with_head
from unifork.models.warm_start import branch_of, model_config
from unifork.training.optimizer import trainable_names
from unifork.vocabulary import CODE_DTYPE, MODALITIES, TASKS, VIEW_OF_TASK, Modality, Task

PEAK_TFLOPS = {
    "a100": 312.0,
    "a800": 312.0,
    "h100": 989.4,
    "h100-pcie": 756.5,
    "h200": 989.4,
    "h800": 989.4,
    "l40s": 362.0,
    "rtx4090": 165.2,
}
"""Dense bfloat16 peak in TFLOP/s, from NVIDIA's data sheets (half of what they give with sparsity)."""

BYTES_PER_CODE = int(CODE_DTYPE[-1])
FLOAT32_BYTES = 4
ADAM_BYTES = 8
"""Two float32 moments per trained parameter."""
BORDER_TOKENS = 2
"""Begin and end of a picture."""


class Assumptions(Plain):
    """What is not known before the data is there."""

    caption_tokens: PositiveInt = 40
    """Tokens of a caption."""
    dialogue_tokens: PositiveInt = 150
    """Tokens of a dialogue, without the frame of its template."""
    answer_share: Fraction01 = 0.5
    """Share of a dialogue's tokens that is learned."""
    characters_per_token: PositiveInt = 4
    """For the frame of a template."""


@dataclass(frozen=True)
class Length:
    """Tokens of an average document of a mixture entry."""

    text: float
    image: int
    learned_text: float
    learned_positions: int

    @property
    def total(self) -> float:
        """Of both modalities."""
        return self.text + self.image


@dataclass(frozen=True)
class EntryPlan:
    """One entry of a mixture over a whole track."""

    entry: MixtureEntry
    documents: float
    passes: float | None
    """How often its data set is read, None where the number of rows is not given."""
    length: Length
    flops: float


@dataclass(frozen=True)
class TrackPlan:
    """One track of one stage of one variant."""

    variant: str
    stage: str
    track: str
    steps: int
    trained: int
    """Parameters that it trains."""
    entries: tuple[EntryPlan, ...]

    @property
    def documents(self) -> float:
        """Documents over all steps."""
        return sum(one.documents for one in self.entries)

    @property
    def text_tokens(self) -> float:
        """Text tokens over all steps."""
        return sum(one.documents * one.length.text for one in self.entries)

    @property
    def image_tokens(self) -> float:
        """Image tokens over all steps, borders included."""
        return sum(one.documents * one.length.image for one in self.entries)

    @property
    def flops(self) -> float:
        """Forward and backward over all steps."""
        return sum(one.flops for one in self.entries)


@dataclass(frozen=True)
class ParameterPlan:
    """Parameters of one variant."""

    parts: dict[str, int]
    """By part and branch."""
    used: dict[Task, int]
    """Those a task reads; embeddings and connector included."""
    paper: dict[str, int]
    """As the paper counts, see `paper_counts`."""

    @property
    def total(self) -> int:
        """All parameters, tied ones once."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on disk."""

    picture: int
    """Codes of one picture in one view."""
    codes: dict[str, int | None]
    """Codes of `<set>/<view>`, None where the number of rows is not given."""
    checkpoints: dict[str, tuple[int, int]]
    """Per run: bytes of one checkpoint (weights and optimizer, float32), and how many are kept."""


@dataclass(frozen=True)
class CodeShape:
    """What an image tokenizer makes of a picture."""

    grid: int
    depth: int = 4
    codebook_size: int = 16384
    channels: int = 1024

    @property
    def picture_bytes(self) -> int:
        """Codes of one picture on disk."""
        return self.grid**2 * self.depth * BYTES_PER_CODE


def code_shape(experiment: Experiment) -> CodeShape:
    """The shape of an experiment's codes; an imported tokenizer is taken for VILA-U's, 16 pixels a position."""
    pictures = experiment.image_tokenizer
    if isinstance(pictures, ImageTokenizerConfig):
        return CodeShape(pictures.grid, pictures.depth, pictures.codebook_size, pictures.encoder.hidden_size)
    return CodeShape(pictures.image_size // 16)


def meta_model(experiment: Experiment, variant: Variant) -> UniForkModel:
    """The model of a variant without memory for its weights. Raises ConfigError as the real one would."""
    shape, words = code_shape(experiment), getattr(experiment.text_tokenizer, "vocab_size", 0)
    config = model_config(variant, shape.codebook_size, shape.channels, shape.depth, shape.grid, words)
    if not config.backbone["vocab_size"]:
        raise ConfigError(f"{experiment.name}: an imported text tokenizer needs vocab_size in every variant's backbone")
    with torch.device("meta"):
        return UniForkModel(config)


# -------------------------------------------------------------------------------------- parameters


def parameter_plan(model: UniForkModel) -> ParameterPlan:
    """Parameters by part, by task, and as the paper counts, whose head is the published, unfolded one."""
    counted = parts(model.config)
    used = {task: sum(part.parameters for part in counted if task in part.tasks) for task in TASKS}
    sizes = {part.name: part.parameters for part in counted if part.parameters}
    return ParameterPlan(sizes, used, paper_counts(with_head(model.config, folded=False)))


def _serves(name: str, task: Task, modality: Modality | None = None) -> bool:
    """Whether a parameter takes part in a task, for tokens of one modality or of any."""
    branch = branch_of(name)
    other_modality = modality is not None and branch in MODALITIES and branch != modality
    return task in tasks_of(name) and not other_modality


# ------------------------------------------------------------------------------- tokens and FLOPs


def average_length(
    entry: MixtureEntry, track: Track, positions: int, context: int, assumed: Assumptions, place: str
) -> Length:
    """An average document of a mixture entry, cut at the context."""
    template = template_named(entry.template, place)
    fields = assumed.dialogue_tokens if template.turn else assumed.caption_tokens
    image = positions + BORDER_TOKENS
    text = min(fields + len(_frame(template)) / assumed.characters_per_token, context - image)
    if entry.task == "generation":
        return Length(text, image, 0.0, track.supervised_positions or positions)
    return Length(text, image, min(fields * (assumed.answer_share if template.turn else 1.0), text), 0)


def _frame(template: Template) -> str:
    """What a template writes around its fields, once."""
    marked = (template.opening + template.turn + template.text).replace("{system}", SYSTEM)
    return re.sub(r"\{\w+\}|\[\[|\]\]|<image>", "", marked)


def document_flops(model: UniForkModel, task: Task, length: Length, trained: set[str]) -> float:
    """FLOPs of one document of a task, forward and backward, by the formula of the module's docstring."""
    config, dense = model.config, model.config.backbone_config()
    matrices = {name: tensor.numel() for name, tensor in model.named_parameters() if tensor.ndim == 2}
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    tokens: dict[Modality, float] = {"text": length.text, "image": length.image}

    def cost(prefix: str, count: float, behind: bool, modality: Modality | None = None) -> float:
        chosen = {n: w for n, w in matrices.items() if n.startswith(prefix) and _serves(n, task, modality)}
        learned = sum(w for n, w in chosen.items() if n in trained)
        return 2.0 * count * (sum(chosen.values()) * (1 + behind) + learned)

    def learns(prefix: str) -> bool:
        return any(name.startswith(prefix) and _serves(name, task) for name in trained)

    behind = learns("connector.")
    total = cost("connector.linear", length.image - BORDER_TOKENS, behind)
    behind = behind or learns("embed_tokens.")
    for number, kind in enumerate(model.plan.kinds):
        layer = f"layers.{number}."
        behind = behind or learns(layer)
        total += sum(cost(layer, count, behind, modality) for modality, count in tokens.items())
        rows = list(tokens.values()) if kind.isolated else [length.total]
        width = dense.num_attention_heads * head_dim
        total += sum(_attention(row, width) for row in rows) * (1 + 2 * behind)
    behind = behind or learns("norm.")
    if task == "understanding":
        words = "lm_head." if "lm_head.weight" in matrices else "embed_tokens."
        return total + cost(words, length.learned_text, behind or learns(words))
    behind, places, depth = behind or learns("image_head."), length.learned_positions, config.depth
    head = config.head_config()
    items = {"hidden_proj.": 1, "code_proj.": depth - 1, "blocks.": depth, "classifier.": depth}
    total += sum(cost(f"image_head.{part}", places * count, behind) for part, count in items.items())
    return total + places * head.layers * _attention(depth, head.heads * head.head_dim) * (1 + 2 * behind)


def _attention(length: float, width: int) -> float:
    """Forward FLOPs of causal attention over a sequence."""
    return 4 * length * (length + 1) / 2 * width


def track_plans(experiment: Experiment, name: str, model: UniForkModel, assumed: Assumptions) -> Iterator[TrackPlan]:
    """Every track of every stage of a variant, in order. Raises ConfigError for a pattern without a match."""
    sizes = {one: tensor.numel() for one, tensor in model.named_parameters()}
    for stage_name in experiment.variants[name].stages:
        stage = experiment.stages[stage_name]
        for track_name, track in stage.tracks.items():
            place = f"stages.{stage_name}.tracks.{track_name}"
            trained = set(trainable_names(list(sizes), track.trainable, f"{place}.trainable"))
            weights = sum(entry.weight for entry in track.mixture)
            entries = []
            for entry in track.mixture:
                length = average_length(entry, track, model.config.positions, stage.context, assumed, place)
                documents = track.steps * track.batch_documents * entry.weight / weights
                rows = experiment.datasets[entry.dataset].rows
                flops = documents * document_flops(model, entry.task, length, trained)
                entries.append(EntryPlan(entry, documents, documents / rows if rows else None, length, flops))
            count = sum(sizes[one] for one in trained)
            yield TrackPlan(name, stage_name, track_name, track.steps, count, tuple(entries))


def peak_tflops(device_name: str) -> float | None:
    """Peak of a device by the name its driver gives, as `NVIDIA H100 PCIe`; None for one that is not known."""
    plain = re.sub("[^a-z0-9]", "", device_name.lower())
    fitting = [chip for chip in PEAK_TFLOPS if chip.replace("-", "") in plain]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def gpu_hours(flops: float, chip: str | None, mfu: float | None) -> float | None:
    """Hours of one GPU, None (not measured) unless both are given. Raises ConfigError for an unknown chip."""
    if chip is not None and chip not in PEAK_TFLOPS:
        raise unknown("chip", chip, PEAK_TFLOPS, "--chip")
    return None if chip is None or mfu is None else flops / (PEAK_TFLOPS[chip] * 1e12 * mfu) / 3600


# -------------------------------------------------------------------------------------------- disk


def disk_plan(experiment: Experiment, cards: Mapping[str, Card], models: Mapping[str, UniForkModel]) -> DiskPlan:
    """Codes of every view the cards offer, and the checkpoints of every run."""
    picture = code_shape(experiment).picture_bytes
    codes = {
        f"{dataset}/{VIEW_OF_TASK[task]}": None if use.rows is None else use.rows * picture
        for dataset, use in experiment.datasets.items()
        for task in cards[dataset].tasks
    }
    checkpoints = {}
    for key, run in experiment.runs.items():
        sizes = {name: tensor.numel() for name, tensor in models[run.variant].named_parameters()}
        stage = experiment.stages[run.stage]
        moments = sum(
            sum(sizes[one] for one in trainable_names(list(sizes), track.trainable, f"run {key}"))
            for track in stage.tracks.values()
        )
        weights = sum(sizes.values()) + models[run.variant].codebook.numel()
        checkpoints[key] = (weights * FLOAT32_BYTES + moments * ADAM_BYTES, stage.keep_checkpoints)
    return DiskPlan(picture, codes, checkpoints)

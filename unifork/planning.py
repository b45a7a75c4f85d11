"""What an experiment costs, before anything runs: parameters, documents, tokens, FLOPs, disk, GPU hours.

In: an experiment with its cards. Out: plain numbers. Models are built on the meta device, so a count
is of the model that would be trained. What cannot be counted before there is data is an assumption
(`Assumptions`); `training/flops.py` says how FLOPs are counted. GPU hours exist only for a chip of
`PEAK_TFLOPS` at an utilization that is given.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import PositiveInt

from unifork.config import Card, Experiment, ImageTokenizerConfig, MixtureEntry, Track, Variant
from unifork.config.base import Fraction01, StrictModel
from unifork.documents.prompts import SYSTEM, template_named
from unifork.errors import ConfigError, unknown
from unifork.models.configuration import UniForkConfig
from unifork.models.modeling import UniForkModel
from unifork.models.parameters import paper_counts, parts, tasks_of, with_head
from unifork.models.warm_start import model_config
from unifork.sources import source_of
from unifork.training.flops import BORDER_TOKENS, PEAK_TFLOPS, Length, document_flops
from unifork.training.optimizer import trained_names, with_adapters
from unifork.vocabulary import CODE_DTYPE, TASKS, VIEW_OF_TASK, Task

CHARACTERS_PER_TOKEN = 4
"""Of what a template writes around its fields."""
FLOAT32_BYTES, ADAM_BYTES = 4, 8
"""Of a weight, and of AdamW's two moments for a trained one."""
ROW_BYTES, TOKEN_BYTES = 60, 5
"""Of a prepared document, key included, and of each of its text tokens."""


class Assumptions(StrictModel):
    """What is not known before the data is there."""

    caption_tokens: PositiveInt = 40
    """Tokens of a caption."""
    dialogue_tokens: PositiveInt = 150
    """Tokens of a dialogue, without the frame of its template."""
    text_tokens: PositiveInt = 500
    """Tokens of a plain text."""
    answer_share: Fraction01 = 0.5
    """Share of a dialogue's tokens that is supervised."""


@dataclass(frozen=True)
class EntryPlan:
    """One entry of a mixture over a whole track."""

    entry: MixtureEntry
    documents: float
    passes: float | None
    """How often its data set is read, None where the number of rows is not given."""
    length: Length
    flops: float
    """Forward and backward of all its documents."""


@dataclass(frozen=True)
class TrackPlan:
    """One track of one stage of one variant."""

    stage: str
    track: str
    steps: int
    trained: int
    """Parameters that it trains."""
    entries: Sequence[EntryPlan]
    adapters: int = 0
    """Parameters that the stage's `lora` adds to the model."""


def code_shape(experiment: Experiment) -> dict[str, int]:
    """Codebook size, code channels, depth and grid; an imported tokenizer is taken for VILA-U's."""
    images = experiment.image_tokenizer
    if isinstance(images, ImageTokenizerConfig):
        sizes = (images.codebook_size, images.encoder.hidden_size, images.depth, images.grid)
    else:
        sizes = (16384, 1024, 4, images.image_size // 16)
    return dict(zip(("codebook_size", "code_channels", "depth", "grid"), sizes, strict=True))


def meta_model(experiment: Experiment, variant: Variant) -> UniForkModel:
    """The model of a variant without memory for its weights. Raises ConfigError as the real one would."""
    config = model_config(variant, getattr(experiment.text_tokenizer, "vocab_size", 0), **code_shape(experiment))
    if not config.backbone["vocab_size"]:
        raise ConfigError(f"{experiment.name}: an imported text tokenizer needs vocab_size in every variant's backbone")
    with torch.device("meta"):
        return UniForkModel(config)


def parameter_counts(config: UniForkConfig) -> dict[str, int]:
    """Parameters by part (tied ones once), in all, by task, and as the paper counts: with the unfolded head."""
    counted = parts(config)
    paper = paper_counts(with_head(config, folded=False))
    return {
        **{name: count for name, count in counted.items() if count},
        "total": sum(counted.values()),
        **{f"used for {task}": sum(n for name, n in counted.items() if task in tasks_of(name)) for task in TASKS},
        **{f"as the paper counts: {name}": count for name, count in paper.items()},
    }


def average_length(
    entry: MixtureEntry, card: Card, track: Track, positions: int, context: int, assumed: Assumptions, place: str
) -> Length:
    """An average document of a mixture entry, cut at the context; that of a dialogue has an image if any row has.

    Raises ConfigError where not even an image fits.
    """
    template = template_named(entry.template, place)
    has_image = template.images != 0 and not source_of(card)[1].text_only
    image = positions + BORDER_TOKENS if has_image else 0
    if context < image:
        raise ConfigError(f"{place}: a context of {context} tokens; an image alone has {image}")
    captions = assumed.caption_tokens if template.images else assumed.text_tokens
    fields = assumed.dialogue_tokens if template.turn else captions
    marked = (template.opening + template.turn + template.text).replace("{system}", SYSTEM)
    frame = re.sub(r"\{\w+\}|\[\[|\]\]|<image>", "", marked)
    text = min(fields + round(len(frame) / CHARACTERS_PER_TOKEN), context - image)
    if entry.task == "generation":
        return Length(text, image, 0, track.supervised_positions or positions)
    return Length(text, image, min(round(fields * (assumed.answer_share if template.turn else 1)), text), 0)


def track_plans(
    experiment: Experiment, cards: Mapping[str, Card], name: str, model: UniForkModel, assumed: Assumptions
) -> Iterator[TrackPlan]:
    """Every track of every stage of a variant, in order. Raises ConfigError for a pattern without a match."""
    flops = dict[tuple[Task, Length, frozenset[str]], float]()
    for stage_name in experiment.variants[name].stages:
        stage = experiment.stages[stage_name]
        adapted = with_adapters(model, stage.lora, f"stages.{stage_name}.lora")
        sizes = {parameter_name: tensor.numel() for parameter_name, tensor in adapted.named_parameters()}
        for track_name, track in stage.tracks.items():
            place = f"stages.{stage_name}.tracks.{track_name}"
            trained = frozenset(trained_names(list(sizes), track, place))
            weights = sum(entry.weight for entry in track.mixture)
            entries = []
            for entry in track.mixture:
                length = average_length(
                    entry, cards[entry.dataset], track, model.config.positions, stage.context, assumed, place
                )
                kind = (entry.task, length, trained)
                flops[kind] = flops.get(kind) or document_flops(adapted, *kind)
                documents = track.steps * track.batch_documents * entry.weight / weights
                rows = experiment.datasets[entry.dataset].rows
                passes = documents / rows if rows else None
                entries.append(EntryPlan(entry, documents, passes, length, documents * flops[kind]))
            count, added = sum(map(sizes.__getitem__, trained)), sum(sizes.values()) - model.num_parameters()
            yield TrackPlan(stage_name, track_name, track.steps, count, entries, added)


def totals(tracks: Sequence[TrackPlan]) -> dict[str, float]:
    """What some tracks see together, and what it costs."""
    entries = [entry for track in tracks for entry in track.entries]
    return {
        "steps": sum(track.steps for track in tracks),
        "documents": sum(entry.documents for entry in entries),
        "text tokens": sum(entry.documents * entry.length.text for entry in entries),
        "image tokens": sum(entry.documents * entry.length.image for entry in entries),
        "FLOPs": sum(entry.flops for entry in entries),
    }


def variant_facts(
    experiment: Experiment, cards: Mapping[str, Card], name: str, model: UniForkModel, assumed: Assumptions
) -> dict[str, str | float]:
    """What a comparison of variants should know of each: what it is, what it sees and what that costs."""
    tracks, variant = list(track_plans(experiment, cards, name, model, assumed)), experiment.variants[name]
    cost, counts, documents = totals(tracks), parameter_counts(model.config), dict.fromkeys(TASKS, 0.0)
    for part in (part for track in tracks for part in track.entries):
        documents[part.entry.task] += part.documents
    return {
        "plan": variant.plan,
        "parameters": counts["total"],
        **{f"of them for {task}": counts[f"used for {task}"] for task in TASKS},
        "FLOPs per document": cost["FLOPs"] / max(cost["documents"], 1),
        "steps": cost["steps"],
        **{f"documents of {task}": number for task, number in documents.items()},
        "tokens": cost["text tokens"] + cost["image tokens"],
        **{f"trained in {track.stage}, {track.track}": track.trained for track in tracks},
        "initialization": variant.warm_start or "drawn by seed and name of the tensor",
    }


def gpu_hours(flops: float, chip: str | None, mfu: float | None) -> float | None:
    """Hours of one GPU, None (not measured) unless both are given. Raises ConfigError for an unknown chip."""
    if chip is not None and chip not in PEAK_TFLOPS:
        raise unknown("chip", chip, PEAK_TFLOPS, "--chip")
    return None if chip is None or mfu is None else flops / (PEAK_TFLOPS[chip] * 1e12 * mfu) / 3600


def image_bytes(experiment: Experiment) -> int:
    """Codes of one image on disk."""
    shape = code_shape(experiment)
    return shape["grid"] ** 2 * shape["depth"] * np.dtype(CODE_DTYPE).itemsize


def code_bytes(experiment: Experiment, cards: Mapping[str, Card]) -> dict[str, int | None]:
    """Codes of every `<set>/<view>` that the cards offer, None where the number of rows is not given."""
    per_image = image_bytes(experiment)
    bytes_each = {name: 0 if source_of(card)[1].text_only else per_image for name, card in cards.items()}
    return {
        f"{dataset}/{VIEW_OF_TASK[task]}": None if use.rows is None else use.rows * bytes_each[dataset]
        for dataset, use in experiment.datasets.items()
        for task in cards[dataset].tasks
    }


def prepared_bytes(experiment: Experiment, tracks: Iterable[TrackPlan]) -> dict[str, int | None]:
    """Documents of every prepared set that some tracks read, None where the number of rows is not given."""
    sizes: dict[str, int | None] = {}
    for part in (part for track in tracks for part in track.entries):
        rows = experiment.datasets[part.entry.dataset].rows
        sizes[part.entry.prepared] = None if rows is None else rows * (ROW_BYTES + TOKEN_BYTES * part.length.text)
    return sizes


def checkpoint_bytes(model: UniForkModel, tracks: Sequence[TrackPlan]) -> int:
    """One checkpoint of a run with these tracks: weights, codebook, adapters, two moments per trained parameter."""
    weights = model.codebook.numel() + sum(tensor.numel() for tensor in model.parameters()) + tracks[0].adapters
    return weights * FLOAT32_BYTES + sum(track.trained for track in tracks) * ADAM_BYTES

"""What a run will look up, looked up by `unifork use` before anything is downloaded or written.

In: an experiment with its cards. Out: nothing, or ConfigError naming file, key, value and what is allowed. What only
data or weights can tell is left to the run: files that are not there yet, and the configuration of a dense model that
is still on the Hub.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flatten_dict import flatten

from unifork.config import (
    ANALYSES,
    CLUSTER,
    Card,
    Cluster,
    Experiment,
    ImageTokenizerConfig,
    MixtureEntry,
    Stage,
    TextTokenizerConfig,
    Track,
    Variant,
    cluster_file,
    load,
)
from unifork.documents.prompts import template_for
from unifork.errors import CheckpointError, ConfigError, one_of
from unifork.image_tokenizer.readers import READERS
from unifork.sources import source_of

Cards = Mapping[str, Card]
SHOWN = 5
"""Keys of a difference that an error names."""


def check_seeds(plain: Mapping[str, Any], place: str) -> None:
    """That seeds are those of the whole experiment, before it is typed."""
    groups = {kind: part for kind in ("variants", "stages") if isinstance(part := plain.get(kind), dict)}
    parts = [(f"{kind}.{name}.", part) for kind, group in groups.items() for name, part in group.items()]
    for where, part in [("", plain), *parts]:
        if isinstance(part, dict) and "seed" in part:
            raise ConfigError(
                f"{place}: {where}seed: two keys of the experiment are its seeds: `data_seed` (data, benchmarks) and "
                "`training_seed` (initialization, order of documents, dropped prompts), or `seeds` for several runs"
            )


def check_alike(experiment: Experiment, roots: Mapping[str, str], place: str) -> None:
    """That variants differ only where they say so: in their plans, and in what one that is `like` another writes.

    roots: for each variant the one that it is like, in the end.
    """
    form: dict[str, Any] = {"mode": "json", "exclude": {"plan", "seed"}}
    settings = {
        name: flatten(variant.model_dump(**form), "dot", max_flatten_depth=2)
        for name, variant in experiment.variants.items()
    }
    (first, theirs), *others = settings.items()
    for name, ours in others:
        differ = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
        if differ and roots[name] != roots[first]:
            pairs = (f"{key}: {theirs.get(key, 'nothing')} -> {ours.get(key, 'nothing')}" for key in differ[:SHOWN])
            raise ConfigError(
                f"{place}: variants.{name} is not {first} with another plan: {'; '.join(pairs)}"
                f"{'; ...' * (len(differ) > SHOWN)}. Say `like: {first}` and write only what shall differ"
            )


def check_names(experiment: Experiment, cards: Cards, place: str) -> None:
    """Data sets, stages, tasks and texts that parts of an experiment name."""
    images, texts = experiment.image_tokenizer, experiment.text_tokenizer
    readers = {
        "image_tokenizer.training": images.training.datasets if isinstance(images, ImageTokenizerConfig) else (),
        "text_tokenizer": texts.datasets if isinstance(texts, TextTokenizerConfig) else (),
    }
    for part, datasets in readers.items():
        for dataset in datasets:
            one_of("data set", dataset, experiment.datasets, f"{place}: {part}.datasets")
    for name, variant in experiment.variants.items():
        for number, stage in enumerate(variant.stages):
            one_of("stage", stage, experiment.stages, f"{place}: variants.{name}.stages")
            if extended := experiment.stages[stage].extend:
                where = f"{place}: variants.{name}.stages: {stage} extends {extended}, which must stand before it"
                one_of("earlier stage", extended, variant.stages[:number], where)
    for kind in ANALYSES:
        for stage in getattr(experiment.analyses, kind):
            one_of("stage", stage, experiment.stages, f"{place}: analyses.{kind}")
    if prompts := experiment.analyses.prompts:
        one_of("benchmark", prompts, experiment.benchmarks, f"{place}: analyses.prompts")
    for where, track in _tracks(experiment, place):
        for entry in track.mixture:
            one_of("data set", entry.dataset, experiment.datasets, f"{where}.mixture")
            tasks = cards[entry.dataset].tasks
            one_of(f"task of {entry.dataset}", entry.task, tasks, f"{where}.mixture")
            one_of(f"text of {entry.dataset} for {entry.task}", entry.text, tasks[entry.task].texts, f"{where}.mixture")


def check_choices(experiment: Experiment, cards: Cards, place: str) -> None:
    """Readers, templates, and what follows from the grid and the views.

    Sources and filter rules of the cards were looked at by `followed`, suites where entries are derived.
    """
    for name, card in cards.items():
        if card.reader:
            READERS.find(card.reader, f"card {name}: reader")
    _check_extended(experiment, place)
    images = experiment.image_tokenizer
    positions = images.grid**2 if isinstance(images, ImageTokenizerConfig) else None
    for where, track in _tracks(experiment, place):
        for number, entry in enumerate(track.mixture):
            _check_images(entry, cards[entry.dataset], f"{where}.mixture[{number}]")
        if positions and (track.supervised_positions or 0) > positions:
            raise ConfigError(
                f"{where}: supervised_positions is {track.supervised_positions}; an image has {positions} positions"
            )
    if isinstance(images, ImageTokenizerConfig):
        for name in images.training.datasets:
            if source_of(cards[name])[1].text_only:
                raise ConfigError(f"{place}: image_tokenizer.training.datasets: no row of {name} has an image")
        groups = {f"{name}/{use.view}" for name in images.training.datasets for use in cards[name].tasks.values()}
        for group in images.training.shares:
            one_of("group of images", group, groups, f"{place}: image_tokenizer.training.shares")


def _check_images(entry: MixtureEntry, card: Card, place: str) -> None:
    """That a template can be written for some row of a set: captions have an image, plain texts have none."""
    images = template_for(entry, place).images
    if images and source_of(card)[1].text_only:
        raise ConfigError(f"{place}: template {entry.template!r} has an image, no row of {card.name} has any")
    if images == 0 and card.text_only == "drop":
        raise ConfigError(
            f"{place}: template {entry.template!r} is for rows without an image; card {card.name} drops them, unless "
            "it says text_only: keep"
        )


def _check_extended(experiment: Experiment, place: str) -> None:
    """That a stage and the one it extends have the same order of documents, and moments of the same parameters."""
    for name, stage in experiment.stages.items():
        ours, theirs = map(_what_goes_on, (stage, experiment.stages[stage.extend or name]))
        if differ := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise ConfigError(
                f"{place}: stages.{name}: not as in {stage.extend}, which it extends: {', '.join(differ)}. Order and "
                "optimizer state go on only with the same; without `extend` a stage begins with new ones"
            )


def _what_goes_on(stage: Stage) -> dict[str, Any]:
    keys = ("mixture", "batch_documents", "trainable", "without_branches")
    tracks = {f"tracks.{name}.{key}": getattr(t, key) for name, t in stage.tracks.items() for key in keys}
    return {"context": stage.context, "lora": stage.lora, **tracks}


def check_models(experiment: Experiment, place: str) -> None:
    """Backbone, plan and head of every variant, and what its stages ask of the model, which is built without memory."""
    from unifork.planning import meta_model  # noqa: PLC0415  torch is slow to import
    from unifork.training.optimizer import trained_names, with_adapters  # noqa: PLC0415

    for name in (next(iter(seeds.values())) for seeds in experiment.groups.values()):
        variant = experiment.variants[name]
        if not variant.backbone and variant.warm_start and not Path(variant.warm_start).is_dir():
            continue
        try:
            model = meta_model(experiment, _with_vocabulary(experiment, variant))
        except (ConfigError, CheckpointError) as error:
            raise type(error)(f"{place}: variants.{name}: {error}") from None
        longest = model.config.backbone_config().max_position_embeddings
        for stage_name in variant.stages:
            stage = experiment.stages[stage_name]
            if stage.context > longest:
                raise ConfigError(
                    f"{place}: stages.{stage_name}.context is {stage.context}; the backbone of variants.{name} has "
                    f"{longest} positions (max_position_embeddings)"
                )
            adapted = with_adapters(model, stage.lora, f"{place}: stages.{stage_name}.lora", f" (variant {name})")
            names = [parameter for parameter, _ in adapted.named_parameters()]
            for track_name, track in stage.tracks.items():
                trained_names(names, track, f"{place}: stages.{stage_name}.tracks.{track_name}", f" (variant {name})")


def check_cluster(experiment: Experiment, place: str) -> None:
    """That the rows of the cluster file in use hold the longest document of every stage."""
    path = Path(cluster_file())
    if not path.exists():
        return
    cluster = load(Cluster, path)
    for name in dict.fromkeys(stage for variant in experiment.variants.values() for stage in variant.stages):
        rows, context = cluster.for_stage(name).row_tokens, experiment.stages[name].context
        if context > rows:
            raise ConfigError(
                f"{place}: stages.{name}.context is {context}, but row_tokens of {path} is {rows}: a row must hold the "
                f"longest document. Raise row_tokens, or name the file of another cluster in {CLUSTER}"
            )


def _tracks(experiment: Experiment, place: str) -> Iterator[tuple[str, Track]]:
    for stage_name, stage in experiment.stages.items():
        for name, track in stage.tracks.items():
            yield f"{place}: stages.{stage_name}.tracks.{name}", track


def _with_vocabulary(experiment: Experiment, variant: Variant) -> Variant:
    """The variant with some size of its vocabulary, where only the tokenizer to be imported knows it."""
    if isinstance(experiment.text_tokenizer, TextTokenizerConfig) or not variant.backbone:
        return variant
    return variant.model_copy(update={"backbone": {"vocab_size": 1, **variant.backbone}})

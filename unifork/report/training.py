"""The training stages of all variants: what they left, as the template shows it.

In: what stages exported, and their run folders. Out: one `Trained` for each stage of each variant, and tables over
them. A stage that has not run has no summary; a damaged file raises a UniForkError.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from unifork.config import Experiment, Stage
from unifork.layout import MODEL_IMAGE_TOKENIZER, Layout
from unifork.models.layer_plan import branch_of
from unifork.reference import Reference, among, references
from unifork.report.codec import LoadCodec
from unifork.report.images import ShownImage, Strip, grid, shown_images
from unifork.report.plots import Lines, Recorded
from unifork.report.reading import last_validation, read_codes, read_history, read_json, read_lines
from unifork.report.tables import Table, count, duration, table
from unifork.shards.progress import PROGRESS, read_progress
from unifork.training.checkpoint import FINISHED, Finished
from unifork.training.export import SUMMARY, TRAINING, Summary, Tensor
from unifork.training.history import RATES
from unifork.training.tables import HeldOutPart, Rate
from unifork.training.validation import HELD_OUT, HeldOut

PARTS = ("embeddings", "connector", "shared trunk", "image head", "text head", "codebook")
"""Order of the rows; branches come after the shared trunk."""


class Trained(NamedTuple):
    """One stage of one variant; `summary` is None where it has not run."""

    variant: str
    name: str
    settings: Stage
    summary: Summary | None
    seconds: float | None
    progress: Mapping[str, Any]
    """Of the last attempt; no two runs leave the same."""
    references: Sequence[str]
    """Where it lies among reference runs of its configuration."""
    losses: Mapping[str, float | None]
    """Of held-out rows at its end, by part."""
    held_out: HeldOut | None
    drawn: Strip
    """For the prompts of the stage."""
    originals: Strip
    """Images that were held out."""
    redrawn: Strip
    """For the texts of those."""

    @property
    def title(self) -> str:
        return f"{self.variant}, {self.name}"

    @property
    def parts(self) -> dict[str, tuple[int, int]]:
        return parts_of(self.summary["tensors"]) if self.summary else {}


def total(stages: Sequence[Trained]) -> float | None:
    """Seconds of some stages, where all of them were measured."""
    seconds = [stage.seconds for stage in stages if stage.seconds is not None]
    return sum(seconds) if 0 < len(seconds) == len(stages) else None


def stages_of(experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> list[Trained]:
    """All stages of all variants, in order."""
    others = references(layout)
    return [_stage(key, experiment, layout, load_codec, others) for key in experiment.runs]


def _stage(
    key: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec, others: Sequence[Reference]
) -> Trained:
    run, folder = experiment.runs[key], layout.model(key) / TRAINING
    summary, finished = read_json(folder / SUMMARY, Summary), read_json(layout.run(key) / FINISHED, Finished)
    held_out = read_json(folder / HELD_OUT, HeldOut) if summary else None

    def strip(texts: Sequence[str], file: str, name: str = "codes") -> Strip:
        codes_BND = read_codes(folder / file, len(texts), name) if texts else None
        if codes_BND is None:
            return []
        pixels_BSSC = load_codec(layout.model(key) / MODEL_IMAGE_TOKENIZER).decode(codes_BND)
        return list(zip(texts, shown_images(pixels_BSSC), strict=True))

    texts = [row["prompt"] for row in held_out["prompts"]] if held_out else []
    return Trained(
        variant=run.variant,
        name=run.stage,
        settings=experiment.stages[run.stage],
        summary=summary,
        seconds=finished["seconds"] if finished else None,
        progress=read_progress(layout.run(key) / PROGRESS),
        references=among(others, experiment, layout, key, read_history(folder / "history.csv")),
        losses={
            row["part"]: row.get("text_loss" if row["task"] == "understanding" else "image_loss")
            for row in last_validation(folder / "validation.csv")
        },
        held_out=held_out,
        drawn=strip(summary["stage"]["sample_prompts"], "samples.npz") if summary else [],
        originals=strip(texts, "held_out.npz"),
        redrawn=strip(texts, "held_out.npz", "drawn"),
    )


def lines_of(experiment: Experiment, layout: Layout) -> Lines:
    """What the finished stages of each variant recorded."""
    found: dict[str, list[Recorded]] = {name: [] for name in experiment.variants}
    for key, run in experiment.runs.items():
        folder = layout.model(key) / TRAINING
        if history := read_history(folder / "history.csv"):
            documents = {name: track.batch_documents for name, track in experiment.stages[run.stage].tracks.items()}
            history = [{**step, "documents": documents.get(step["track"], 0)} for step in history]
            beside = [*read_history(folder / "validation.csv", HeldOutPart), *read_lines(layout.run(key) / RATES, Rate)]
            before = sum(len(stage.history) for stage in found[run.variant])
            found[run.variant].append(Recorded(run.stage, history, beside, before))
    return found


def overview(experiment: Experiment, stages: Sequence[Trained]) -> Table:
    """A row for each variant."""
    rows = []
    for name, variant in experiment.variants.items():
        own = [stage for stage in stages if stage.variant == name]
        finished = [stage for stage in own if stage.summary]
        parameters = sum(map(sum, finished[-1].parts.values())) if finished else None
        rows.append({
            "Variant": name, "Layer plan": variant.plan,
            "Parameters": "not known yet" if parameters is None else count(parameters),
            "Stages done": f"{len(finished)} of {len(own)}", "Training time": duration(total(own)),
        })  # fmt: skip
    return table("Variants", rows)


def parameters_table(stages: Sequence[Trained]) -> Table:
    """Parameters of each part of each variant, and what of them each stage trained."""
    rows: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for part, (frozen, trained) in stage.parts.items():
            row = rows.setdefault(f"{stage.variant}: {part}", {"Part": f"{stage.variant}: {part}"})
            row["Parameters"] = count(frozen + trained)
            row[stage.name] = "frozen" if not trained else f"{count(trained)} trained" if frozen else "trained"
    return table("Parameters", [*rows.values()])


def held_out_images(stages: Sequence[Trained]) -> Table:
    """Images that were held out, and what each stage drew for their texts."""
    originals: list[tuple[str, ShownImage]] = []
    for stage in stages:
        shown = {text for text, _ in originals}
        originals += [pair for pair in stage.originals if pair[0] not in shown]
    drawn = [(f"{stage.title}, drawn", stage.redrawn) for stage in stages]
    return grid("Images for held-out prompts", [row for row in [("held out", originals), *drawn] if row[1]])


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """The frozen and the trained parameters of each part of a model, in a fixed order."""
    counts: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for name, tensor in tensors.items():
        counts[tensor["trained"]][part_of(name)] += prod(tensor["shape"])
    found = {part_of(name) for name in tensors}
    order = [*PARTS[:3], *sorted(found - {*PARTS}), *PARTS[3:]]
    return {part: (counts[False][part], counts[True][part]) for part in order if part in found}


def part_of(tensor: str) -> str:
    """The part of a model that a tensor belongs to: `layers.14.mlp.generation.up_proj.weight` to a branch."""
    branch, start = branch_of(tensor), tensor.partition(".")[0]
    if branch:
        return "shared trunk" if branch == "shared" else f"{branch} branch"
    return {"embed_tokens": "embeddings", "lm_head": "text head"}.get(start, start.replace("_", " "))

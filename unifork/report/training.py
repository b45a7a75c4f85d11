"""The training stages of all variants side by side, as tables and images for the template.

In: what stages exported, and their run folders. Out: one `Trained` for each stage of each variant, and tables over
them. A stage that has not run is said to be missing; a damaged file raises a UniForkError.

Shape suffixes: B images, S side in pixels, C channels (RGB).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from unifork.config import Experiment, Stage
from unifork.layout import MODEL_IMAGE_TOKENIZER, Layout
from unifork.models.layer_plan import branch_of
from unifork.reference import among, references
from unifork.report.codec import LoadCodec
from unifork.report.images import ShownImage, grid, shown_images
from unifork.report.plots import Lines, Recorded
from unifork.report.reading import Found, read_codes, read_history, read_json
from unifork.report.tables import Judged, Table, count, duration
from unifork.shards.progress import PROGRESS, read_progress
from unifork.training.checkpoint import FINISHED
from unifork.training.export import SUMMARY, TRAINING

PARTS = ("embeddings", "connector", "shared trunk", "image head", "text head", "codebook")
"""Order of the rows; branches come after the shared trunk."""
ANSWERED = 3
"""Answers shown for each held-out part."""
SPEED = {
    "Tokens/s": ("tokens_per_second", "{:.0f}"),
    "MFU": ("mfu", "{:.1%}"),
    "Memory": ("memory_gib", "{:.2f} GiB"),
}
"""Columns of numbers that no two runs repeat: their key in the progress of a run, and how they are written."""


class Trained(NamedTuple):
    """One stage of one variant; `summary` is None where it has not run."""

    variant: str
    name: str
    settings: Stage
    summary: Found | None
    seconds: float | None
    progress: Mapping[str, Any]
    """Of the last attempt; no two runs leave the same."""
    parts: Mapping[str, tuple[int, int]]
    """Frozen and trained parameters."""
    drawn: list[tuple[str, ShownImage]]
    """Prompts and what was drawn for them."""
    held_out: Found | None
    strips: Mapping[str, list[tuple[str, ShownImage]]]
    """Images that were held out, and those drawn for their texts."""

    @property
    def title(self) -> str:
        return f"{self.variant}, {self.name}"


def stages_of(experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> list[Trained]:
    """All stages of all variants, in order."""
    return [_stage(key, experiment, layout, load_codec) for key in experiment.runs]


def lines_of(experiment: Experiment, layout: Layout) -> Lines:
    """What the finished stages of each variant recorded."""
    found: dict[str, list[Recorded]] = {name: [] for name in experiment.variants}
    for key, run in experiment.runs.items():
        folder = layout.model(key) / TRAINING
        history, validation = (read_history(folder / f"{name}.csv") for name in ("history", "validation"))
        found[run.variant] += [Recorded(run.stage, history, validation)] if history else []
    return found


def _stage(key: str, experiment: Experiment, layout: Layout, load_codec: LoadCodec) -> Trained:
    run, folder = experiment.runs[key], layout.model(key) / TRAINING
    summary, finished = read_json(folder / SUMMARY), read_json(layout.run(key) / FINISHED)
    settings = experiment.stages[run.stage]
    prompts = summary["stage"]["sample_prompts"] if summary else settings.sample_prompts
    held_out = read_json(folder / "held_out.json") if summary else None

    def drawn(file: str, texts: list[str], name: str) -> list[tuple[str, ShownImage]]:
        codes = read_codes(folder / file, len(texts), name) if texts else None
        if codes is None:
            return []
        pixels_BSSC = load_codec(layout.model(key) / MODEL_IMAGE_TOKENIZER).decode(codes)
        return list(zip(texts, shown_images(pixels_BSSC), strict=True))

    texts = [row["prompt"] for row in held_out["prompts"]] if held_out else []
    strips = {name: drawn("held_out.npz", texts, name) for name in ("codes", "drawn")}
    return Trained(
        run.variant, run.stage, settings, summary, finished["seconds"] if finished else None,
        read_progress(layout.run(key) / PROGRESS), parts_of(summary["tensors"]) if summary else {},
        drawn("samples.npz", list(prompts), "codes"), held_out, strips,
    )  # fmt: skip


def overview(experiment: Experiment, stages: Sequence[Trained]) -> Table:
    """A row for each variant."""
    rows = []
    for name, variant in experiment.variants.items():
        own = [stage for stage in stages if stage.variant == name]
        times = [stage.seconds for stage in own]
        parameters = sum(frozen + trained for frozen, trained in _parts(own).values())
        done = f"{sum(bool(stage.summary) for stage in own)} of {len(own)}"
        rows.append([name, variant.plan, count(parameters) if parameters else "not known yet", done, total(times)])
    return Table("Variants", ["Variant", "Layer plan", "Parameters", "Stages done", "Training time"], rows)


def total(times: Sequence[float | None]) -> str:
    """The sum of some seconds in words, where all of them were measured."""
    return duration(sum(time or 0 for time in times) if times and None not in times else None)


def runs_table(stages: Sequence[Trained]) -> Table:
    """What each stage did and how fast its last attempt was, which no two runs repeat."""
    rows = []
    for stage in stages:
        tracks = (
            f"{name}: {count(track.steps)} steps of {count(track.batch_documents)} documents"
            for name, track in stage.settings.tracks.items()
        )
        shown = [form.format(value) if (value := stage.progress.get(key)) else "-" for key, form in SPEED.values()]
        rest = ["; ".join(tracks), duration(stage.seconds), *shown] if stage.summary else [None]
        rows.append([stage.title, *rest])
    return Table("Stages", ["Stage", "Tracks", "Time", *SPEED], rows)


def references_table(experiment: Experiment, layout: Layout, stages: Sequence[Trained]) -> Table:
    """Where each stage lies among reference runs of its configuration."""
    found, rows = references(layout), list[list[Any]]()
    for stage in stages if found else ():
        key = f"{stage.variant}-{stage.name}"
        lines = among(found, experiment, layout, key, read_history(layout.model(key) / TRAINING / "history.csv"))
        rows += [[stage.title, [f"{line}." for line in lines]]] if lines else []
    return Table("Among reference runs", ["Stage", "Losses"], rows)


def parameters_table(stages: Sequence[Trained]) -> Table:
    """Parameters of each part of each variant, and what of them each stage trained."""
    names = list(dict.fromkeys(stage.name for stage in stages))
    rows = []
    for variant in dict.fromkeys(stage.variant for stage in stages):
        own = {stage.name: stage for stage in stages if stage.variant == variant}
        for part, counts in _parts(list(own.values())).items():
            cells = [_trained(own[name], part) if name in own else "" for name in names]
            rows.append([f"{variant}: {part}", count(sum(counts)), *cells])
    return Table("Parameters", ["Part", "Parameters", *names], rows)


def _trained(stage: Trained, part: str) -> str | None:
    frozen, trained = stage.parts.get(part, (0, 0))
    if not stage.summary:
        return None
    return "frozen" if not trained else f"{count(trained)} trained" if frozen else "trained"


def mixtures_table(stages: Sequence[Trained]) -> Table:
    """Documents of each part of a mixture that could be used, and how many were seen."""
    rows = [
        [stage.title, track, part["dataset"], part["template"], count(part["usable"]), count(part["seen"])]
        for stage in stages
        if stage.summary
        for track, parts in stage.summary["documents"].items()
        for part in parts
    ]
    return Table("Mixtures as trained", ["Stage", "Track", "Data set", "Template", "Usable", "Seen"], rows)


def quarantined(stages: Sequence[Trained]) -> list[str]:
    """What each stage left out, in words."""
    return [
        f"{stage.title}: " + ", ".join(f"{count(number)} × {reason}" for reason, number in left_out.items())
        for stage in stages
        if stage.summary and (left_out := stage.summary["quarantined"])
    ]


def held_out_tables(stages: Sequence[Trained]) -> list[Table]:
    """Scores of answers for held-out rows, and the first answers of each part."""
    scores, answers = [], []
    for stage in stages:
        held_out = stage.held_out or {"scores": (), "answers": ()}
        for part in held_out["scores"]:
            scores.append([f"{stage.title}: {part['part']}", *_rates(part)])
            rows = [row for row in held_out["answers"] if row["part"] == part["part"]]
            for row in rows[:ANSWERED]:
                mark = Judged(bool(row["exact_match"]), row["answer"])
                answers.append([f"{stage.title}: {row['key']}", row["part"], row["expected"], mark])
    return [
        Table("Answers for held-out rows", ["Part", "Answers", "Exact match", "Token F1"], scores),
        Table("The first answers of each part", ["Row", "Part", "Expected", "Answered"], answers),
    ]


def _rates(part: Mapping[str, Any]) -> list[str]:
    rates = (f"{part[name]:.3f} ± {part[f'{name}_standard_error']:.3f}" for name in ("exact_match", "token_f1"))
    return [count(part["answers"]), *rates]


def held_out_numbers(stages: Sequence[Trained], lines: Lines) -> Table:
    """What the last stage of each variant gave on held-out rows: the loss of each part, and scores of its answers."""
    rows = []
    for stage, held_out in {stage.variant: (stage, stage.held_out) for stage in stages if stage.held_out}.values():
        scores = {part["part"]: _rates(part) for part in held_out["scores"]}
        recorded = [found for found in lines[stage.variant] if found.stage == stage.name]
        steps = [step for found in recorded for step in found.validation]
        for part, last in {step["part"]: step for step in steps}.items():
            loss = last.get("text_loss" if last["task"] == "understanding" else "image_loss")
            rates = scores.get(part, ["-"] * 3)
            rows.append([f"{stage.title}: {part}", "-" if loss is None else f"{loss:.3f}", *rates])
    return Table("Held-out rows", ["Part", "Loss", "Answers", "Exact match", "Token F1"], rows)


def images_after_stages(stages: Sequence[Trained]) -> Table:
    """The same prompts and seeds after each stage of each variant."""
    found = grid("Images after each stage", [(stage.title, stage.drawn) for stage in stages])
    missing = {stage.title for stage in stages if not stage.summary}
    rows = [[row[0], None] if row[0] in missing else row for row in found.rows]
    return found._replace(columns=["", *(found.columns[1:] or ["Images"])], rows=rows)


def held_out_images(stages: Sequence[Trained]) -> Table:
    """Images that were held out, and what each stage drew for their texts."""
    originals: list[tuple[str, ShownImage]] = []
    for stage in stages:
        shown = {text for text, _ in originals}
        originals += [pair for pair in stage.strips["codes"] if pair[0] not in shown]
    drawn = [(f"{stage.title}, drawn", stage.strips["drawn"]) for stage in stages]
    return grid("Images for held-out prompts", [row for row in [("held out", originals), *drawn] if row[1]])


def _parts(stages: Sequence[Trained]) -> dict[str, tuple[int, int]]:
    """The parts of a variant's model, as its last finished stage says."""
    return {part: counts for stage in stages for part, counts in stage.parts.items()}


def parts_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
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

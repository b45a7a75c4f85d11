"""`unifork plan`: what an experiment will cost, as tables, before anything runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from unifork.planning import Assumptions, DiskPlan, ParameterPlan, TrackPlan

PARAMS = "params.yaml"
WIDTH = 120
"""Columns where the output is not a terminal."""


def plan(
    experiment: Annotated[str, typer.Argument(help="experiment of experiments/, or a YAML file")] = PARAMS,
    chip: Annotated[str | None, typer.Option(help="GPU, for the hours: a100, h100, h100-pcie, h200, ...")] = None,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="share of its peak that is reached")] = None,
    caption_tokens: Annotated[int, typer.Option(min=1, help="assumed tokens of a caption")] = 40,
    dialogue_tokens: Annotated[int, typer.Option(min=1, help="assumed tokens of a dialogue")] = 150,
    answer_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="assumed learned share of a dialogue")] = 0.5,
) -> None:
    """Print parameters, documents, tokens, FLOPs, disk and GPU hours of every stage; nothing is run."""
    from rich.console import Console

    from unifork import planning
    from unifork.config import Experiment, load, load_card
    from unifork.experiments import resolve

    named = Path(experiment)
    params = load(Experiment, named) if named.suffix == ".yaml" else resolve(experiment)
    assumed = planning.Assumptions(
        caption_tokens=caption_tokens, dialogue_tokens=dialogue_tokens, answer_share=answer_share
    )
    planning.gpu_hours(0.0, chip, mfu)
    models = {name: planning.meta_model(params, variant) for name, variant in params.variants.items()}
    tracks = [track for name, model in models.items() for track in planning.track_plans(params, name, model, assumed)]
    cards = {name: load_card(name) for name in params.datasets}
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    console.print(_parameters({name: planning.parameter_plan(model) for name, model in models.items()}))
    console.print(_training(tracks, chip, mfu))
    console.print(_mixtures(tracks))
    console.print(_disk(planning.disk_plan(params, cards, models)))
    print(_notes(assumed, chip, mfu))


def _table(title: str, columns: list[str], names: int = 1) -> "Table":
    """A table whose first columns are names, all others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < names else "right", no_wrap=True)
    return table


def _parameters(plans: "dict[str, ParameterPlan]") -> "Table":
    table = _table("Parameters, millions", ["", *plans])
    parts = list(dict.fromkeys(part for plan in plans.values() for part in plan.parts))
    rows = {part: [plan.parts.get(part) for plan in plans.values()] for part in parts}
    rows["total"] = [plan.total for plan in plans.values()]
    for task in next(iter(plans.values())).used:
        rows[f"used for {task}"] = [plan.used[task] for plan in plans.values()]
    for count in next(iter(plans.values())).paper:
        rows[f"as the paper counts: {count}"] = [plan.paper[count] for plan in plans.values()]
    for name, counts in rows.items():
        table.add_row(name, *("" if count is None else f"{count / 1e6:,.1f}" for count in counts))
    return table


def _training(tracks: "list[TrackPlan]", chip: str | None, mfu: float | None) -> "Table":
    from unifork.planning import gpu_hours

    def hours(flops: float) -> str:
        found = gpu_hours(flops, chip, mfu)
        return "not measured" if found is None else f"{found:,.1f}"

    columns = ["run", "track", "steps", "documents M", "text B", "image B", "trained M", "EFLOP", "GPU hours"]
    table = _table("Training: documents, tokens, FLOPs", columns, names=2)
    for one in tracks:
        table.add_row(
            f"{one.variant}-{one.stage}", one.track, f"{one.steps:,}", f"{one.documents / 1e6:,.2f}",
            f"{one.text_tokens / 1e9:,.3f}", f"{one.image_tokens / 1e9:,.3f}",
            f"{one.trained / 1e6:,.1f}", f"{one.flops / 1e18:,.4g}", hours(one.flops),
        )  # fmt: skip
    for variant in dict.fromkeys(one.variant for one in tracks):
        mine = [one for one in tracks if one.variant == variant]
        flops = sum(one.flops for one in mine)
        table.add_row(
            variant, "all", f"{sum(one.steps for one in mine):,}", f"{sum(one.documents for one in mine) / 1e6:,.2f}",
            f"{sum(one.text_tokens for one in mine) / 1e9:,.3f}",
            f"{sum(one.image_tokens for one in mine) / 1e9:,.3f}", "", f"{flops / 1e18:,.4g}", hours(flops),
        )  # fmt: skip
    return table


def _mixtures(tracks: "list[TrackPlan]") -> "Table":
    columns = ["stage", "data set", "task", "template", "documents M", "text", "image", "passes"]
    table = _table("Mixtures: an average document, and how often a set is read", columns, names=4)
    seen = set()
    for one in tracks:
        for part in one.entries if (one.stage, one.track) not in seen else ():
            entry, passes = part.entry, "unknown" if part.passes is None else f"{part.passes:.2f}"
            table.add_row(
                one.stage, entry.dataset, entry.task, entry.template, f"{part.documents / 1e6:,.2f}",
                f"{part.length.text:.0f}", f"{part.length.image}", passes,
            )  # fmt: skip
        seen.add((one.stage, one.track))
    return table


def _disk(disk: "DiskPlan") -> "Table":
    table = _table(f"Disk, GB; codes of a picture are {disk.picture:,} bytes", ["what", "one", "kept", "all"])
    for folder, size in disk.codes.items():
        table.add_row(f"data/codes/{folder}", "", "", "unknown" if size is None else f"{size / 1e9:,.2f}")
    for run, (size, kept) in disk.checkpoints.items():
        table.add_row(f"runs/{run}", f"{size / 1e9:,.2f}", str(kept), f"{size * kept / 1e9:,.2f}")
    return table


def _notes(assumed: "Assumptions", chip: str | None, mfu: float | None) -> str:
    from unifork.planning import PEAK_TFLOPS

    hours = "not measured; --chip and --mfu give an estimate"
    if chip and mfu:
        hours = (
            f"FLOPs / ({mfu:g} of {PEAK_TFLOPS[chip]:g} TFLOP/s, the dense bfloat16 peak of {chip}); not measured here"
        )
    return "\n".join(
        [
            f"Assumed: {assumed.caption_tokens} tokens a caption, {assumed.dialogue_tokens} a dialogue "
            f"({assumed.answer_share:.0%} of them learned), {assumed.characters_per_token} characters a token of a "
            f"template's frame; no document is longer than the context.",
            "FLOPs: per token and matrix of W weights 2W forward, 2W backward where it learns or lies behind something "
            "that does, 2W where it learns itself; causal attention; the vocabulary at learned tokens; the image head "
            "with all its depths at learned positions. Padding and recomputation are not in it.",
            "Parameters: tied matrices once; as the paper counts: with the published, unfolded head (section 4.1).",
            "Disk: codes without texts and compression, checkpoints in float32 with AdamW's two moments.",
            f"GPU hours: {hours}.",
        ]
    )

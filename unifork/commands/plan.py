"""`unifork plan`: what an experiment will cost, as tables, before anything runs."""

from collections.abc import Iterable, Sequence
from itertools import accumulate, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from unifork.config import Experiment
    from unifork.planning import EntryPlan, TrackPlan

PARAMS = "params.yaml"
WIDTH = 120
"""Columns where the output is not a terminal."""
SCALES = "kMGTPEZ"
NOTES = Path(__file__).with_name("plan.txt")
"""What stands below the tables."""


def plan(
    experiment: Annotated[str, typer.Argument(help="experiment of experiments/, or a YAML file")] = PARAMS,
    chip: Annotated[str | None, typer.Option(help="GPU, for the hours: a100, h100, h100-pcie, h200, ...")] = None,
    mfu: Annotated[float | None, typer.Option(min=0.01, max=1.0, help="share of its peak that is reached")] = None,
    caption_tokens: Annotated[int, typer.Option(min=1, help="assumed tokens of a caption")] = 40,
    dialogue_tokens: Annotated[int, typer.Option(min=1, help="assumed tokens of a dialogue")] = 150,
    text_tokens: Annotated[int, typer.Option(min=1, help="assumed tokens of a plain text")] = 500,
    answer_share: Annotated[float, typer.Option(min=0.0, max=1.0, help="assumed supervised share of a dialogue")] = 0.5,
) -> None:
    """Print parameters, documents, tokens, FLOPs, disk and GPU hours of every stage; nothing is run."""
    from unifork import planning
    from unifork.config import Experiment, load, load_card
    from unifork.experiments import resolve
    from unifork.training.flops import PEAK_TFLOPS

    named = Path(experiment)
    params = load(Experiment, named) if named.suffix == ".yaml" else resolve(experiment)
    assumed = planning.Assumptions(
        caption_tokens=caption_tokens,
        dialogue_tokens=dialogue_tokens,
        text_tokens=text_tokens,
        answer_share=answer_share,
    )
    planning.gpu_hours(0.0, chip, mfu)
    models = {name: planning.meta_model(params, variant) for name, variant in params.variants.items()}
    cards = {name: load_card(name) for name in params.datasets}
    tracks = {name: list(planning.track_plans(params, cards, name, models[name], assumed)) for name in models}
    counts = {name: planning.parameter_counts(model.config) for name, model in models.items()}
    names = dict.fromkeys(name for counted in counts.values() for name in counted)
    rows = [[name, *(amount(counted.get(name)) for counted in counts.values())] for name in names]
    _table("Parameters", ["", *counts], rows)
    columns = ["run", "track", "steps", "documents", "text", "image", "trained", "FLOPs", "GPU time"]
    rows = [row for name in tracks for row in _training(name, tracks[name], chip, mfu)]
    _table("Training: documents, tokens, FLOPs", columns, rows, names=2)
    columns = ["stage", "data set", "task", "template", "documents", "text", "image", "passes"]
    everything = [track for some in tracks.values() for track in some]
    mixtures = {(track.stage, track.track): track for track in everything}
    rows = [_mixture(track.stage, part) for track in mixtures.values() for part in track.entries]
    _table("Mixtures: an average document, and how often a set is read", columns, rows, names=4)
    sizes = {f"data/codes/{name}": size for name, size in planning.code_bytes(params, cards).items()}
    sizes |= {f"data/prepared/{name}": size for name, size in planning.prepared_bytes(params, everything).items()}
    disk = [[name, "", "", amount(size, "B") or "unknown"] for name, size in sizes.items()]
    for key, run in params.runs.items():
        its = [track for track in tracks[run.variant] if track.stage == run.stage]
        size, kept = planning.checkpoint_bytes(models[run.variant], its), params.stages[run.stage].keep_checkpoints
        disk.append([f"runs/{key}", amount(size, "B"), str(kept), amount(size * kept, "B")])
    title = f"Disk; codes of an image are {planning.image_bytes(params):,} bytes"
    _table(title, ["what", "one", "kept", "all"], disk)
    time = "not measured; --chip and --mfu give an estimate"
    if chip and mfu:
        peak = f"{PEAK_TFLOPS[chip]:g} TFLOP/s, the dense bfloat16 peak of {chip}"
        time = f"of one GPU, FLOPs / ({mfu:g} of {peak}); not measured here"
    print(NOTES.read_text().format(**assumed.model_dump(), frame=planning.CHARACTERS_PER_TOKEN, time=time), end="")


def differences(experiment: "Experiment") -> None:
    """Print what differs between the variants of an experiment, and what does not; nothing for a single one."""
    from unifork.config import load_card
    from unifork.planning import Assumptions, meta_model, variant_facts

    firsts = {group: next(iter(seeds.values())) for group, seeds in experiment.groups.items()}
    if len(firsts) < 2:
        return
    models = {name: meta_model(experiment, experiment.variants[name]) for name in firsts.values()}
    cards = {name: load_card(name) for name in experiment.datasets}
    facts = [variant_facts(experiment, cards, name, model, Assumptions()) for name, model in models.items()]
    rows = {
        row: [cell if isinstance(cell, str) else amount(cell) for cell in (fact.get(row, "-") for fact in facts)]
        for row in dict.fromkeys(row for fact in facts for row in fact)
    }
    different = {row: cells for row, cells in rows.items() if len({*cells}) > 1}
    left = max(map(len, different), default=0)
    widths = [3 + max(map(len, column)) for column in zip(firsts, *different.values(), strict=True)]
    start = 0
    while start < len(firsts):  # as many variants in a table as have room
        room = takewhile(lambda total: total <= WIDTH - left, accumulate(widths[start:]))
        some = slice(start, start + max(1, len([*room])))
        rows_shown = ([row, *cells[some]] for row, cells in different.items())
        _table("What differs between the variants", ["", *[*firsts][some]], rows_shown)
        start = some.stop
    seeds = ", ".join(map(str, experiment.seeds or [experiment.training_seed]))
    same = (f"{row} {cells[0]}" for row, cells in rows.items() if row not in different)
    print(f"The same in all: {'; '.join(same)}; training seeds {seeds}; order of documents")


def amount(number: float | None, unit: str = "") -> str:
    """Four digits with a scale, as `806.9 M`, `1.211 B` or `176.7 EFLOP`; nothing for None."""
    if number is None:
        return ""
    power = 0
    while number >= 999.95 and power < len(SCALES):
        number, power = number / 1000, power + 1
    scale = f"{' ' if power or unit else ''}{('', *SCALES)[power]}{unit}"
    digits = f"{number:#.4g}" if power else f"{number:.0f}"
    return digits + (scale if unit else scale.replace("G", "B"))


def _mixture(stage: str, part: "EntryPlan") -> list[str]:
    """A row of the table of mixtures."""
    entry, passes = part.entry, "unknown" if part.passes is None else f"{part.passes:.2f}"
    length = (amount(part.documents), str(part.length.text), str(part.length.image))
    return [stage, entry.dataset, entry.task, entry.template, *length, passes]


def _training(variant: str, tracks: "list[TrackPlan]", chip: str | None, mfu: float | None) -> Iterable[list[str]]:
    """A row for each track, and one for all of them."""
    from unifork.planning import gpu_hours, totals

    groups = {(f"{variant}-{track.stage}", track.track): [track] for track in tracks}
    for names, some in (groups | {(variant, "all"): tracks}).items():
        cost = totals(some)
        hours = gpu_hours(cost["FLOPs"], chip, mfu)
        time = "not measured" if hours is None else f"{hours:,.1f} h" if hours >= 0.1 else f"{hours * 3600:.2g} s"
        seen = (amount(cost[what]) for what in ("documents", "text tokens", "image tokens"))
        trained = amount(some[0].trained) if len(some) == 1 else ""
        yield [*names, f"{cost['steps']:,}", *seen, trained, amount(cost["FLOPs"], "FLOP"), time]


def _table(title: str, columns: list[str], rows: Iterable[Sequence[str]], names: int = 1) -> None:
    """Print a table whose first columns are names, all others numbers."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < names else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=console.width if console.is_terminal else WIDTH).print(table)

"""`unifork study`: runs of many variants and seeds recorded as small files, and every table and figure from these."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Record the runs of a study, and make its tables and figures.")
Folder = Annotated[Path, typer.Argument(help="folder of the study, for example study")]


@app.command(epilog="Example: unifork study record study")
def record(
    folder: Folder,
    again: Annotated[bool, typer.Option("--again", help="write files anew that are there already")] = False,
) -> None:
    """Write a small file for each finished run of params.yaml; those that are not finished are named."""
    from unifork.config import Experiment, load
    from unifork.layout import Layout
    from unifork.report.study_record import record as write

    for name, what in write(load(Experiment, Layout().params), Layout(), folder, again).items():
        print(f"{name}: {what}")


@app.command(epilog="Example: unifork study grid study --out study/grid.png")
def grid(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="PNG; FOLDER/grid.png is shown by `unifork study show`")],
    seed: Annotated[int, typer.Option(min=0, help="training seed")] = 0,
) -> None:
    """Show what all variants drew for the same prompts, from answers/; nothing is generated."""
    from unifork.layout import Layout
    from unifork.report.study import read_study
    from unifork.report.study_record import grid as draw

    study = read_study(folder)
    print(f"{out}: {draw(study, Layout(), seed, out)} of {len(study.variants)} variants")


@app.command(epilog="Example: unifork study show study --out study/shown --reference shared")
def show(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="folder for tables.md, scores.csv, figures and index.html")],
    reference: Annotated[list[str] | None, typer.Option(help="variant that is subtracted; may be repeated")] = None,
) -> None:
    """Write every table and figure from the files of FOLDER alone: no models, seconds."""
    from unifork.report.study import judged, read_results
    from unifork.report.study_page import write

    results = read_results(folder, tuple(reference or ()))
    for path in write(results, folder, out):
        print(path)
    for hypothesis, row, verdict in judged(results):
        print(f"{hypothesis.id}: {verdict} ({row.runs} seeds): {hypothesis.says}")

"""This project's numbers beside those of the official code: `python -m benchmarks.parity FOLDER`."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.parity.run import verdicts, write
from unifork.errors import UniForkError

WIDTH = 160
"""Columns of the table where nobody looks at a terminal."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def parity(
    folder: Annotated[Path, typer.Argument(help="reference numbers, for example tests/fixtures/official_tiny")],
    out: Annotated[Path | None, typer.Option(help="folder for the tensors computed here")] = None,
) -> None:
    """Compare every tensor of a fixture folder; exit with 1 if any differs."""
    torch.set_num_threads(1)
    found = list(verdicts(folder))
    table = Table("item", "tensor", "max difference", "tolerance", "verdict")
    for column in table.columns:
        column.overflow = "fold"
    for verdict in found:
        compared = verdict.comparison
        numbers = (compared.difference, compared.allowed) if compared else (escape(verdict.error), "")
        table.add_row(verdict.item, verdict.tensor, *numbers, "equal" if verdict.passed else "[red]DIFFERENT[/red]")
    console = Console()
    Console(width=console.width if console.is_terminal else WIDTH).print(table)
    failed = [verdict for verdict in found if not verdict.passed]
    if out:
        for path in write([verdict.comparison for verdict in found if verdict.comparison], folder, out):
            print(path)
    print(f"{len(found) - len(failed)} of {len(found)} agree")
    raise typer.Exit(1 if failed or not found else 0)


if __name__ == "__main__":
    try:
        app(prog_name="python -m benchmarks.parity")
    except UniForkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

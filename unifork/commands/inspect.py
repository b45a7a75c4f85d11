"""`unifork inspect`: what a training step really reads."""

from pathlib import Path
from typing import Annotated

import typer


def inspect(
    stage: Annotated[str, typer.Option(help="stage of the experiment")] = "s2-sft",
    step: Annotated[int, typer.Option(min=0, help="step of each track")] = 0,
    variant: Annotated[str, typer.Option(help="variant of the experiment")] = "unifork",
    documents: Annotated[int, typer.Option(min=0, help="documents to show")] = 4,
) -> None:
    """Print a packed batch as people read it: documents, supervised tokens, shares of the loss, routes."""
    from rich.console import Console

    from unifork import inspection

    console = Console(soft_wrap=True)
    marks = not console.is_terminal or console.no_color
    for number, text in enumerate(inspection.inspect(Path(), variant, stage, step, documents, marks)):
        if number:
            console.print()
        console.print(text, end="")

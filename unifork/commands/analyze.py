"""`unifork analyze`: what the papers look at inside a model."""

from pathlib import Path
from typing import Annotated

import typer

from unifork.commands.infer import Device, Dtype, lines
from unifork.errors import ConfigError


def analyze(
    kind: Annotated[str, typer.Argument(help="alignment, conflict or entropy")],
    model: Annotated[Path, typer.Argument(help="model directory, for example models/unifork-s3")],
    out: Annotated[Path, typer.Option(help="folder for KIND.json and KIND.svg")],
    prompts: Annotated[Path | None, typer.Option(help="alignment: file with a prompt in each line")] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="alignment: texts of a benchmark's items, data/evals/NAME")
    ] = None,
    held_out: Annotated[bool, typer.Option(help="alignment: captions of held-out rows of the experiment here")] = False,
    run: Annotated[str | None, typer.Option(help="whose documents are read; by default the model's own name")] = None,
    untrained: Annotated[Path | None, typer.Option(help="alignment: model directory of a control")] = None,
    pairs: Annotated[int, typer.Option(min=1, help="prompts, or documents of each kind")] = 500,
    choose: Annotated[list[str] | None, typer.Option(help="KEY=VALUE of an experiment's `analyses`, often")] = None,
    batch: Annotated[int, typer.Option(min=1, help="documents of one call")] = 64,
    device: Device = None,
    dtype: Dtype = "float32",
) -> None:
    """Alignment of images and texts by layer, gradient conflict, or conditional entropy of tokens."""
    from unifork.analysis.kinds import analyze as analyzed
    from unifork.analysis.runs import RunDocuments
    from unifork.config import Analysis, parse
    from unifork.evaluation.items import questions
    from unifork.layout import Layout
    from unifork.library import Model

    given = dict(pair.partition("=")[::2] for pair in choose or [])
    choices = parse(Analysis, {"pairs": pairs, "batch": batch, "prompts": benchmark, **given}, "--choose")
    if kind == "alignment" and (prompts, benchmark, held_out or None).count(None) != 2:
        raise ConfigError("whose alignment: give either --prompts FILE, --benchmark NAME or --held-out")
    texts = lines(prompts) if prompts else questions(Layout().items(benchmark)) if benchmark else []
    loaded = Model.load(model, device, dtype)
    control = Model.load(untrained, device, dtype) if untrained else None
    analyzed(kind, RunDocuments(run or model.name, loaded, choices), out, texts, control)
    print(out / f"{kind}.svg")

"""`unifork`: the commands for people. What programs run is in `pipelines/`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from unifork.commands import model as model_group
from unifork.commands import tokenizer
from unifork.commands.inspect import inspect
from unifork.commands.plan import plan
from unifork.commands.publish import fetch, publish, takedown
from unifork.commands.score import answers_app
from unifork.commands.score import app as score_app
from unifork.commands.status import status
from unifork.commands.verify import verify
from unifork.errors import UniForkError
from unifork.layout import MODEL_IMAGE_TOKENIZER

# Heavy imports stand inside the commands: `unifork --help` must not wait for torch.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(model_group.app, name="model")
app.add_typer(score_app, name="score")
app.add_typer(answers_app, name="answers")
app.command()(inspect)
app.command(epilog="Example: unifork plan paper --chip h100 --mfu 0.4")(plan)
app.command(epilog="Example: unifork publish shapes --to hf://NAME/shapes-codes")(publish)
app.command()(fetch)
app.command(epilog="Example: unifork takedown laion_en takedown.txt")(takedown)
app.command()(status)
app.command(epilog="Example: unifork verify data/codes --repair")(verify)

ModelDirectory = Annotated[Path, typer.Option(help="model directory, for example models/unifork-s3")]


@app.command(epilog="Example: unifork use demo && dvc repro")
def use(
    name: Annotated[str | None, typer.Argument(help="experiment, a file of experiments/; none lists them")] = None,
    force: Annotated[bool, typer.Option(help="overwrite edits made by hand")] = False,
) -> None:
    """Write params.yaml from experiments/NAME.yaml; `dvc repro` then runs it."""
    from unifork import experiments
    from unifork.config import load_card, load_eval

    if name is None:
        for experiment_name, about in experiments.names().items():
            print(f"{experiment_name:16} {about}")
        return
    experiment = experiments.use(name, force)
    for dataset, taken in experiment.datasets.items():
        if taken.follows and not Path(taken.follows.source).exists():
            access = load_card(dataset).source.options.get("access", "see its card")
            print(f"{taken.follows.source} is not there yet, for {dataset}: {access}")
    for benchmark, use in experiment.benchmarks.items():
        if (card := load_eval(benchmark)).items.archive and use.follows != card.items.archive:
            print(f"{card.items.archive} is not there yet, for {benchmark}: {card.items.access}")
    print(f"params.yaml: {name}, data sets {', '.join(experiment.datasets)}, runs {', '.join(experiment.runs)}")


@app.command(epilog="Example: unifork generate --model models/unifork-s3 --prompt 'a red circle' --out drawn -n 4")
def generate(
    model: ModelDirectory,
    prompt: Annotated[str, typer.Option(help="what the images show")],
    out: Annotated[Path, typer.Option(help="folder for the images")],
    cfg: Annotated[
        float | None,
        typer.Option(help="classifier-free guidance scale, 1 switches it off; the default is that of the last stage"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed of the draws")] = 0,
    n: Annotated[int, typer.Option("-n", min=1, help="number of images")] = 1,
    template: Annotated[str, typer.Option(help="prompt template of the model's last stage")] = "generate",
) -> None:
    """Draw images for a prompt, as the model's last stage draws its samples: OUT/0000.png, 0001.png, ..."""
    from unifork.config import Sampling, parse
    from unifork.inference import Engine, stage_sampling

    chosen = {"seed": seed} if cfg is None else {"seed": seed, "guidance": cfg}
    sampling = parse(Sampling, {**stage_sampling(model).model_dump(), **chosen}, "--cfg, --seed")
    codes = Engine.load(model).generate_images([prompt] * n, sampling, template)
    out.mkdir(parents=True, exist_ok=True)
    images = tokenizer.code_encoder(model / MODEL_IMAGE_TOKENIZER, "crop").decode_codes(codes)
    for number, image in enumerate(images):
        path = out / f"{number:04d}.png"
        image.save(path)
        print(path)


@app.command(epilog="Example: unifork describe --model models/unifork-s3 --image cat.png --question 'What is it?'")
def describe(
    model: ModelDirectory,
    image: Annotated[Path, typer.Option(help="image file")],
    question: Annotated[str, typer.Option(help="what to ask about it")],
    template: Annotated[str, typer.Option(help="prompt template of the model's last stage")] = "answer",
) -> None:
    """Answer a question about an image."""
    from unifork.inference import Engine

    tokenizer.check_files([image])
    codes = tokenizer.code_encoder(model / MODEL_IMAGE_TOKENIZER, "pad").encode_images([image])
    [answer] = Engine.load(model).answer_questions(codes, [question], template)
    print(answer or "(the answer is empty)")


def main() -> None:
    """Entry point: users' mistakes are one line, everything else keeps its traceback."""
    sys.path.insert(0, os.getcwd())  # as `python -m` does: cards name MODULE:OBJECT of code that lies here
    try:
        app()
    except UniForkError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

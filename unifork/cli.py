"""`unifork`: the commands for people. What programs run is in `pipelines/`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unifork.commands import model as model_group
from unifork.commands import study, tokenizer
from unifork.commands.analyze import analyze
from unifork.commands.doctor import doctor
from unifork.commands.infer import describe, generate, serve
from unifork.commands.inspect import inspect
from unifork.commands.new import new
from unifork.commands.plan import differences, plan
from unifork.commands.publish import fetch, publish, takedown
from unifork.commands.score import answers_app
from unifork.commands.score import app as score_app
from unifork.commands.status import record, status
from unifork.commands.verify import verify
from unifork.errors import ConfigError, UniForkError

if TYPE_CHECKING:
    from unifork.experiments import Choice

# Heavy imports stand inside the commands: `unifork --help` must not wait for torch.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(model_group.app, name="model")
app.command(epilog="Example: unifork generate --model models/unifork-s3 --prompt 'a red circle' --out drawn")(generate)
app.command(epilog="Example: unifork describe --model models/unifork-s3 --image cats --question 'What is it?'")(
    describe
)
app.command(epilog="Example: unifork serve --model models/unifork-s3")(serve)
app.add_typer(score_app, name="score")
app.add_typer(answers_app, name="answers")
app.add_typer(study.app, name="study")
app.command()(inspect)
app.command(epilog="Example: unifork new birds --from archives/birds")(new)
app.command(epilog="Example: unifork analyze alignment models/unifork-s3 --held-out --out found")(analyze)
app.command(epilog="Example: unifork plan paper --chip h100 --mfu 0.4")(plan)
app.command(epilog="Example: unifork publish shapes --to hf://NAME/shapes-codes")(publish)
app.command()(fetch)
app.command(epilog="Example: unifork takedown laion_en takedown.txt")(takedown)
app.command()(status)
app.command(epilog="Example: unifork record unifork-s3")(record)
app.command()(doctor)
app.command(epilog="Example: unifork verify data/codes --repair")(verify)


@app.command(epilog="Example: unifork use demo && dvc repro")
def use(
    name: Annotated[str | None, typer.Argument(help="experiment, a file of experiments/; none lists them")] = None,
    force: Annotated[bool, typer.Option(help="overwrite edits made by hand")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="training seed instead of the experiment's")] = None,
    seeds: Annotated[str, typer.Option(help="several training seeds, as 0,1,2; they stand in the names of runs")] = "",
    variants: Annotated[str, typer.Option(help="variants that are kept, as a,b; none: all")] = "",
) -> None:
    """Write params.yaml from experiments/NAME.yaml; `dvc repro` then runs it."""
    from unifork import experiments
    from unifork.config import load_card, load_eval

    if name is None:
        for experiment_name, about in experiments.names().items():
            print(f"{experiment_name:16} {about}")
        return
    experiment = experiments.use(name, force, _choice(seed, seeds, variants))
    for dataset, taken in experiment.datasets.items():
        if taken.follows and not Path(taken.follows.source).exists():
            access = load_card(dataset).source.options.get("access", "see its card")
            print(f"{taken.follows.source} is not there yet, for {dataset}: {access}")
    for benchmark, use in experiment.benchmarks.items():
        if (card := load_eval(benchmark)).items.archive and use.follows != card.items.archive:
            print(f"{card.items.archive} is not there yet, for {benchmark}: {card.items.access}")
    differences(experiment)
    print(f"params.yaml: {name}, data sets {', '.join(experiment.datasets)}, runs {', '.join(experiment.runs)}")


def _choice(seed: int | None, seeds: str, variants: str) -> "Choice":
    from unifork.experiments import Choice

    listed = [text for text in seeds.replace(" ", "").split(",") if text]
    if not all(map(str.isdecimal, listed)) or (listed and seed is not None):
        raise ConfigError(f"--seeds {seeds}: write 0,1,2, or a single --seed")
    kept = tuple(text for text in variants.replace(" ", "").split(",") if text)
    return Choice(tuple(map(int, listed)) if seed is None else (seed,), seed is not None, kept)


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

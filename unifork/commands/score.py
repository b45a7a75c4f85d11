"""`unifork score` and `unifork answers`: answers in any official layout, scored without a model, and written back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from unifork.commands.infer import Device

if TYPE_CHECKING:
    from unifork.config import EvalCard
    from unifork.evaluation.items import Item


class SuiteOrCommand(TyperGroup):
    """Commands of which the one called SUITE is run with any other word."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["SUITE", *args])


app = typer.Typer(cls=SuiteOrCommand, no_args_is_help=True, help="Score answers by the rules of a benchmark.")
answers_app = typer.Typer(no_args_is_help=True, help="Answers of a model.")
Suite = Annotated[str, typer.Argument(help="benchmark, a card of datasets/evals")]
Archive = Annotated[Path | None, typer.Option(help="folder of the official files, if it is not the card's")]


def _all_items(name: str, archive: Path | None) -> "tuple[EvalCard, list[Item]]":
    """A card and all its items: from the official files, or from the table where these are not here."""
    from unifork.config import load_eval
    from unifork.errors import DataError
    from unifork.evaluation.archive import Archive as Files
    from unifork.evaluation.items import read_items
    from unifork.evaluation.suites import suite_of
    from unifork.layout import Layout
    from unifork.shards.manifest import MANIFEST

    card = load_eval(name)
    suite, options = suite_of(card)
    files, table = Files(card, options, archive), Layout().items(name)
    if (files.absent or not card.items.archive) and (table / MANIFEST).exists():
        return card, read_items(table)
    if files.absent:
        raise DataError(f"{name}: not here: {files.absent}")
    files.check()
    return card, suite.items_of(files, options, 0)


@app.command("SUITE", epilog="Example: unifork score pope --answers llava_pope.jsonl --rule official")
def score(
    suite: Suite,
    answers: Annotated[Path, typer.Option(help="file of answers in any supported format, or a folder of answers/")],
    rule: Annotated[list[str] | None, typer.Option(help="rule; the default are those of its card")] = None,
    archive: Archive = None,
    out: Annotated[Path | None, typer.Option(help="folder for metrics.json and verdicts.jsonl")] = None,
    partial: Annotated[bool, typer.Option(help="score what has an answer; all scores are marked")] = False,
) -> None:
    """Score answers in a file: no model, no network."""
    from unifork.evaluation.answers import join, origin_of, read_answers
    from unifork.evaluation.items import selected
    from unifork.evaluation.scoring import score_answers, write_scores
    from unifork.evaluation.suites import suite_of

    card, items = _all_items(suite, archive)
    if rule:
        card = card.model_copy(update={"score": card.score.model_copy(update={"rules": tuple(rule)})})
        suite_of(card)
    chosen = selected(card, items)
    found = join(card, items, read_answers(answers), str(answers), partial)
    scores, lines = score_answers(card, chosen, found, origin_of(answers))
    secret = f"{suite}: its truths are not public; `unifork answers export` writes a submission"
    print("\n".join(map(str, scores)) or secret)
    if out:
        write_scores(out, card, scores, lines)


@app.command(epilog="Examples: unifork score compare mot unifork; unifork score compare scores/a/pope scores/b/pope")
def compare(
    first: Annotated[str, typer.Argument(help="variant, or folder with verdicts or of a text benchmark's answers")],
    second: Annotated[str, typer.Argument(help="another, of the same items")],
    rule: Annotated[str | None, typer.Option(help="whose verdicts are compared; default: the card's first")] = None,
) -> None:
    """What one model scores above another on the same items, or a variant above another with the same seeds."""
    from unifork.config import Experiment, load
    from unifork.errors import one_of
    from unifork.evaluation import comparison
    from unifork.evaluation.statistics import holm
    from unifork.layout import Layout
    from unifork.report.reading import scores_by_seed

    if all(Path(place).is_dir() for place in (first, second)):
        for name, a, b, (value, error, p) in comparison.compare(Path(first), Path(second), rule):
            print(f"{name}: {a:.6g} - {b:.6g} = {value:.6g} +- {error:.4g} (p {p:.4f})")
        return
    params, found = load(Experiment, Layout().params), dict[str, comparison.Paired]()
    for name in (first, second):
        one_of("folder or variant", name, params.groups, "params.yaml: variants")
    for benchmark in params.all_benchmarks:
        sides = (scores_by_seed(Layout(), params.groups[name], benchmark) for name in (first, second))
        above = comparison.compare_seeds(*sides)
        found |= {f"{benchmark} {' '.join(key)}": paired for key, paired in above.items()}
    for (name, paired), p in zip(found.items(), holm([each.p for each in found.values()]), strict=True):
        print(f"{name}: {paired} (p {paired.p:.4f}, exact {paired.p_exact:.4f}, corrected {p:.4f})")


@app.command(epilog="Example: unifork score band benchmarks/demo_scores.json")
def band(
    runs: Annotated[Path | None, typer.Argument(help="file of earlier runs; none: that of the experiment")] = None,
    record: Annotated[bool, typer.Option(help="add this run to the file instead")] = False,
) -> None:
    """Scores beside a 95 % prediction interval for one more run: headlines, and what lies outside."""
    from unifork.config import Experiment, load
    from unifork.evaluation.comparison import placed, read_runs
    from unifork.layout import Layout
    from unifork.report.band import is_headline, this_run
    from unifork.shards.manifest import write_json

    params, layout = load(Experiment, Layout().params), Layout()
    if (path := runs or (Path(params.band) if params.band else None)) is None:
        return
    earlier = [] if record and not path.exists() else read_runs(path)
    rows = {name: this_run(params, name, layout) for name in params.variants}
    if record:
        write_json(path, [row.model_dump(mode="json") for row in (*earlier, *rows.values())])
        print(f"{path}: {len(earlier)} runs and {', '.join(rows)}")
        return
    for name, row in rows.items():
        found = placed(earlier, row, name)
        print(*(score for score in found if not score.inside or is_headline(score.name, params, layout)), sep="\n")
        inside = sum(score.inside for score in found)
        print(f"{name}: {inside} of {len(found)} scores as usual, which is where 95 % of single runs end ({path})")


@answers_app.command(epilog="Example: unifork answers export vqav2_test --format vqa --out submission")
def export(
    suite: Suite,
    format: Annotated[str, typer.Option(help="llava, mme, vqa, gqa, seed, geneval, mjhq, dpg, or MODULE:OBJECT")],
    answers: Annotated[Path, typer.Option(help="folder below answers/, or a file in another format")],
    out: Annotated[Path, typer.Option(help="folder for the files")],
    archive: Archive = None,
) -> None:
    """Write answers in an official layout."""
    from unifork.errors import ConfigError, writing
    from unifork.evaluation.answers import EXPORTS, join, read_answers

    write = EXPORTS.find(format, "--format")
    card, items = _all_items(suite, archive)
    found = join(card, items, read_answers(answers), str(answers))
    try:
        files = write(card, [(item, found.get(item.id)) for item in items])
    except (LookupError, ValueError) as error:
        raise ConfigError(f"--format {format}: not of {suite}: {type(error).__name__}: {error}") from None
    for name, text in files.items():
        with writing(out / name):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogateescape"))
    print(f"{out}: written")


@answers_app.command(epilog="Example: unifork answers examine geneval --images outputs --out found/geneval")
def examine(
    suite: Suite,
    images: Annotated[Path | None, typer.Option(help="folder, also in official layout; none: the reference")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for what is found; none: beside the images")] = None,
    archive: Archive = None,
    device: Device = None,
) -> None:
    """Have a benchmark's networks look at images; what they find is scored by `unifork score`."""
    from unifork.cluster import run_jobs
    from unifork.devices import chosen_device
    from unifork.errors import DataError
    from unifork.evaluation.examining import Examiner, examine_job, write_summary
    from unifork.evaluation.items import selected
    from unifork.evaluation.names import ABSENT
    from unifork.layout import Layout

    card, items = _all_items(suite, archive)
    beside = images.with_name(f"{images.name}.found") if images else Layout().items(f"{suite}-reference")
    job, worker = examine_job(card, selected(card, items), images, out or beside, archive)
    if absent := job.lineage.get(ABSENT):
        raise DataError(f"{suite}: not here: {absent}")
    (manifest,) = run_jobs([job], Examiner, *worker, str(chosen_device(device, "--device")))
    print(manifest.summary(job.folder))
    if images is None:
        print(*write_summary(card, job.folder), sep="\n")


@answers_app.command(epilog="Example: unifork answers canary geneval")
def canary(suite: Suite, device: Device = None) -> None:
    """Record what a benchmark's networks give for drawn images, where they are sure to be the right ones."""
    from unifork.config import load_eval
    from unifork.devices import chosen_device
    from unifork.evaluation.examining import load_networks

    for name, network in load_networks(load_eval(suite), str(chosen_device(device, "--device")), trusted=True).items():
        print(f"{name}: {network.hash}")

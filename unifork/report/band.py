"""This run beside earlier runs of the same recipe.

In: an experiment's folders, and a file of earlier runs where the experiment names one. Out: the run as a row of such a
file, and a table of its scores with where one more run was expected to have them.
"""

from unifork.config import EvalCard, Experiment, TextCard, load_eval, load_text
from unifork.errors import ConfigError, DataError
from unifork.evaluation.comparison import Earlier, EarlierRun, placed, read_runs
from unifork.evaluation.scoring import METRICS
from unifork.evaluation.statistics import Score
from unifork.layout import Layout
from unifork.report.reading import read_json, read_scores
from unifork.report.surroundings import machine, surroundings
from unifork.report.tables import Judged, Table, table
from unifork.training.checkpoint import FINISHED, Finished


def card_of(name: str, experiment: Experiment, layout: Layout) -> EvalCard | TextCard:
    """The card of a benchmark."""
    return load_text(name, layout.evals) if name in experiment.text_evals else load_eval(name, layout.evals)


def is_headline(name: str, experiment: Experiment, layout: Layout) -> bool:
    """Whether `<benchmark> <split> <name>` is one of its card's headlines."""
    benchmark, _, score = name.split(" ", 2)
    return score in card_of(benchmark, experiment, layout).show.headlines


def this_run(experiment: Experiment, name: str, layout: Layout) -> EarlierRun:
    """The scores of a variant by its cards' first rules. Raises DataError where they are not there yet."""
    variant, scores = experiment.variants[name], first_scores(experiment, name, layout)
    found = {
        key: Earlier(value=score.value, error=score.standard_error, items=score.items) for key, score in scores.items()
    }
    runs = [read_json(layout.run(f"{name}-{stage}") / FINISHED, Finished) for stage in variant.stages]
    seconds = sum(run["seconds"] for run in runs if run)
    return EarlierRun(seed=variant.seed, seconds=seconds, machine=machine(surroundings(layout.root)), scores=found)


def first_scores(experiment: Experiment, name: str, layout: Layout) -> dict[str, Score]:
    """The scores of a variant by their cards' first rules, by `<benchmark> <split> <name>`.

    Raises DataError where they are not there yet.
    """
    found = dict[str, Score]()
    for benchmark in experiment.all_benchmarks:
        card, folder = card_of(benchmark, experiment, layout), layout.scores(name) / benchmark
        if not (scores := read_scores(folder / METRICS)):
            raise DataError(f"{folder}: not there yet; `dvc repro` makes it")
        for key, score in scores.items():
            if isinstance(card, TextCard) or score.rule == card.score.rules[0]:
                found[" ".join((benchmark, *key))] = score
    return found


def band(experiment: Experiment, layout: Layout) -> Table | None:
    """Headlines and what is outside, by variant, or why there is none; None where the experiment names no file."""
    if experiment.band is None:
        return None
    rows, counts = [], []
    try:
        earlier = read_runs(layout.root / experiment.band)
        for name in experiment.variants:
            scores = placed(earlier, this_run(experiment, name, layout), name)
            counts.append(f"{sum(score.inside for score in scores)} of {len(scores)} scores of {name} as usual")
            for score in scores:
                if not score.inside or is_headline(score.name, experiment, layout):
                    usual = "{:.2f} to {:.2f}".format(*score.usual)
                    row = {"Score": f"{name}: {score.name}", "This run": f"{score.value:.3f}", "Usual": usual}
                    rows.append(row | {"As usual": Judged(score.inside, None)})
    except (ConfigError, DataError) as fault:
        return table(f"Beside earlier runs ({fault})", [])
    return table(f"Beside {len(earlier)} earlier runs: {'; '.join(counts)}", rows)

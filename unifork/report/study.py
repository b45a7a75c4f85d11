"""A study: many variants, each with several training seeds, as small files that are kept beside the code.

In: a folder with `study.json`, a file for each run and perhaps `hypotheses.yaml`. Out: every number of a run by a flat
name, what variants give over seeds, differences that are paired by seed, and what became of the hypotheses. No model
and no torch are needed.

Names of quantities, as `quantities` gives them and hypotheses use them:

- `<benchmark> <split> <score>`: a score by its card's first rule, `shapes-generation seen overall`.
- `loss <stage> <part> text` or `... image`: of held-out rows after a stage; `... image depth 0` at a depth of the code.
- `alignment <stage> <task> <layer>`: layer 0 is the input of the first.
- `conflict <stage> <matrix> <layer>`: of the matrices `down_proj` and the like, in layers that share them.
- Both also with `mean`, `last` and `highest` of the layers instead of a number, and `fall`, which is highest - last.
- `parameters`, and `seconds <stage>` of training.
"""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BeforeValidator

from unifork.config import StrictModel, parse, read_yaml
from unifork.errors import ConfigError, DataError, one_of
from unifork.evaluation.comparison import Paired, paired
from unifork.evaluation.statistics import holm, spread
from unifork.report.reading import read_json

STUDY, HYPOTHESES = "study.json", "hypotheses.yaml"
RISK = 0.05
"""Of an interval that misses; a family shares it."""
Short = Annotated[float, AfterValidator(lambda value: float(f"{value:.6g}"))]
"""A number with six digits, so that files stay small and their differences readable."""


class Scored(StrictModel):
    """A score of a run."""

    value: Short
    error: Short | None
    """Its standard error over the items alone."""
    chance: Short


class Curve(StrictModel):
    """Alignment of one task by layer, first its input; 95 % of chance lies from low to high."""

    score: tuple[Short, ...]
    standard_error: tuple[Short, ...]
    chance: tuple[Short, ...]
    chance_low: tuple[Short, ...]
    chance_high: tuple[Short, ...]


class Record(StrictModel):
    """One finished run, the file `<variant>-seed<N>.json`."""

    variant: str
    seed: int
    plan: str
    parameters: int
    config_hash: str
    """Of all in `params.yaml` that decides the run, but for its seed."""
    versions: dict[str, int]
    """Version constants of the code that recorded it."""
    commit: str
    machine: str
    items: dict[str, str]
    """By benchmark: hash of what was asked."""
    seconds: dict[str, Short]
    """Of training, by stage."""
    scores: dict[str, Scored]
    losses: dict[str, Short]
    """By `<stage> <part> <text or image>`."""
    alignment: dict[str, dict[str, Curve]]
    """By stage and task."""
    conflict: dict[str, dict[str, dict[int, Short]]]
    """By stage, matrix and layer."""


class StudyVariant(StrictModel):
    """A row of all tables and figures."""

    name: str
    plan: str
    fork: int | None
    """Its first layer that is split by task."""


class GridPrompt(StrictModel):
    """A column of the grid."""

    id: str
    text: str
    about: str
    """Kind and split."""


class Study(StrictModel):
    """What all runs share, the file `study.json`."""

    name: str
    data_seed: int
    variants: tuple[StudyVariant, ...]
    """In the order of the experiment."""
    benchmark: str | None
    """That of the grid, the first for which images are drawn."""
    prompts: tuple[GridPrompt, ...]


class Hypothesis(StrictModel):
    """What is expected before the runs: `first` has another value than `second`, on the side of the sign."""

    id: str
    says: str
    first: str
    second: str
    score: Annotated[tuple[str, ...], BeforeValidator(lambda score: (score,) if isinstance(score, str) else score)]
    """A quantity, or several whose mean is taken for each seed."""
    sign: Literal[">", "<", "!="]
    family: str = "primary"
    """Hypotheses that share the risk of an error."""


class Choices(StrictModel):
    """The entry `analysis` of `hypotheses.yaml`."""

    references: tuple[str, ...]
    """Variants from which all others are subtracted."""


Value = TypeVar("Value")
Values = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Quantities by variant and seed; a variant without runs has none."""


class Results(NamedTuple):
    """A folder of a study."""

    study: Study
    records: Sequence[Record]
    hypotheses: Sequence[Hypothesis]
    references: Sequence[str]
    values: Values

    @property
    def names(self) -> list[str]:
        """All quantities that some run has."""
        return list(dict.fromkeys(name for runs in self.values.values() for run in runs.values() for name in run))

    def of(self, variant: str, names: Sequence[str]) -> dict[int, float]:
        """The mean of some quantities by seed, of the runs that have them all."""
        runs = self.values[variant].items()
        return {seed: fmean(run[name] for name in names) for seed, run in runs if all(name in run for name in names)}


def curves_of(record: Record) -> dict[str, dict[str, dict[int, float]]]:
    """Alignment by `<stage> <task>` and conflict by `<stage> <matrix>`: values by layer."""
    return {
        "alignment": {of: dict(enumerate(curve.score)) for of, curve in _flat(record.alignment).items()},
        "conflict": {of: dict(sorted(layers.items())) for of, layers in _flat(record.conflict).items()},
    }


def _flat(nested: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    return {f"{stage} {of}": value for stage, found in nested.items() for of, value in found.items()}


def quantities(record: Record) -> dict[str, float]:
    """All numbers of a run by their flat names."""
    found = {name: score.value for name, score in record.scores.items()}
    found |= {f"loss {name}": value for name, value in record.losses.items()}
    for kind, curves in curves_of(record).items():
        for of, layers in curves.items():
            values = [*layers.values()]
            ends = {"mean": fmean(values), "last": values[-1], "highest": max(values), "fall": max(values) - values[-1]}
            found |= {f"{kind} {of} {place}": value for place, value in [*layers.items(), *ends.items()]}
    found |= {f"seconds {stage}": seconds for stage, seconds in record.seconds.items()}
    return found | {"parameters": float(record.parameters)}


def results_of(
    study: Study, records: Sequence[Record], place: str, entries: Sequence[object] = (), references: Sequence[str] = ()
) -> Results:
    """A study and its runs, checked: variants, items, configurations, and what hypotheses name.

    entries: of `hypotheses.yaml`. references: instead of those that it names. Raises ConfigError or DataError.
    """
    values: dict[str, dict[int, dict[str, float]]] = {variant.name: {} for variant in study.variants}
    marks = dict[str, str]()
    for record in records:
        here = f"{place}/{record.variant}-seed{record.seed}.json"
        one_of("variant", record.variant, values, f"{here}: variant")
        of_items = {f"items of {benchmark}": mark for benchmark, mark in record.items.items()}
        for what, mark in {f"config_hash of {record.variant}": record.config_hash, **of_items}.items():
            if marks.setdefault(what, mark) != mark:
                raise DataError(f"{here}: {what}: {mark}, in other runs {marks[what]}; record all of one configuration")
        values[record.variant][record.seed] = quantities(record)
    hypotheses, listed = list[Hypothesis](), list[str]()
    for number, entry in enumerate(entries):
        where = f"{place}/{HYPOTHESES}: entry {number + 1}"
        if isinstance(entry, dict) and "analysis" in entry:
            listed += parse(Choices, entry["analysis"], where, "analysis").references
        else:
            hypotheses.append(parse(Hypothesis, entry, where))
    references = references or listed or [*dict.fromkeys(each.second for each in hypotheses)] or [*values][:1]
    found = Results(study, records, hypotheses, references, values)
    for hypothesis in hypotheses:
        where = f"{place}/{HYPOTHESES}: {hypothesis.id}"
        for variant in (hypothesis.first, hypothesis.second):
            one_of("variant", variant, values, where)
        for name in hypothesis.score if records else ():
            one_of("quantity", name, found.names, where)
    for variant in references:
        one_of("variant", variant, values, f"{place}: references")
    if twice := {each.id for each in hypotheses if sum(each.id == other.id for other in hypotheses) > 1}:
        raise ConfigError(f"{place}/{HYPOTHESES}: id {min(twice)} occurs twice; each must differ")
    return found


def read_study(folder: Path) -> Study:
    """What is written in `study.json`. Raises ConfigError or DataError."""
    if (plain := read_json(folder / STUDY, dict[str, Any])) is None:
        raise DataError(f"{folder / STUDY}: no such file; `unifork study record {folder}` writes it")
    return parse(Study, plain, str(folder / STUDY))


def read_results(folder: Path, references: Sequence[str] = ()) -> Results:
    """All files of a folder. Raises ConfigError or DataError, which name the file and what is wrong there.

    references: variants that are subtracted; none: those of `hypotheses.yaml`.
    """
    study, records = read_study(folder), []
    for path in sorted(folder.glob("*-seed*.json")):
        records.append(record := parse(Record, read_json(path, dict[str, Any]), str(path)))
        if path.name != (name := f"{record.variant}-seed{record.seed}.json"):
            raise DataError(f"{path}: is of {name}; a file has the name of its run")
    entries = read_yaml(folder / HYPOTHESES) if (folder / HYPOTHESES).exists() else []
    if not isinstance(entries, list):
        raise ConfigError(f"{folder / HYPOTHESES}: {type(entries).__name__}; a list of hypotheses is expected")
    return results_of(study, records, str(folder), entries, references)


class Between(NamedTuple):
    """Two variants, paired by seed, among the comparisons of a family."""

    first: str
    runs: int
    """Seeds that both have."""
    found: Paired | None
    """`first` less the other; None below two seeds."""
    wide: tuple[float, float]
    """Interval of the difference that holds for all of the family at once in 95 % (Bonferroni)."""
    corrected: float
    """p by Student's t, corrected for the family (Holm)."""


def family(results: Results, pairs: Sequence[tuple[str, str, Sequence[str]]]) -> list[Between]:
    """Comparisons that share the risk of an error: of two variants, in the mean of some quantities.

    Those that are not measured yet count as well.
    """
    rows = []
    for first, second, names in pairs:
        ours, theirs = results.of(first, names), results.of(second, names)
        seeds = sorted(ours.keys() & theirs.keys())
        sides = [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
        above, risk = [a - b for a, b in zip(*sides, strict=True)], RISK / len(pairs)
        many = len(seeds) > 1
        wide = spread(above, risk).interval if many else (-inf, inf)
        rows.append(Between(first, len(seeds), paired(*sides) if many else None, wide, 1.0))
    corrected = holm([row.found.p if row.found else 1.0 for row in rows])
    return [row._replace(corrected=p) for row, p in zip(rows, corrected, strict=True)]


def judged(results: Results) -> list[tuple[Hypothesis, Between, str]]:
    """Every hypothesis with its difference and what became of it, in the order of the file."""
    rows = {}
    for name in {each.family for each in results.hypotheses}:
        pairs = [(each.first, each.second, each.score) for each in results.hypotheses if each.family == name]
        rows[name] = iter(family(results, pairs))
    return [(each, row := next(rows[each.family]), verdict(each, row)) for each in results.hypotheses]


def verdict(hypothesis: Hypothesis, row: Between) -> str:
    """`holds` or `contradicted` where the family's interval excludes zero on this or the other side.

    `!=` has no other side. Differences that are equal in all seeds have no spread to judge them by: not settled.
    """
    if row.found is None:
        return "not measured"
    spreads = row.found.difference.deviation > 1e-9  # more than rounding
    above, below = spreads and row.wide[0] > 0, spreads and row.wide[1] < 0
    holds, contradicted = {">": (above, below), "<": (below, above), "!=": (above or below, False)}[hypothesis.sign]
    return "holds" if holds else "contradicted" if contradicted else "not settled"

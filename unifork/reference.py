"""Reference runs: what runs of one configuration lost at the same steps, and where another lies among them.

In: an experiment and the steps of a run. Out: one small file for each run, in `histories/` of a project or of a
published model, and sentences. A loss at a step is the mean over the last tenth of the steps up to it.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from statistics import fmean
from typing import Any

from unifork.config import NOT_IN_THE_WEIGHTS, Experiment, StrictModel, fingerprint, load
from unifork.evaluation.statistics import prediction
from unifork.layout import Layout
from unifork.shards.manifest import file_sha256

LOSSES = ("text_loss", "image_loss")
FEWEST = 3
"""References from which an interval is said; of fewer the range."""
Steps = Sequence[Mapping[str, Any]]
"""All steps of a run so far."""


class Reference(StrictModel):
    """Losses of one run."""

    configuration: str
    """Hash of what the run is but for its seed."""
    run: str
    seed: int
    """Its training seed."""
    losses: dict[str, dict[str, float]]
    """By the number of steps (over all tracks): those with a single digit that is not zero, and the last."""

    @property
    def file(self) -> str:
        """Its name, which no other run has."""
        return f"{self.run}-{fingerprint(self.losses)[:8]}.json"


def configuration(experiment: Experiment, layout: Layout, key: str) -> str:
    """Hash of a run but for its seed: plan, backbone and head, its stage and those before it, rows, tokenizers.

    A tokenizer that is trained counts by its settings, one that is imported by its files.
    """
    run = experiment.runs[key]
    variant = experiment.variants[run.variant]
    stages = [experiment.stages[name] for name in variant.stages[: variant.stages.index(run.stage) + 1]]
    form: dict[str, Any] = {"mode": "json", "exclude": {**NOT_IN_THE_WEIGHTS, "seed": True}}
    plain: list[Any] = [stage.model_dump(**form) for stage in stages]
    plain += [variant.model_dump(mode="json", exclude={"stages", "seed"})]
    plain += [experiment.datasets[name].rows for name in sorted({e.dataset for stage in stages for e in stage.entries})]
    for chosen, folder, file in (
        (experiment.image_tokenizer, layout.image_tokenizer, "config.json"),
        (experiment.text_tokenizer, layout.text_tokenizer, "tokenizer.json"),
    ):
        imported = hasattr(chosen, "source") and (folder / file).exists()
        plain.append(file_sha256(folder / file) if imported else chosen.model_dump(**form))
    return fingerprint(plain)


def reference(experiment: Experiment, layout: Layout, key: str, rows: Steps) -> Reference:
    """A run as a reference for others."""
    mark, seed = configuration(experiment, layout, key), experiment.variants[experiment.runs[key].variant].seed
    losses = {str(step): losses_at(rows, step) for step in _fixed(len(rows))}
    return Reference(configuration=mark, run=key, seed=seed, losses=losses)


def _fixed(steps: int) -> list[int]:
    found = {digit * 10**power for power in range(len(str(steps))) for digit in range(1, 10)}
    return sorted({step for step in found if step <= steps} | {steps} - {0})


def losses_at(rows: Steps, step: int) -> dict[str, float]:
    """Mean losses of the last tenth of so many steps, those that were taken."""
    part = rows[step - max(1, step // 10) : step]
    found = {name: [row[name] for row in part if row.get(name) is not None] for name in LOSSES}
    return {name: round(fmean(values), 6) for name, values in found.items() if values}


def references(layout: Layout) -> list[Reference]:
    """All that are here: of the project, and those that came with fetched models. Raises ConfigError."""
    paths = chain(layout.histories.glob("*.json"), layout.model("").glob("*/histories/*.json"))
    return [load(Reference, path) for path in {path.name: path for path in sorted(paths)}.values()]


def among(found: Sequence[Reference], experiment: Experiment, layout: Layout, key: str, rows: Steps) -> list[str]:
    """Where a run lies among references of its configuration, a sentence for each loss; nothing where there are none.

    A prediction interval (95 %) stands for three and more, the range for fewer. One whose losses are equal is
    taken for the run itself.
    """
    if not found or key not in experiment.runs:
        return []
    mark = configuration(experiment, layout, key)
    here = [other.losses for other in found if other.configuration == mark]
    step = max((step for step in _fixed(len(rows)) if any(str(step) in losses for losses in here)), default=0)
    own = losses_at(rows, step)
    others = [losses[str(step)] for losses in here if losses.get(str(step), own) != own]
    values = {name: [losses[name] for losses in others if name in losses] for name in own}
    return [_sentence(name, step, own[name], values[name]) for name in own if values[name]]


def _sentence(name: str, step: int, value: float, values: Sequence[float]) -> str:
    low, high, count = min(values), max(values), len(values)
    text = f"{name.replace('_', ' ')} {value:.3f} at step {step:,}; {count} reference run{'s' * (count > 1)}"
    if count == 1:
        return f"{text} {low:.3f}"
    if count >= FEWEST:
        (low, high), text = prediction(values, FEWEST), f"{text}, 95 % of such runs"
    return f"{text} {low:.3f} to {high:.3f}: {'below' if value < low else 'above' if value > high else 'within'}"

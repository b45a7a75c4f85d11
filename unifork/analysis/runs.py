"""What an analysis reads and writes: documents of a run in, JSON and SVG out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from unifork.batch import Document
from unifork.config import Analysis, Experiment, load_experiment
from unifork.documents.mixture import CodesIdentity, MixturePart
from unifork.errors import DataError, one_of
from unifork.figures import LOOK, svg
from unifork.layout import Layout
from unifork.library import Model
from unifork.vocabulary import Task


@dataclass(frozen=True)
class RunDocuments:
    """The documents of a run's mixtures, as a model reads them; each part counts once, whatever its weight."""

    run: str
    model: Model
    choices: Analysis

    @cached_property
    def experiment(self) -> Experiment:
        """That of the working directory. Raises ConfigError where it has no such run."""
        experiment = load_experiment()
        one_of("run", self.run, experiment.runs, "params.yaml: runs")
        return experiment

    def documents(self) -> Iterator[Document]:
        """At most `documents` of those that are trained on, in an order by the seed."""
        places = self._places(self.experiment.runs[self.run].stage, held_out=False)
        return (part.document(index) for part, index in places)

    def captions(self) -> tuple[list[str], str]:
        """`pairs` distinct captions, or all there are, that the variant's last stage draws, and which rows they are of.

        Held-out ones; where no card holds rows out, those that are trained on. Raises DataError where there are none.
        """
        stage = self.experiment.variants[self.experiment.runs[self.run].variant].stages[-1]
        for rows, held_out in {"held out": True, "trained on": False}.items():
            found: dict[str, None] = {}
            for part, index in self._places(stage, held_out=held_out, task="generation"):
                found[self.model.engine.caption(part.entry.template, part.document(index))] = None
                if len(found) == self.choices.pairs:
                    break
            if found:
                return list(found), f"rows of {stage}, {rows}"
        raise DataError(f"stage {stage}: no documents of the task generation; give --prompts FILE")

    def _places(
        self, stage_name: str, *, held_out: bool, task: Task | None = None
    ) -> Iterator[tuple[MixturePart, int]]:
        stage, engine = self.experiment.stages[stage_name], self.model.engine
        text, config = engine.tokenizer, engine.model.config
        shape, names = (config.positions, config.depth), (config.codebook_id, config.encoder_id)
        identity = CodesIdentity(*shape, *names, config.codebook_size)
        entries = {entry.prepared: entry for entry in stage.entries if task in (None, entry.task)}
        opened = partial(MixturePart, layout=Layout(), tokenizer=text, identity=identity, context=stage.context)
        parts = [opened(entry, held_out=held_out) for entry in entries.values()]
        ends = np.cumsum([len(part) for part in parts])
        total, random = int(ends[-1]) if parts else 0, np.random.default_rng(self.choices.seed)
        for number in random.choice(total, min(total, self.choices.documents), replace=False) if total else ():
            part = int(np.searchsorted(ends, number, side="right"))
            yield parts[part], int(number - ends[part]) + len(parts[part])


@matplotlib.rc_context(fname=LOOK)
def drawn(curves: Sequence[Mapping[str, Any]], x: str, y: str, fork: float | None = None) -> str:
    """Curves as SVG: `x`, `y`, standard errors as `error`, low and high of chance as `band`, and how they look."""
    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        style = {"marker": ".", "capsize": 2, **curve}
        if band := style.pop("band", None):
            axes.fill_between(curve["x"], band[0], band[1], color="0.5", alpha=0.2, linewidth=0)
        axes.errorbar(style.pop("x"), style.pop("y"), yerr=style.pop("error", None), **style)
    if fork is not None:
        axes.axvline(fork, color="0.5", linestyle=":", label="fork")
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=2)
    return svg(figure)

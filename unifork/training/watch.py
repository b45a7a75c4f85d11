"""Losses out of bounds: a run that has gone wrong stops, and says on which documents.

A model that guesses evenly has a loss of ln V per word and ln K per code, V words and K codes. That
is what a fresh head begins with, and the unit of the bounds (`LossBand`).
"""

import math
from pathlib import Path
from typing import Any

from unifork.config import LossBand
from unifork.errors import UniForkError
from unifork.shards.manifest import write_json
from unifork.training.history import Log

STOPPED = "stopped.json"
"""In the run folder: the metrics of the step that stopped the run, and the keys of its documents."""


class Watch:
    """Checks every step's metrics before anything of it is saved; the same verdict on every worker."""

    def __init__(self, band: LossBand, words: int, codes: int, fresh: bool, folder: Path, lead: bool, log: Log) -> None:
        """words, codes: sizes of vocabulary and codebook. fresh: the run begins with an untrained image head."""
        self.band, self.fresh, self.folder, self.lead, self.log = band, fresh, folder, lead, log
        self.even = {"text_loss": math.log(words), "image_loss": math.log(codes)}

    def check(self, metrics: dict[str, Any], keys: list[str]) -> None:
        """Raises UniForkError when training must not go on from the step; reports a first step that is suspicious."""
        where = f"track {metrics['track']}, step {metrics['step']}"
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["gradient_norm"]):
            self._stop(f"{where}: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}", metrics, keys)
        for name, even in self.even.items():
            loss = metrics[name]
            if loss is None:
                continue
            if loss > self.band.stop * even:
                allowed = f"{self.band.stop:g} x {even:.3f}, what a uniform prediction costs (loss_band.stop)"
                self._stop(f"{where}: {name} {loss:.3f} is above {allowed}", metrics, keys)
            if metrics["step"] == 0 and self.lead:
                self._first(where, name, loss)

    def _first(self, where: str, name: str, loss: float) -> None:
        configured = self.band.first_text if name == "text_loss" else None
        expected = configured or self.even[name]
        low = configured is not None or (name == "image_loss" and self.fresh)
        distance = loss / expected - 1
        if distance > self.band.warn or (low and distance < -self.band.warn):
            hint = (
                "do targets leak, or is the model not what it should be?" if distance < 0 else "is the model damaged?"
            )
            self.log(f"warning: {where}: {name} {loss:.3f}, expected {expected:.3f}; {hint}")

    def _stop(self, what: str, metrics: dict[str, Any], keys: list[str]) -> None:
        path = self.folder / STOPPED
        if self.lead:
            write_json(path, {"reason": what, "metrics": metrics, "documents": keys})
        raise UniForkError(
            f"{what}; nothing of this step is saved. The keys of its {len(keys)} documents are in {path}, "
            f"the first: {', '.join(keys[:5])}"
        )

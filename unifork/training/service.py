"""Weights & Biases as a logger; needs the extra `wandb`, and is imported only where a cluster file names it.

A service may fail or hang for as long as it likes: a thread calls it, which training never waits for, but for
`PATIENCE_SECONDS` when it ends. A service that fails or falls behind is left out, which is a line of the log.
"""

from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import wandb

from unifork.training.loggers import Logger

PATIENCE_SECONDS = 60.0
MOST_WAITING = 1000
"""Steps that the service may be behind."""


class WeightsAndBiases(Logger):
    """A run for each attempt, named like the folder; project, account and mode are those of wandb's own environment."""

    def __init__(self, folder: Path, finished: int, log: Callable[[str], None]) -> None:
        super().__init__(folder, finished, log)
        self.folder, self.log, self.alive = folder, log, True
        self._waiting = SimpleQueue[tuple[int, dict[str, float]] | None]()
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            name, limit = self.folder.name, PATIENCE_SECONDS / 2
            limits = wandb.Settings(init_timeout=limit, finish_timeout=limit)
            run = wandb.init(name=name, group=name, dir=str(self.folder), settings=limits)
            while (item := self._waiting.get()) is not None:
                run.log(item[1], step=item[0])
            run.finish()
        except Exception as error:  # whatever it is, it is no part of training
            self._leave_out(f"{type(error).__name__}: {error}".splitlines()[0])

    def _leave_out(self, reason: str) -> None:
        if self.alive:
            self.alive = False
            self.log(f"warning: logger wandb is left out from here on: {reason}")

    def add(self, step: int, numbers: dict[str, float]) -> None:
        if self.alive and self._waiting.qsize() >= MOST_WAITING:
            self._leave_out(f"{MOST_WAITING} steps wait for it")
        if self.alive:
            self._waiting.put((step, numbers))

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(PATIENCE_SECONDS if self.alive else 0)
        if self._thread.is_alive():
            self._leave_out(f"it did not end within {PATIENCE_SECONDS:g} s")

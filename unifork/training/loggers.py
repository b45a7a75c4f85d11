"""Where the numbers of each step go beside `history.jsonl`: what `train.loggers` of the cluster file names.

A logger on the disk of the run writes in the loop, and a disk that is full is an error at once. One that speaks to a
service must neither stop nor hold training (`training/service.py`).
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from unifork.config import cluster_file
from unifork.registry import Registry


class Logger:
    """Numbers by name, a step at a time. Steps of all tracks count together, from 1."""

    def __init__(self, folder: Path, finished: int, log: Callable[[str], None]) -> None:
        """folder: of the run. finished: steps of attempts before this one; later ones are done again. log: its log."""

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """One step."""

    def sync(self) -> None:
        """Bring every step so far to the disk."""

    def close(self) -> None:
        """No more steps."""


class TensorBoard(Logger):
    """Event files in `<run>/tensorboard`. Raises OSError where the disk takes nothing more."""

    def __init__(self, folder: Path, finished: int, log: Callable[[str], None]) -> None:
        super().__init__(folder, finished, log)
        board = folder / "tensorboard"
        board.mkdir(exist_ok=True)
        self._board = EventsWriter(str(board / "events"), f".{os.getpid()}.{time.time_ns()}")  # a second is in its name
        # what an attempt before this one wrote after the checkpoint is hidden
        self._write_event(step=finished + 1, session_log=SessionLog(status=SessionLog.START))

    def _write_event(self, **content: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), **content))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._write_event(step=step, summary=scalar(name, value))

    def sync(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


PLACES = {"tensorboard": f"{__name__}:TensorBoard", "wandb": "unifork.training.service:WeightsAndBiases"}
LOGGERS = Registry("logger", type, PLACES)


def find_loggers(names: tuple[str, ...]) -> list[type[Logger]]:
    """The loggers that a cluster file names. Raises ConfigError for unknown ones and where their package is missing."""
    return [LOGGERS.find(name, f"{cluster_file()}: train.loggers") for name in names]

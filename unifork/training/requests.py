"""What a worker asks of all workers at once: to end soon, because a signal was received, or to save now.

A request travels with the sums of the losses, so all workers read it in the same step and act after the same one.
Where no step is under way nothing can be lost, and a signal ends the program at once.
"""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from unifork.errors import Stopped


class Requests:
    """Those of one worker."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the first signal that was received; 0: none."""
        self.deferred = False
        """Whether somebody looks at `signal`; otherwise the first signal raises."""
        self.save_at = math.inf
        """When the next checkpoint is due by this worker's monotonic clock."""

    def receive(self, number: int) -> None:
        """A signal, or the news of one. Raises Stopped unless steps are under way."""
        self.signal = self.signal or number
        if not self.deferred:
            raise Stopped(number)

    def flags(self) -> tuple[float, float]:
        """(end, save): above zero where it is asked for."""
        return float(self.signal > 0), float(time.monotonic() >= self.save_at)

    @contextmanager
    def defer(self) -> Iterator[None]:
        """While the block runs signals are only noted. Raises Stopped at its end if there was one."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        if self.signal:
            raise Stopped(self.signal)


@contextmanager
def signals(receive: Callable[[int], None]) -> Iterator[None]:
    """Give the first SIGTERM or SIGINT to `receive` while the block runs; the next one ends the process at once.

    The signal that the kernel sends when the parent dies (`die_with_parent`) does not count as a next one: it follows
    where a whole process group gets a SIGTERM. Does nothing outside the main thread, which alone can have handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received, parent = False, os.getppid()

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal received, parent
        if received and os.getppid() == parent:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not received:
            received = True
            receive(number)
        parent = os.getppid()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Messages:
    """What the workers of one fit and the program that launched them leave for each other.

    An actor, whose process has to import this module alone: it stands here because that is quick.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Of a fit: nothing of the one before counts."""
        self.end: tuple[str, str] | None = None
        """Type and text of the UniForkError or Stopped that ended a worker first."""
        self.signal = 0
        """What the program received."""
        self.heard = time.monotonic()
        """When a worker last asked."""
        self.nodes = set[str]()
        """Where workers are."""

    def read(self, node: str | None = None) -> tuple[tuple[str, str] | None, int]:
        """(end, signal). node: the worker's, who asks."""
        self.heard = time.monotonic()
        self.nodes |= {node} if node else set()
        return self.end, self.signal

    def among(self, nodes: list[str]) -> bool:
        """Whether a worker is on any of some nodes."""
        return not self.nodes.isdisjoint(nodes)

    def leave(self, error: str, text: str) -> None:
        """The error that ended a worker."""
        self.end = self.end or (error, text)

    def silence(self) -> float:
        """Seconds since anybody read."""
        return time.monotonic() - self.heard

    def announce(self, number: int) -> None:
        """A signal."""
        self.signal = number

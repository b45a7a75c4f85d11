"""Many URLs in, one outcome each: img2dataset's threads go over them, and every URL is opened by our guard.

img2dataset opens URLs with `urllib.request.urlopen`; `_Shard` is the opener that it gets, for the whole process while a
pass lasts, and the writer of its samples. An outcome is kept by the number of its URL, which its fragment carries, and
never read out of a message. Rows that fail for now, and those whose host has no place while others have, come again in
a further pass.
"""

import io
import os
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError

import fsspec
import pyarrow as pa

from unifork.errors import MachineError
from unifork.sources.web.client import Client, Refused, Target, target_of
from unifork.sources.web.download import TAIL, TRANSIENT, UNREACHED, Health, Outcome, fetch_image

SILENT_CONNECTIONS = 2
"""Connections to a host that has not answered yet, or not the last time."""
MOST_FAILURES = 16
"""Attempts in a row that do not reach a host, after which its rows are not tried any more."""
DEAD_SECONDS = 600.0
"""How long such a host is left alone."""
TABLE = "memory://unifork/urls.arrow"
"""Where img2dataset finds its table of URLs."""


@dataclass
class _Host:
    """What is known of a host of the list."""

    waiting: int = 0
    """Rows of this pass that no thread has taken."""
    active: int = 0
    """Threads that fetch a row of it."""
    answers: bool = False
    """Whether it did the last time."""
    failures: int = 0
    """Attempts in a row that did not reach it."""
    failed_at: float = 0.0

    @property
    def dead(self) -> bool:
        """Whether it is left alone."""
        return self.failures >= MOST_FAILURES and time.monotonic() - self.failed_at < DEAD_SECONDS


class Places:
    """Who may fetch now: so many connections to a host, and half of the threads at most for hosts that are silent."""

    def __init__(self, connections: int) -> None:
        self.connections, self.threads = connections, 1
        self.hosts: defaultdict[str, _Host] = defaultdict(_Host)
        self.open: dict[bool, set[str]] = {}
        self.silent = self.queued = 0
        self.changed = threading.Condition()

    def begin(self, names: Sequence[str], threads: int) -> int:
        """Set up for a pass over rows of these hosts, with at most so many threads. Returns how many are of use."""
        rows = Counter(names)
        self.threads = min(threads, sum(min(count, self.connections) for count in rows.values()))
        self.open, self.silent, self.queued = {True: set(), False: set()}, 0, 0
        for name, count in rows.items():
            self.hosts[name].waiting = count
            self._note(name)
        return self.threads

    def end(self) -> None:
        """Forget all hosts but the dead."""
        self.hosts = defaultdict(_Host, {name: host for name, host in self.hosts.items() if host.dead})

    def enter(self, name: str, over: Callable[[], bool]) -> bool:
        """Wait for a place at a host. False where its row has to come later: others can start, or all is over.

        Raises Refused for a dead host.
        """
        with self.changed:
            host = self.hosts[name]
            host.waiting -= 1
            self.queued += 1
            self._note(name)
            try:
                while not host.dead and not self._has_place(host):
                    others = self.open[True] or (self.open[False] and self._place_for_silent())
                    if over() or (others and (not host.answers or self.queued > self.threads // 4)):
                        return False
                    self.changed.wait(0.5)
            finally:
                self.queued -= 1
            if host.dead:
                raise Refused("host_unreachable", f"{name}: {host.failures} attempts in a row did not reach it")
            host.active += 1
            self.silent += not host.answers
            self._note(name)
        return True

    def leave(self, name: str, answered: bool | None) -> None:
        """Give a place back. answered: whether the host did, None where it was not asked."""
        with self.changed:
            host = self.hosts[name]
            host.active -= 1
            self.silent -= not host.answers
            if answered is not None:
                self.silent += host.active * (host.answers - answered)
                host.answers = answered
                host.failures = 0 if answered else host.failures + 1
                host.failed_at = time.monotonic()
            self._note(name)
            self.changed.notify_all()

    def _connections(self, host: _Host) -> int:
        return self.connections if host.answers else min(SILENT_CONNECTIONS, self.connections)

    def _place_for_silent(self) -> bool:
        return self.silent < max(1, self.threads // 2)

    def _has_place(self, host: _Host) -> bool:
        return host.active < self._connections(host) and (host.answers or self._place_for_silent())

    def _note(self, name: str) -> None:
        """Keep the hosts together of which another row could start."""
        host = self.hosts[name]
        for names in self.open.values():
            names.discard(name)
        if host.waiting > 0 and (host.dead or host.active < self._connections(host)):
            self.open[host.answers or host.dead].add(name)


def fetch_all(
    urls: Sequence[str], client: Client, threads: int, health: Health, places: Places | None = None
) -> dict[str, Outcome]:
    """The outcome of every URL. Raises MachineError when the network on this side is down."""
    places = places or Places(client.connections_per_host)
    try:
        return _Shard(urls, client, threads, health, places).run()
    finally:
        places.end()


class _Shard:
    """The books of one shard; for img2dataset, what opens its URLs and what writes its samples."""

    def __init__(self, urls: Sequence[str], client: Client, threads: int, health: Health, places: Places) -> None:
        self.urls, self.client, self.threads, self.health, self.places = urls, client, threads, health, places
        self.rules = client.rules
        self.end = time.monotonic() + self.rules.shard_seconds
        self.targets: dict[int, Target] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.attempts: Counter[int] = Counter()
        self.settled: set[int] = set()
        self.written: list[int] = []
        self.fault: MachineError | None = None
        self.lock = threading.Lock()
        for number, url in enumerate(urls):
            try:
                self.targets[number] = target_of(url)
            except Refused as refused:
                self._note(number, refused)

    def run(self) -> dict[str, Outcome]:
        while rows := self._due():
            self._pass(rows)
        if self.fault:
            raise self.fault
        late = Refused("deadline", "the time of the shard was over before this row could be fetched")
        return {url: self.outcomes.get(number, late) for number, url in enumerate(self.urls)}

    def over(self) -> bool:
        """Whether no further attempt may start."""
        return self.fault is not None or time.monotonic() >= self.end

    def _due(self) -> list[int]:
        """The rows of the next pass: those without an attempt, else, after a pause, those that may have another."""
        rows = [number for number in self.targets if number not in self.outcomes]
        if not rows:
            rows = [
                n for n in self.targets if n not in self.settled and not self.places.hosts[self.targets[n].host].dead
            ]
            pause = self.rules.backoff_seconds * 2 ** (min((self.attempts[n] for n in rows), default=1) - 1)
            time.sleep(max(0.0, min(pause if rows else 0.0, self.end - time.monotonic())))
        return [] if self.over() else rows

    def _pass(self, rows: list[int]) -> None:
        """Have img2dataset go over some rows once, host by host in turn."""
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # which asks the web for its newest version
        from img2dataset.downloader import Downloader  # noqa: PLC0415  takes seconds and 400 MB, and only here
        from img2dataset.resizer import Resizer  # noqa: PLC0415

        earlier: Counter[str] = Counter()
        turn = {}
        for number in rows:
            turn[number] = earlier[self.targets[number].host]
            earlier[self.targets[number].host] += 1
        rows = sorted(rows, key=turn.__getitem__)
        threads = self.places.begin([self.targets[number].host for number in rows], self.threads)
        table = pa.table({"url": [f"{self.targets[number].url}#{number}" for number in rows]})
        with fsspec.open(TABLE, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        self.written = []
        downloader = Downloader(
            sample_writer_class=lambda *_: self,
            resizer=Resizer(1, "no", False, disable_all_reencoding=True),
            thread_count=threads,
            save_caption=False,
            extract_exif=False,
            output_folder=TABLE.rpartition("/")[0],
            column_list=["url"],
            timeout=self.rules.timeout_seconds,
            number_sample_per_shard=10**9,
            oom_shard_count=1,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,
            user_agent_token=None,
            disallowed_header_directives=None,
        )
        urllib.request.install_opener(self)  # type: ignore[arg-type]
        try:
            downloader.download_shard((0, TABLE))
        finally:
            urllib.request.install_opener(None)  # type: ignore[arg-type]  the one that Python makes itself
        if sorted(self.written) != sorted(rows):
            raise RuntimeError(f"{len(rows)} rows went into img2dataset, {len(self.written)} came out")

    # ------------------------------------------------------------------- called by img2dataset

    def open(self, request: urllib.request.Request, *_: Any) -> io.BytesIO:
        """One attempt at one row, in a thread of the pool. What is raised says nothing: outcomes are kept here."""
        number, outcome = int(request.fragment), None
        host = self.targets[number].host
        try:
            if not self.over() and self.places.enter(host, self.over):
                try:
                    outcome = fetch_image(self.client, self.urls[number])
                finally:
                    self.places.leave(host, _answered(outcome, host))
        except Refused as dead:
            outcome = self.outcomes.get(number) or Refused(dead.reason, dead.detail)
        if outcome is not None:
            self._note(number, outcome)
        if not isinstance(outcome, dict):
            raise URLError("no image")
        return io.BytesIO(outcome.pop("image"))

    def _note(self, number: int, outcome: Outcome) -> None:
        """Keep the outcome of a row."""
        with self.lock:
            self.attempts[number] += 1
            self.outcomes[number] = outcome
            passes = isinstance(outcome, Refused) and outcome.reason in TRANSIENT
            if not passes or self.attempts[number] >= self.rules.attempts:
                self.settled.add(number)
            if len(self.settled) >= TAIL * len(self.urls):
                self.end = min(self.end, time.monotonic() + self.rules.tail_seconds)
            try:
                if self.fault is None:
                    self.health.saw(self.urls[number], outcome)
            except MachineError as error:
                self.fault = error

    def write(self, image: bytes | None, _key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """Take the image of a row, or that it has none."""
        number = int(meta["url"].rpartition("#")[2])
        self.written.append(number)
        outcome = self.outcomes.get(number)
        if image is not None and isinstance(outcome, dict):
            outcome["image"] = image

    def close(self) -> None:
        """Nothing is left to be done."""


def _answered(outcome: Outcome | None, host: str) -> bool | None:
    """Whether a host of the list answered; None where it was not contacted."""
    if not isinstance(outcome, Refused) or outcome.host != host:  # a redirect's target is another
        return True
    return None if outcome.reason in ("forbidden_address", "no_such_host") else outcome.reason not in UNREACHED

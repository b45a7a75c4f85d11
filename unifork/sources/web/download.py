"""The worker of the download stage for a list of URLs: a slice of the list in, an image-text shard out.

What cannot be had goes to the quarantine. Every row of the list is accounted for once: in the shard, or in
`quarantine/` with url, class and detail, and in the manifest's counts. Images are kept byte by byte.

img2dataset's `Downloader` goes over the URLs in passes with its pool of threads. It opens each with
`urllib.request.urlopen`; `_Shard` is the opener that it gets, for the whole process while a pass lasts, and the writer
of its samples. Outcomes are kept by the number of a URL, which its fragment carries, and never read out of a message.
Rows that fail for now, and those whose host has no place while others have, come again in a further pass.
"""

import hashlib
import io
import os
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.error import URLError

import fsspec
import pyarrow as pa

from unifork.config import Card, WebAccess, cluster_file
from unifork.errors import ConfigError, MachineError, Rejected
from unifork.images import decode, decoded, open_image
from unifork.shards.schema import text_columns
from unifork.shards.task import ShardTask
from unifork.sources import Materialize, Row, RowError, source_of
from unifork.sources.url_lists import FetchRules
from unifork.sources.web.guard import UNREACHED, Guard, Network
from unifork.sources.web.permission import Refused, Target, target_of

WEB_VERSION = 4
"""Raise when the same lists, rules and answers would give other rows."""

TRANSIENT = frozenset(
    ("timeout", "connection_failed", "dns_failure", *(f"http_{n}" for n in (408, 429, 500, 502, 503, 504)))
)
"""Classes that another attempt may change."""
TAIL = 0.95
"""Share of settled rows at which the tail of a shard begins."""
SILENT_CONNECTIONS = 2
"""Connections to a host that has not answered yet, or not the last time."""
MOST_FAILURES = 16
"""Attempts in a row that do not reach a host, after which its rows are not tried any more."""
DEAD_SECONDS = 120.0
"""How long such a host is left alone, also in later shards."""
TABLE = "memory://unifork/urls.arrow"
"""Where img2dataset finds its table of URLs."""

Outcome = Row | Refused
"""The columns of an image that came: image, width, height, sha256; or why none did."""


def inspect(data: bytes, rules: FetchRules) -> Row:
    """The columns of an image that can be decoded, or where the rules say so has a header that can.

    Raises Rejected with the reasons of `unifork.images.measure` but `too_thin`: such an image is whole, and what no
    view can be made of is for the filter to say.
    """
    try:
        with open_image(data) as image:
            width, height = image.size
            if width * height > rules.max_pixels:
                raise Rejected("too_many_pixels", f"{width}x{height}, at most {rules.max_pixels} are fetched")
            if rules.decode == "full":
                decoded(image, data, partial(decode, data=data))
    except Rejected as error:
        if error.reason != "too_thin":
            raise
    return {"image": data, "width": width, "height": height, "sha256": hashlib.sha256(data).hexdigest()}


# ------------------------------------------------------------------------------- whose turn it is


@dataclass(eq=False)
class _Host:
    """How a host of the list does."""

    changed: threading.Condition
    """With the lock of all hosts, so that a place that is given back wakes only who waits for it."""
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

    def __init__(self, connections: int, threads: int) -> None:
        self.connections, self.threads = connections, threads
        self.lock = threading.Lock()
        self.hosts: defaultdict[str, _Host] = defaultdict(lambda: _Host(threading.Condition(self.lock)))
        self.open: dict[bool, set[str]] = {True: set(), False: set()}
        self.silent = 0
        self.queue: list[_Host] = []  # of every thread that waits, the host

    def begin(self, names: Sequence[str]) -> int:
        """Set up for a pass over rows of these hosts; the threads that are of use for it."""
        rows = Counter(names)
        for name, count in rows.items():
            self.hosts[name].waiting = count
            self._note(name)
        return min(self.threads, sum(min(count, self.connections) for count in rows.values()))

    def end(self) -> None:
        """Forget all hosts but the dead."""
        self.hosts = defaultdict(self.hosts.default_factory, {n: host for n, host in self.hosts.items() if host.dead})
        self.open = {True: set(), False: set()}

    def enter(self, name: str, over: Callable[[], bool]) -> bool:
        """Wait for a place at a host. False where its row has to come later: others can start, or all is over.

        Raises Refused for a dead host.
        """
        with self.lock:
            host = self.hosts[name]
            host.waiting -= 1
            self.queue.append(host)
            self._note(name)
            while not host.dead and not self._has_place(host):
                others = self.open[True] or (self.open[False] and self._place_for_silent())
                if over() or (others and (not host.answers or len(self.queue) > self.threads // 4)):
                    self.queue.remove(host)
                    return False
                host.changed.wait(0.5)
            self.queue.remove(host)
            if host.dead:
                raise Refused("host_unreachable", f"{name}: {MOST_FAILURES} attempts in a row did not reach it")
            host.active += 1
            self.silent += not host.answers
            self._note(name)
        return True

    def leave(self, name: str, answered: bool | None) -> None:
        """Give a place back. answered: whether the host did, None where it was not contacted."""
        with self.lock:
            host = self.hosts[name]
            before = host.answers
            host.active -= 1
            self.silent -= not host.answers
            if answered is not None:
                self.silent += host.active * (host.answers - answered)
                host.answers = answered
                host.failures = 0 if answered else host.failures + 1
                host.failed_at = time.monotonic()
            self._note(name)
            for waits in [host] if before and host.answers and host in self.queue else self.queue:
                waits.changed.notify()

    def _connections(self, host: _Host) -> int:
        return self.connections if host.answers else min(SILENT_CONNECTIONS, self.connections)

    def _place_for_silent(self) -> bool:
        return self.silent < max(1, self.threads // 2)

    def _has_place(self, host: _Host) -> bool:
        return host.active < self._connections(host) and (host.answers or self._place_for_silent())

    def _note(self, name: str) -> None:
        """Keep the hosts together of which another row could start, by whether they answer."""
        host = self.hosts[name]
        for names in self.open.values():
            names.discard(name)
        if host.waiting > 0 and (host.dead or host.active < self._connections(host)):
            self.open[host.answers or host.dead].add(name)


# -------------------------------------------------------------------------------- img2dataset


def fetch_all(urls: Sequence[str], guard: Guard, network: Network, places: Places) -> dict[str, Outcome]:
    """The outcome of every URL. Raises MachineError when the network on this side is down."""
    try:
        return _Shard(urls, guard, network, places).run()
    finally:
        places.end()


class _Shard:
    """The books of one shard; for img2dataset, what opens its URLs and what writes its samples."""

    def __init__(self, urls: Sequence[str], guard: Guard, network: Network, places: Places) -> None:
        self.urls, self.guard, self.network, self.places = urls, guard, network, places
        self.rules, self.lock = guard.rules, threading.Lock()
        self.end = time.monotonic() + self.rules.shard_seconds
        self.targets: dict[int, Target] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.attempts: Counter[int] = Counter()
        self.settled: set[int] = set()
        self.written: list[int] = []
        self.fault: MachineError | None = None

    def run(self) -> dict[str, Outcome]:
        for number, url in enumerate(self.urls):
            try:
                self.targets[number] = target_of(url)
            except Refused as refused:
                self._settle(number, refused)
        self.network.preflight([target.url for target in self.targets.values()])
        while rows := self._due():
            self._pass(rows)
        if self.fault:
            raise self.fault
        late = Refused("deadline", "the time of the shard was over before this row could be fetched")
        return {url: self.outcomes.get(number, late) for number, url in enumerate(self.urls)}

    def _over(self) -> bool:
        return self.fault is not None or time.monotonic() >= self.end

    def _due(self) -> list[int]:
        """The rows of the next pass: those without an attempt, else, after a pause, those that may have another."""
        rows = [number for number in self.targets if number not in self.outcomes]
        if not rows:
            left = [number for number in self.targets if number not in self.settled]
            rows = [number for number in left if not self.places.hosts[self.targets[number].host].dead]
            pause = self.rules.backoff_seconds * 2 ** (min((self.attempts[number] for number in rows), default=1) - 1)
            time.sleep(max(0.0, min(pause, self.end - time.monotonic())) if rows else 0.0)
        return [] if self._over() else rows

    def _pass(self, rows: list[int]) -> None:
        """Have img2dataset go over some rows once, from host to host."""
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # which asks the web for its newest version
        from img2dataset.downloader import Downloader  # noqa: PLC0415  takes seconds and 400 MB, and is needed only here
        from img2dataset.resizer import Resizer  # noqa: PLC0415

        earlier: Counter[str] = Counter()
        turns: dict[int, int] = {}
        for number in rows:
            turns[number] = earlier[self.targets[number].host]
            earlier[self.targets[number].host] += 1
        rows.sort(key=turns.__getitem__)
        table = pa.table({"url": [f"{self.targets[number].url}#{number}" for number in rows]})
        with fsspec.open(TABLE, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        options: dict[str, Any] = {"timeout": self.rules.timeout_seconds, "retries": 0, "column_list": ["url"]}
        options |= {"output_folder": TABLE.rpartition("/")[0], "number_sample_per_shard": 10**9, "oom_shard_count": 1}
        options |= dict.fromkeys(("save_caption", "extract_exif"), False)
        options |= dict.fromkeys(("compute_hash", "verify_hash_type", "encode_format", "user_agent_token"))
        options |= {
            "disallowed_header_directives": None,
            "resizer": Resizer(1, "no", False, disable_all_reencoding=True),
        }
        threads = self.places.begin([self.targets[number].host for number in rows])
        downloader = Downloader(sample_writer_class=lambda *_: self, thread_count=threads, **options)
        self.written = []
        urllib.request.install_opener(self)  # type: ignore[arg-type]
        try:
            downloader.download_shard((0, TABLE))
        finally:
            urllib.request.install_opener(None)  # Python makes its own again
        if sorted(self.written) != sorted(rows):
            raise RuntimeError(f"{len(rows)} rows went into img2dataset, {len(self.written)} came out")

    def open(self, request: urllib.request.Request, *_: Any) -> io.BytesIO:
        """One attempt at one row, in a thread of img2dataset's pool. Raises URLError for a row without an image."""
        number, outcome = _number(request.full_url), None
        host = self.targets[number].host
        try:
            if not self._over() and self.places.enter(host, self._over):
                outcome = self._fetch(number)
                answered = _answered(outcome, host)
                # rows that come again are those that fail, which says nothing of the others
                self.places.leave(host, answered or (None if self.attempts[number] else answered))
        except Refused as dead:
            outcome = self.outcomes.get(number) or Refused(dead.reason, str(dead))
        if outcome is not None:
            self._settle(number, outcome)
        if outcome is None or isinstance(outcome, Refused):
            raise URLError("the reason is kept elsewhere")
        return io.BytesIO(outcome.pop("image"))

    def _fetch(self, number: int) -> Outcome:
        """One attempt at one URL; never raises."""
        try:
            return inspect(self.guard.get(self.targets[number]), self.rules)
        except Rejected as error:  # kept without its traceback, which holds sockets and bytes
            return Refused(error.reason, str(error), getattr(error, "host", ""))
        except Exception as error:  # a hostile answer costs its row, never the shard
            return Refused("unexpected", f"{type(error).__name__}: {error}"[:300])

    def _settle(self, number: int, outcome: Outcome) -> None:
        """Keep the outcome of an attempt."""
        reason = outcome.reason if isinstance(outcome, Refused) else None
        with self.lock:
            self.attempts[number] += 1
            self.outcomes[number] = outcome
            if reason not in TRANSIENT or self.attempts[number] >= self.rules.attempts:
                self.settled.add(number)
            if len(self.settled) >= TAIL * len(self.urls):
                self.end = min(self.end, time.monotonic() + self.rules.tail_seconds)
            if self.fault or number not in self.targets:
                return
            try:
                self.network.saw(self.targets[number].url, reason)
            except MachineError as error:
                self.fault = error

    def write(self, image: bytes | None, _key: str, _caption: str | None, meta: dict[str, Any]) -> None:
        """Take the image of a row from img2dataset, or that it has none."""
        number = _number(meta["url"])
        self.written.append(number)
        outcome = self.outcomes.get(number)
        if image is not None and isinstance(outcome, dict):
            outcome["image"] = image

    def close(self) -> None:
        """Nothing is left to be done."""


def _number(url: str) -> int:
    """Which of a shard's URLs it is, from the fragment that it was given."""
    return int(url.rpartition("#")[2])


def _answered(outcome: Outcome, host: str) -> bool | None:
    """Whether a host of the list answered; None where it was not contacted."""
    if not isinstance(outcome, Refused) or outcome.host != host:  # the target of a redirect is another
        return True
    return None if outcome.reason in ("forbidden_address", "no_such_host") else outcome.reason not in UNREACHED


# --------------------------------------------------------------------------------------- the worker


class Download(Materialize):
    """A range of a list of URLs -> image-text shard."""

    OWN_PROCESS = True
    """Where img2dataset's imports and its opener stay."""

    def __init__(self, card: Card, web: WebAccess, workers: int) -> None:
        """workers: how many share the connections that a host may have. Raises ConfigError where they are too many."""
        if workers > web.connections_per_host:
            raise ConfigError(
                f"{cluster_file()}: {workers} download workers, but connections_per_host is "
                f"{web.connections_per_host}: each worker needs at least one. Use fewer workers, or raise "
                f"web.connections_per_host"
            )
        super().__init__(card)
        options: Any = source_of(card)[1]
        connections = web.connections_per_host // workers
        self.guard = Guard(options.fetch, connections, web.proxy)
        self.network, self.places = Network(self.guard), Places(connections, web.threads)

    def rows(self, task: ShardTask) -> Iterator[Row | RowError]:
        """The rows of one slice with their images; of each URL one image, though some URLs come more than once."""
        listed = list(super().rows(task))
        yield from (row for row in listed if isinstance(row, RowError))
        wanted = [row for row in listed if not isinstance(row, RowError)]
        self._check_columns(wanted, task)
        outcomes = fetch_all(list(dict.fromkeys(row["url"] for row in wanted)), self.guard, self.network, self.places)
        for row in wanted:
            outcome = outcomes[row["url"]]
            if isinstance(outcome, Refused):
                yield RowError(row["key"], outcome.reason, str(outcome), url=row["url"])
            else:
                yield {**row, **outcome, "license": row.get("license") or self.card.license}

    def _check_columns(self, rows: list[Row], task: ShardTask) -> None:
        """Raise ConfigError when a list lacks a column that the card needs, before anything is fetched."""
        for name in (*text_columns(self.card), *self.card.columns):
            if rows and name not in rows[0]:
                raise ConfigError(
                    f"{task.piece and task.piece.file}: no column for {name!r} of card {self.card.name}; "
                    f"found: {', '.join(rows[0])}. Name it in source.options.columns"
                )

"""The worker of the download stage for a list of URLs: a slice of the list in, an image-text shard out.

What cannot be had goes to the quarantine. Every row of the list is accounted for once: in the shard, or in
`quarantine/` with url, class and detail, and in the manifest's counts. Images are kept byte by byte.

Many URLs in, one outcome each: rows take turns by host, transient failures come back later, time is bounded.

One thread keeps the books and others fetch, so that nothing here needs a lock. A host has at most its number of
connections; its further rows wait without occupying a thread.
"""

import hashlib
import heapq
import io
import queue
import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from unifork.config import Card, WebAccess, cluster_file, parse
from unifork.errors import ConfigError, MachineError
from unifork.shards.job import quarantined, table_of, write_shard
from unifork.shards.schema import image_text_schema, text_columns
from unifork.shards.task import ShardResult, ShardTask
from unifork.sources import Fault, rows_of
from unifork.sources.url_lists import FetchRules, UrlList
from unifork.sources.web.client import Client, Refused, target_of

WEB_VERSION = 1
"""Raise when the same lists, rules and answers would give other rows."""
Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF") if name in Image.OPEN)
"""Formats that are opened, as far as this Pillow has them; of its forty others one starts a program (EPS)."""

TRANSIENT = frozenset(
    {"timeout", "connection_failed", "dns_failure", "http_408", "http_429"}
    | {f"http_{n}" for n in (500, 502, 503, 504)}
)
"""Classes that another attempt may change."""
UNREACHED = frozenset({"timeout", "connection_failed", "dns_failure", "no_such_host"})
"""Classes that may have their cause on this side."""
UNASKED = frozenset({"bad_url", "forbidden_address", "robots_denied", "unexpected"})
"""Classes that say nothing about the network: perhaps no connection was made."""
SUSPICIOUS_HOSTS = 25
"""Different hosts that fail to be reached one after another before this side is looked at."""
PROBES = 12
"""Hosts that are probed; a fifth of those in old lists being dead, all are by chance in 4 of 10^9 cases."""
FEW_PROBES = 8
"""With fewer hosts than this, only a resolver that does not answer counts as a fault of this side."""
TAIL = 0.95
"""Share of settled rows at which the tail of a shard begins."""


@dataclass(frozen=True)
class Picture:
    """Bytes as received, and the size in pixels."""

    data: bytes
    width: int
    height: int


Outcome = Picture | Refused


def fetch_picture(client: Client, url: str) -> Outcome:
    """One attempt at one URL; never raises."""
    try:
        data = client.get(url)
        return Picture(data, *inspect(data, client.rules.max_pixels))
    except Refused as refused:
        return refused.with_traceback(None)
    except Exception as error:  # a hostile answer costs its row, never the shard
        return Refused("unexpected", f"{type(error).__name__}: {error}"[:300])


def inspect(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) of a picture that can be decoded.

    Raises Refused: `empty`, `not_an_image`, `too_many_pixels` (nothing was decoded), `undecodable`.
    """
    if not data:
        raise Refused("empty", "no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise Refused("too_many_pixels", f"{width}x{height}, at most {max_pixels} are decoded")
                picture.draft("RGB", (1, 1))  # a JPEG is decoded at an eighth of its sides: all bytes, few pixels
                picture.load()
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise Refused("not_an_image", f"begins with {data[:24]!r}") from None
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise Refused("undecodable", f"{type(error).__name__}: {error}"[:300]) from None
    return width, height


class Turns:
    """Rows waiting by host; hosts take turns, each with a limited number of rows under way."""

    def __init__(self, per_host: int) -> None:
        self.per_host = per_host
        self.waiting: dict[str, deque[int]] = defaultdict(deque)
        self.busy: Counter[str] = Counter()
        self.line: deque[str] = deque()
        self.in_line: set[str] = set()

    def add(self, host: str, row: int) -> None:
        """Let a row wait for its host's turn."""
        self.waiting[host].append(row)
        self._queue(host)

    def take(self) -> tuple[str, int] | None:
        """The next host and row that may start; None when all hosts are busy or nothing waits."""
        if not self.line:
            return None
        host = self.line.popleft()
        self.in_line.remove(host)
        row = self.waiting[host].popleft()
        self.busy[host] += 1
        self._queue(host)
        return host, row

    def done(self, host: str) -> None:
        """A row of this host ended."""
        self.busy[host] -= 1
        self._queue(host)

    def _queue(self, host: str) -> None:
        if self.waiting[host] and self.busy[host] < self.per_host and host not in self.in_line:
            self.line.append(host)
            self.in_line.add(host)


class Health:
    """Tells a list of dead links from a machine without a network."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.failing: dict[str, str] = {}
        self.alive: deque[str] = deque(maxlen=PROBES)

    def preflight(self, urls: Sequence[str]) -> None:
        """Probe some hosts of a list before anything else. Raises MachineError when none can be reached."""
        self.probe(urls[:: max(1, len(urls) // PROBES)], "before the first row")

    def saw(self, host: str, url: str, outcome: Outcome) -> None:
        """Note an outcome. Raises MachineError when nothing can be reached any more."""
        if isinstance(outcome, Refused) and outcome.reason in UNREACHED:
            self.failing[host] = url
            if len(self.failing) < SUSPICIOUS_HOSTS:
                return
            self.probe([*self.alive, *self.failing.values()], f"after {len(self.failing)} hosts failed in a row")
        elif isinstance(outcome, Refused) and outcome.reason in UNASKED:
            return
        else:
            self.alive.append(url)
        self.failing.clear()

    def probe(self, urls: Sequence[str], when: str) -> None:
        """Try to reach the first few hosts. Raises MachineError with a diagnosis when none answers."""
        chosen = list({_host(url): url for url in urls if _host(url)}.values())[:PROBES]
        with ThreadPoolExecutor(PROBES) as pool:
            failures = [failure for failure in pool.map(self._failure, chosen) if failure]
        reasons = Counter(failure.reason for failure in failures)
        if not failures or len(failures) < len(chosen):
            return
        if set(reasons) <= {"dns_failure"}:
            cause = "the resolver of this machine does not answer (DNS)"
        elif len(failures) < FEW_PROBES:
            return
        elif set(reasons) <= {"dns_failure", "no_such_host"}:
            cause = "no name can be resolved (DNS)"
        else:
            cause = (
                "names resolve, but no connection leaves this machine (egress, firewall; a proxy must be configured)"
            )
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise MachineError(
            f"download stopped {when}: {cause}. None of {len(chosen)} different hosts can be reached ({told}), "
            f"first {failures[0].detail!r}. Finished shards are kept; run the stage again when the network is back"
        )

    def _failure(self, url: str) -> Refused | None:
        try:
            self.client.reach(url)
        except Refused as refused:
            return refused if refused.reason in UNREACHED else None
        return None


def fetch_all(urls: Sequence[str], client: Client, threads: int, health: Health) -> list[Outcome]:
    """The outcome of every URL, in their order. Raises MachineError when the network on this side is down."""
    return _Shard(urls, client.rules, client.connections_per_host, health).run(
        threads, lambda url: fetch_picture(client, url)
    )


class _Shard:
    """The books of one shard."""

    def __init__(self, urls: Sequence[str], rules: FetchRules, per_host: int, health: Health) -> None:
        self.urls, self.rules, self.health = urls, rules, health
        self.settled = 0
        self.last: dict[int, Outcome] = {}
        self.attempts: Counter[int] = Counter()
        self.turns = Turns(per_host)
        self.later: list[tuple[float, int]] = []
        self.end = time.monotonic() + rules.shard_seconds
        self.in_tail = False
        for row, url in enumerate(urls):
            self.turns.add(_host(url), row)

    def run(self, threads: int, fetch: Callable[[str], Outcome]) -> list[Outcome]:
        results: queue.SimpleQueue[tuple[str, int, Outcome]] = queue.SimpleQueue()

        def work(host: str, row: int) -> None:
            results.put((host, row, fetch(self.urls[row])))

        running = 0
        pool = ThreadPoolExecutor(threads)
        try:
            while self.settled < len(self.urls):
                now = time.monotonic()
                if now >= self.end and not running:
                    break
                while self.later and self.later[0][0] <= now:
                    row = heapq.heappop(self.later)[1]
                    self.turns.add(_host(self.urls[row]), row)
                while now < self.end and running < threads and (turn := self.turns.take()):
                    pool.submit(work, *turn)
                    running += 1
                wake = min([self.end, *(due for due, _ in self.later[:1])]) - now
                try:  # what runs has its own deadline, so after the end it is only waited for
                    host, row, outcome = results.get(timeout=max(wake, 0.001) if now < self.end else None)
                except queue.Empty:
                    continue
                running -= 1
                self.turns.done(host)
                self._settle(host, row, outcome)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        late = Refused("deadline", "the time of the shard was over before this row could be fetched")
        return [self.last.get(row, late) for row in range(len(self.urls))]

    def _settle(self, host: str, row: int, outcome: Outcome) -> None:
        self.health.saw(host, self.urls[row], outcome)
        self.attempts[row] += 1
        self.last[row] = outcome
        now = time.monotonic()
        if isinstance(outcome, Refused) and outcome.reason in TRANSIENT and self.attempts[row] < self.rules.attempts:
            pause = self.rules.backoff_seconds * 2 ** (self.attempts[row] - 1)
            if now + pause < self.end:
                heapq.heappush(self.later, (now + pause, row))
                return
        self.settled += 1
        if not self.in_tail and self.settled >= TAIL * len(self.urls):
            self.in_tail, self.end = True, min(self.end, now + self.rules.tail_seconds)


def _host(url: str) -> str:
    """The host whose turn a URL waits for; empty when it has none."""
    try:
        return target_of(url).host
    except Refused:
        return ""


# --------------------------------------------------------------------------------------- the worker


class Download:
    """A range of a list of URLs -> image-text shard."""

    def __init__(self, card: Card, web: WebAccess, workers: int) -> None:
        """workers: how many share the connections that a host may have. Raises ConfigError where they are too many."""
        if workers > web.connections_per_host:
            raise ConfigError(
                f"{cluster_file()}: {workers} download workers, but connections_per_host is "
                f"{web.connections_per_host}: each worker needs at least one. Use fewer workers, or raise "
                f"web.connections_per_host"
            )
        self.card, self.web, self.schema = card, web, image_text_schema(card)
        rules = parse(UrlList, card.source.options, f"card {card.name}", "source.options").fetch
        self.client = Client(rules, web.connections_per_host // workers, web.proxy)
        self.health: Health | None = None

    def __call__(self, task: ShardTask) -> ShardResult:
        kept, rejected, wanted = [], [], []
        for row in rows_of(self.card, task):
            if isinstance(row, Fault):
                rejected.append({"key": row.key, "url": None, "reason": row.reason, "detail": row.detail})
            else:
                wanted.append(row)
        self._check_columns(wanted, task)
        outcomes = self._outcomes(list(dict.fromkeys(row["url"] for row in wanted)))  # some URLs come more than once
        keys: set[str] = set()
        for row in wanted:
            outcome = outcomes[row["url"]]
            if row["key"] in keys:
                outcome = Refused("duplicate_key", "an earlier row of this shard has the same key")
            keys.add(row["key"])
            if isinstance(outcome, Refused):
                shown = {"reason": outcome.reason, "detail": outcome.detail}
                rejected.append({"key": row["key"], "url": row["url"], **shown})
            else:
                kept.append(self._row(row, outcome))
        kept.sort(key=lambda row: row["key"])
        return write_shard(task, table_of(kept, self.schema), quarantined(task, rejected))

    def _outcomes(self, urls: list[str]) -> dict[str, Outcome]:
        if self.health is None:
            self.health = Health(self.client)
            self.health.preflight(urls)
        return dict(zip(urls, fetch_all(urls, self.client, self.web.threads, self.health), strict=True))

    def _row(self, row: dict[str, Any], picture: Picture) -> dict[str, Any]:
        columns = {name: str(row[name]) for name in self.card.columns if row[name] is not None}
        size = {"width": picture.width, "height": picture.height}
        digest = hashlib.sha256(picture.data).hexdigest()
        licence = row.get("license") or self.card.licence
        return {**row, **columns, **size, "image": picture.data, "sha256": digest, "license": licence}

    def _check_columns(self, rows: list[dict[str, Any]], task: ShardTask) -> None:
        """Raise ConfigError when a list lacks a column that the card needs, before anything is fetched."""
        for name in (*text_columns(self.card), *self.card.columns):
            if rows and name not in rows[0]:
                raise ConfigError(
                    f"{task.piece and task.piece.file}: no column for {name!r} of card {self.card.name}; "
                    f"found: {', '.join(rows[0])}. Name it in source.options.columns"
                )

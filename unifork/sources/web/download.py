"""The worker of the download stage for a list of URLs: a slice of the list in, an image-text shard out.

What cannot be had goes to the quarantine. Every row of the list is accounted for once: in the shard, or in
`quarantine/` with url, class and detail, and in the manifest's counts. Images are kept byte by byte.

Many URLs in, one outcome each: round-robin over hosts, transient failures come back later, time is bounded.

One thread keeps the books and others fetch, so that nothing here needs a lock. A host has at most its number of
connections; its further rows wait without occupying a thread, and after those of others that came before them.
"""

import asyncio
import hashlib
import math
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from unifork.config import Card, WebAccess, cluster_file, parse
from unifork.errors import ConfigError, MachineError
from unifork.images import ImageError, measure
from unifork.shards.schema import text_columns
from unifork.shards.task import ShardTask
from unifork.sources import Materialize, Row, RowError, sized
from unifork.sources.url_lists import UrlList
from unifork.sources.web.client import Client, Refused, target_of

WEB_VERSION = 3
"""Raise when the same lists, rules and answers would give other rows."""

TRANSIENT = frozenset(
    ("timeout", "connection_failed", "dns_failure", *(f"http_{n}" for n in (408, 429, 500, 502, 503, 504)))
)
"""Classes that another attempt may change."""
UNREACHED = frozenset({"timeout", "connection_failed", "dns_failure", "no_such_host"})
"""Classes that may have their cause on this side."""
UNASKED = frozenset({"bad_url", "forbidden_address", "robots_denied", "host_unreachable", "unexpected"})
"""Classes that say nothing about the network: perhaps no connection was made."""
SUSPICIOUS_HOSTS = 25
"""Different hosts that fail to be reached one after another before this side is looked at."""
PROBES = 12
"""Hosts that are probed; a fifth of those in old lists being dead, all are by chance in 4 of 10^9 cases."""
FEW_PROBES = 8
"""With fewer hosts than this, only a resolver that does not answer counts as a fault of this side."""
ENGINE = None
TAIL = 0.95
"""Share of settled rows at which the tail of a shard begins."""


Outcome = Row | Refused
"""The columns of an image that came: image, width, height, sha256; or why none did."""


def fetch_image(client: Client, url: str) -> Outcome:
    """One attempt at one URL; never raises."""
    try:
        return inspect(client.get(url), client.rules.max_pixels)
    except Refused as refused:
        return Refused(
            refused.reason, refused.detail, refused.host
        )  # without the traceback, which holds sockets and bytes
    except Exception as error:  # a hostile answer costs its row, never the shard
        return Refused("unexpected", f"{type(error).__name__}: {error}"[:300])


def inspect(data: bytes, max_pixels: int) -> Row:
    """The columns of an image that can be decoded.

    Raises Refused with the reasons of `unifork.images.measure` but `too_thin`: such an image is whole, and what no view
    can be made of is for the filter to say.
    """
    try:
        measure(data, max_pixels)
    except ImageError as error:
        if error.reason != "too_thin":
            raise Refused(error.reason, str(error)) from None
    return {**sized(data), "sha256": hashlib.sha256(data).hexdigest()}


class Health:
    """Tells a list of dead links from a machine without a network."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.failing: dict[str, str] = {}
        self.alive: deque[str] = deque(maxlen=PROBES)

    def preflight(self, urls: Sequence[str]) -> None:
        """Probe some hosts of a list before anything else. Raises MachineError when none can be reached."""
        self.probe(urls[:: max(1, len(urls) // PROBES)], "before the first row")

    def saw(self, url: str, outcome: Outcome) -> None:
        """Note an outcome. Raises MachineError when nothing can be reached any more."""
        if isinstance(outcome, Refused) and outcome.reason in UNREACHED:
            self.failing[host_of(url)] = url
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
        chosen = list({host_of(url): url for url in urls if host_of(url)}.values())[:PROBES]
        with ThreadPoolExecutor(PROBES) as pool:
            failures = [refused for refused in pool.map(self.client.reach, chosen) if refused]
        failures = [refused for refused in failures if refused.reason in UNREACHED]
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
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise MachineError(
            f"download stopped {when}: {cause}. None of {len(chosen)} different hosts can be reached ({counts}), "
            f"first {failures[0].detail!r}. Finished shards are kept; run the stage again when the network is back"
        )


def host_of(url: str) -> str:
    """The host whose turn a URL waits for; empty when it has none."""
    try:
        return target_of(url).host
    except Refused:
        return ""


def fetch_all(urls: Sequence[str], client: Client, threads: int, health: Health) -> dict[str, Outcome]:
    """The outcome of every URL. Raises MachineError when the network on this side is down."""
    return asyncio.run(_Shard(urls, client, threads, health).run())


class _Shard:
    """The books of one shard: each URL is a coroutine of one thread, other threads fetch."""

    def __init__(self, urls: Sequence[str], client: Client, threads: int, health: Health) -> None:
        self.urls, self.client, self.health = urls, client, health
        self.outcomes: dict[str, Outcome] = {}
        self.settled = 0
        self.over = asyncio.Event()
        self.pool, self.free_threads = ThreadPoolExecutor(threads), asyncio.Semaphore(threads)
        self.hosts = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(client.connections_per_host))

    async def run(self) -> dict[str, Outcome]:
        asyncio.get_running_loop().call_later(self.client.rules.shard_seconds, self.over.set)
        try:
            await asyncio.gather(*(self._settle(url) for url in self.urls))
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)
        late = Refused("deadline", "the time of the shard was over before this row could be fetched")
        return {url: self.outcomes.get(url, late) for url in self.urls}

    async def _settle(self, url: str) -> None:
        """Try a URL until it has an outcome that stays, or the shard is over."""
        rules, loop = self.client.rules, asyncio.get_running_loop()
        for attempt in range(1, rules.attempts + 1):
            async with self.hosts[host_of(url)], self.free_threads:  # both serve in the order of arrival
                if self.over.is_set():
                    break
                outcome = await loop.run_in_executor(self.pool, fetch_image, self.client, url)
            self.outcomes[url] = outcome
            self.health.saw(url, outcome)
            passes = isinstance(outcome, Refused) and outcome.reason in TRANSIENT
            if not passes or attempt == rules.attempts:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(self.over.wait(), rules.backoff_seconds * 2 ** (attempt - 1))
        self.settled += 1
        if self.settled == math.ceil(TAIL * len(self.urls)):
            loop.call_later(rules.tail_seconds, self.over.set)


# --------------------------------------------------------------------------------------- the worker


class Download(Materialize):
    """A range of a list of URLs -> image-text shard."""

    def __init__(self, card: Card, web: WebAccess, workers: int) -> None:
        """workers: how many share the connections that a host may have. Raises ConfigError where they are too many."""
        if workers > web.connections_per_host:
            raise ConfigError(
                f"{cluster_file()}: {workers} download workers, but connections_per_host is "
                f"{web.connections_per_host}: each worker needs at least one. Use fewer workers, or raise "
                f"web.connections_per_host"
            )
        super().__init__(card)
        rules = parse(UrlList, card.source.options, f"card {card.name}", "source.options").fetch
        self.threads, self.client = web.threads, Client(rules, web.connections_per_host // workers, web.proxy)
        self.health: Health | None = None

    def rows(self, task: ShardTask) -> Iterator[Row | RowError]:
        """The rows of one slice with their images; of each URL one image, though some URLs come more than once."""
        listed = list(super().rows(task))
        yield from (row for row in listed if isinstance(row, RowError))
        wanted = [row for row in listed if not isinstance(row, RowError)]
        self._check_columns(wanted, task)
        urls = list(dict.fromkeys(row["url"] for row in wanted))
        if self.health is None:
            self.health = Health(self.client)
            self.health.preflight(urls)
        outcomes = (ENGINE or fetch_all)(urls, self.client, self.threads, self.health)
        for row in wanted:
            outcome = outcomes[row["url"]]
            if isinstance(outcome, Refused):
                yield RowError(row["key"], outcome.reason, outcome.detail, url=row["url"])
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

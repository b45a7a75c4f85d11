"""One URL in, the bytes of its answer out, or why not: every connection goes to an address that was checked.

A host name is resolved once, its addresses are checked, and the socket is connected to one of those very
addresses, for the first request, for robots.txt and for each redirect. Time is limited on the socket: before every
read and write the time left of the whole attempt becomes its timeout, so that neither slow headers nor slow
bodies outlast it. Nothing is global and nothing is read from the environment, proxies included.
"""

import http.client
import io
import re
import socket
import ssl
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from protego import Protego

from unifork.errors import MachineError
from unifork.sources.url_lists import FetchRules
from unifork.sources.web.permission import (
    MAX_ROBOTS_BYTES,
    Refused,
    Target,
    parse_robots,
    refusal,
    reservation,
    resolve,
    target_of,
)

CONNECT_SECONDS = 10.0
"""Most time for one address of a host, so that a dead one leaves time for the next."""
IDLE_SECONDS = 15.0
"""Most time in which no byte comes or goes."""
FRAMING_BYTES = 1024**2
"""Bytes of a connection beside those of the body: headers, and the sizes of chunks."""
REMEMBERED = 50_000
"""Hosts and robots.txt files kept in memory; with one more all are forgotten."""
REMEMBERED_SECONDS = 3600.0
"""Age at which an address or a robots.txt is asked for again."""
HEADERS = "Connection: close\r\nAccept: image/*,*/*;q=0.5\r\nAccept-Encoding: identity\r\n\r\n"
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")


class TooMuch(Exception):
    """More bytes came over a connection than any allowed answer needs."""


class Clock:
    """The time left of one attempt."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.heard = False
        """Whether a byte came from the web."""

    def left(self, most: float = float("inf")) -> float:
        """Seconds left, at most `most`. Raises TimeoutError when there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return min(seconds, most)


class _Limited(io.RawIOBase):
    """A connected socket as `http.client` uses one: at most so many bytes come in, and every operation has a timeout.

    That is the time left, or IDLE_SECONDS if that is shorter. Raises TooMuch beyond the bytes.
    """

    def __init__(self, sock: socket.socket, clock: Clock, most_bytes: int) -> None:
        self.sock, self.clock, self.bytes_left, self.timeout = sock, clock, most_bytes, 0.0

    def sendall(self, data: Any) -> None:
        self._limit()
        self.sock.sendall(data)  # its timeout is for all of the data

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._limit()
        count = self.sock.recv_into(buffer)
        self.bytes_left -= count
        self.clock.heard = self.clock.heard or count > 0
        if self.bytes_left < 0:
            raise TooMuch
        return count

    def _limit(self) -> None:
        if (seconds := self.clock.left(IDLE_SECONDS)) != self.timeout:
            self.timeout = seconds
            self.sock.settimeout(seconds)  # a system call, and a turn of another thread

    def close(self) -> None:
        """Nothing: `http.client` closes its socket while it still reads from it; who connected it closes it."""


class _Response(http.client.HTTPResponse):
    """An answer read as the standards say where `http.client` is lenient: `int` takes `-1`, `0x10` and `1_0` too."""

    def _read_status(self) -> tuple[str, int, str]:
        """The first line of what is no interim answer (1xx; RFC 9110, 15.2)."""
        while 100 <= (found := super()._read_status())[1] < 200:  # type: ignore[misc]
            http.client.parse_headers(self.fp)
        return found  # type: ignore[no-any-return]

    def _read_next_chunk_size(self) -> int:
        """The size in the line before a chunk (RFC 9112, 7.1)."""
        line = self.fp.readline(1024)
        if not line.endswith(b"\n"):
            raise http.client.IncompleteRead(b"")
        digits = line.partition(b";")[0].strip()
        if not CHUNK_SIZE.fullmatch(digits):
            raise http.client.HTTPException(f"a chunk of size {digits[:40]!r}")
        return int(digits, 16)


class Guard:
    """Fetches URLs by the rules of a card; used by many threads at once.

    agent: the name that robots.txt and X-Robots-Tag may address, lower-case and without a version.
    """

    def __init__(self, rules: FetchRules, connections_per_host: int, proxy: str | None = None) -> None:
        self.rules, self.connections_per_host, self.proxy = rules, connections_per_host, proxy
        self.agent = rules.user_agent.split()[0].split("/")[0].lower()
        self.tls, self._lock = ssl.create_default_context(), threading.Lock()
        self._memory: dict[Any, tuple[float, Any]] = {}
        self._slots: WeakValueDictionary[Any, threading.Semaphore] = WeakValueDictionary()

    # ------------------------------------------------------------------------------------- requests

    def get(self, target: Target) -> bytes:
        """The body of a URL, after redirects, unchanged. Raises Refused."""
        with self._answer(target, Clock(self.rules.timeout_seconds), asking=True) as (last, answer):
            if answer.status != 200:
                raise Refused(f"http_{answer.status}", f"{last.authority}{last.path}"[:300])
            body, missing = _body(answer, self.rules.max_bytes)
        if missing:
            raise missing
        return body

    def reach(self, url: str) -> Refused | None:
        """Resolve the host of a URL, connect and hang up; why that is not possible."""
        clock = Clock(CONNECT_SECONDS)
        try:
            target = target_of(url)
            with _classified(target, clock), self._connected(target, clock):
                return None
        except Refused as refused:
            return refused

    @contextmanager
    def _answer(self, target: Target, clock: Clock, asking: bool) -> Iterator[tuple[Target, http.client.HTTPResponse]]:
        """What redirects lead to, and its answer, whose body is not read yet. Raises Refused.

        asking: for leave, of the robots.txt of every host and the headers of every answer.
        """
        for _ in range(self.rules.max_redirects + 1):
            if asking and self.rules.robots:
                self._check_robots(target, clock)
            with self._requested(target, clock) as answer:
                reserved = asking and self.rules.opt_out and reservation(answer.getheaders(), self.agent)
                if reserved:
                    raise Refused("opted_out", reserved[:300])
                location = answer.msg.get("location")
                if location is None or answer.status not in REDIRECTS:
                    yield target, answer
                    return
            # headers arrive as Latin-1
            target = target_of(location.encode("latin-1").decode("utf-8", "replace"), target.url)
        raise Refused("too_many_redirects", f"more than {self.rules.max_redirects}, the last to {target.url:.300}")

    def _check_robots(self, target: Target, clock: Clock) -> None:
        """Raise Refused for what robots.txt denies, and when its host cannot be asked."""
        key = "robots", target.origin
        with _classified(target, clock), self._slot(key, 1, clock):  # the first row asks, others wait
            robots = self._remembered(key, lambda: self._ask_robots(target, clock))
        if not robots.can_fetch(target.url, self.agent):
            raise Refused("robots_denied", f"robots.txt of {target.authority}")

    def _ask_robots(self, target: Target, clock: Clock) -> Protego:
        """RFC 9309: no file (4xx) allows everything, a server in trouble (5xx) nothing for now."""
        body = b""
        try:
            with self._answer(target._replace(path="/robots.txt"), clock, asking=False) as (_, answer):
                if answer.status >= 500:
                    raise Refused(f"http_{answer.status}", f"robots.txt of {target.authority}")
                if answer.status == 200:
                    body, _missing = _body(answer, MAX_ROBOTS_BYTES)
        except Refused as refused:
            if refused.reason != "too_many_redirects":
                raise
        return parse_robots(body.decode("utf-8", "replace"), self.agent)

    @contextmanager
    def _requested(self, target: Target, clock: Clock) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request. Raises Refused."""
        request = f"GET {target.path} HTTP/1.1\r\nHost: {target.authority}\r\nUser-Agent: {self.rules.user_agent}\r\n"
        with (
            _classified(target, clock),
            self._slot(("host", target.host), self.connections_per_host, clock),
            self._connected(target, clock) as sock,
        ):
            limited: Any = _Limited(sock, clock, self.rules.max_bytes + FRAMING_BYTES)
            limited.sendall((request + HEADERS).encode("ascii"))
            with _Response(limited, method="GET") as answer:
                answer.begin()
                yield answer

    @contextmanager
    def _slot(self, key: Any, places: int, clock: Clock) -> Iterator[None]:
        """One of some places, waited for as long as the clock runs."""
        with self._lock:  # a semaphore lives as long as somebody holds or awaits a place
            slots = self._slots.get(key) or self._slots.setdefault(key, threading.Semaphore(places))
        if not slots.acquire(timeout=clock.left()):
            raise TimeoutError
        try:
            yield
        finally:
            slots.release()

    # ---------------------------------------------------------------------------------- connections

    @contextmanager
    def _connected(self, target: Target, clock: Clock) -> Iterator[socket.socket]:
        """A socket connected to a checked address of a host, with TLS where the scheme asks for it."""
        failure: OSError = ConnectionError("no address")
        for address in self._addresses(target, clock):
            try:
                sock = self._open(address, target.port, clock)
                break
            except OSError as error:
                failure = error
        else:
            raise failure
        with sock:
            sock.settimeout(clock.left())
            secure = target.scheme == "https"
            with self.tls.wrap_socket(sock, server_hostname=target.host) if secure else nullcontext(sock) as ready:
                yield ready

    def _open(self, address: str, port: int, clock: Clock) -> socket.socket:
        """A connection to exactly this address, through the configured proxy if there is one."""
        proxy = urlsplit(self.proxy) if self.proxy else None
        place = (proxy.hostname or "", proxy.port or 3128) if proxy else (address, port)
        sock = socket.create_connection(place, clock.left(CONNECT_SECONDS))
        if proxy:
            there = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            limited = _Limited(sock, clock, FRAMING_BYTES)
            limited.sendall(f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n\r\n".encode())
            answer = http.client.HTTPResponse(limited, method="CONNECT")  # type: ignore[arg-type]
            answer.begin()
            if answer.status != 200:
                raise ConnectionError(f"the proxy {self.proxy} answered {answer.status} for {there}")
        return sock

    def _addresses(self, target: Target, clock: Clock) -> list[str]:
        """The addresses of a host that may be contacted. Raises Refused when there are none."""
        found = self._remembered(("addresses", target.host), lambda: resolve(target.host, clock.left()))
        if not found:
            raise Refused("no_such_host", f"{target.host}: the resolver does not know it"[:300], target.host)
        whys = {address: refusal(address, self.rules.allow_addresses) for address in found}
        allowed = [address for address, why in whys.items() if why is None]
        if not allowed:
            reasons = ", ".join(f"{address} is {why}" for address, why in whys.items())
            raise Refused("forbidden_address", f"{target.host}: {reasons}"[:300], target.host)
        return allowed

    def _remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value made for a key within the last hour, else a new one."""
        made_at, value = self._memory.get(key, (float("-inf"), None))
        if time.monotonic() - made_at >= REMEMBERED_SECONDS:
            value = make()
            if len(self._memory) >= REMEMBERED:
                self._memory.clear()
            self._memory[key] = time.monotonic(), value
        return value


CLASSES: dict[type[Exception], str] = {
    TimeoutError: "timeout",
    socket.gaierror: "dns_failure",
    ssl.SSLError: "tls_failed",
    OSError: "connection_failed",
    UnicodeError: "bad_url",  # no host name
    http.client.HTTPException: "bad_answer",
    TooMuch: "too_large",
}
"""What a connection may raise, and the class of its row; the first that fits counts."""


@contextmanager
def _classified(target: Target, clock: Clock) -> Iterator[None]:
    """Turn what a connection may raise into Refused with its class."""
    try:
        yield
    except tuple(CLASSES) as error:
        reason = next(reason for kind, reason in CLASSES.items() if isinstance(error, kind))
        host = "" if clock.heard else target.host
        raise Refused(reason, f"{target.authority}: {type(error).__name__}: {error}"[:300], host) from error


def _body(answer: http.client.HTTPResponse, most: int) -> tuple[bytes, Refused | None]:
    """At most `most` bytes of a body, and why they are not all of it; inflated where it came as gzip all the same.

    Read piece by piece, as it comes, so that nothing is read at once that a server says to be large.
    """
    announced, body, length = answer.length or 0, bytearray(), 0
    zipped = answer.msg.get("content-encoding", "").strip().lower() in ("gzip", "x-gzip")
    inflate = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS) if zipped else None
    if 0 < announced <= most and not zipped:
        whole = answer.read(announced)
        return whole, None if len(whole) == announced else Refused("truncated", f"{len(whole)} bytes of {announced}")
    try:
        while len(body) <= most and (part := answer.read1(64 * 1024)):
            length += len(part)
            body += inflate.decompress(part, most + 1 - len(body)) if inflate else part
    except (http.client.IncompleteRead, zlib.error) as error:
        reason = "bad_answer" if isinstance(error, zlib.error) else "truncated"
        return bytes(body), Refused(reason, f"after {length} bytes: {error}"[:300])
    except TooMuch:
        announced = most + 1
    if max(len(body), announced) > most:
        return bytes(body[:most]), Refused("too_large", f"more than {most} bytes")
    if length < announced or (inflate and length and not inflate.eof):
        return bytes(body), Refused("truncated", f"{length} bytes of {announced or 'more'}")
    return bytes(body), None


# ------------------------------------------------------------------------------------ the network

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


class Network:
    """Tells a list of dead links from a machine without a network."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.failing: dict[str, str] = {}
        self.alive: deque[str] = deque(maxlen=PROBES)
        self.looked_at = False

    def preflight(self, urls: Sequence[str]) -> None:
        """Probe some hosts of a list before anything else. Raises MachineError when none can be reached."""
        if not self.looked_at:
            self.looked_at = True
            self.probe(urls[:: max(1, len(urls) // PROBES)], "before the first row")

    def saw(self, url: str, reason: str | None) -> None:
        """Note the class of an outcome, None for an image. Raises MachineError when nothing can be reached any more."""
        if reason in UNREACHED:
            self.failing[urlsplit(url).netloc] = url
            if len(self.failing) < SUSPICIOUS_HOSTS:
                return
            self.probe([*self.alive, *self.failing.values()], f"after {len(self.failing)} hosts failed in a row")
        elif reason in UNASKED:
            return
        else:
            self.alive.append(url)
        self.failing.clear()

    def probe(self, urls: Iterable[str], when: str) -> None:
        """Try to reach the first few hosts. Raises MachineError when none answers, which is no fault of theirs."""
        chosen = list({urlsplit(url).netloc: url for url in urls}.values())[:PROBES]
        with ThreadPoolExecutor(PROBES) as pool:
            failures = [why for why in pool.map(self.guard.reach, chosen) if why and why.reason in UNREACHED]
        reasons = {failure.reason for failure in failures}
        if not failures or len(failures) < len(chosen) or (reasons != {"dns_failure"} and len(failures) < FEW_PROBES):
            return
        names = reasons <= {"dns_failure", "no_such_host"}
        cause = "no name is resolved (DNS)" if names else "no connection leaves it (firewall, or a missing `web.proxy`)"
        raise MachineError(
            f"download stopped {when}: this machine has no network: {cause}. None of {len(chosen)} hosts can be "
            f"reached, first {str(failures[0])!r}. Finished shards are kept; run the stage again when it is back"
        )

"""One URL in, the bytes of its answer out, or why not: every connection goes to an address that was checked.

A host name is resolved once, its addresses are checked, and the socket is connected to one of those very
addresses, for the first request, for robots.txt and for each redirect. Time is limited on the socket: before every
read and write the time left of the whole attempt becomes its timeout, so that neither slow headers nor slow
bodies outlast it. Nothing is global and nothing is read from the environment, proxies included.
"""

import http.client
import io
import queue
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from weakref import WeakValueDictionary

from unifork.sources.url_lists import FetchRules
from unifork.sources.web.permission import MAX_ROBOTS_BYTES, Rule, may_fetch, parse_robots, refusal, reservation

CONNECT_SECONDS = 10.0
"""Most time for one address of a host, so that a dead one leaves time for the next."""
REMEMBERED = 50_000
"""Hosts and robots.txt files kept in memory; the least recently used is forgotten."""
REMEMBERED_SECONDS = 3600.0
"""Age at which an address or a robots.txt is asked for again."""
REDIRECTS = (301, 302, 303, 307, 308)
PATH_SAFE = "%/:=&?~#+!$,;'@()*[]"
"""What lists leave as it is in a path; everything else, such as spaces and letters beyond ASCII, is quoted."""


class Refused(Exception):
    """Why a row has no picture: a class to count by, and a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Target:
    """A URL that may be asked for."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """What a robots.txt is valid for."""
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        """The value of the header Host."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return name if self.port == (443 if self.scheme == "https" else 80) else f"{name}:{self.port}"


def target_of(url: str) -> Target:
    """A URL taken apart. Raises Refused (`bad_url`) for anything but http and https with a host."""
    try:
        parts = urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:
        raise Refused("bad_url", f"{error}: {url!r:.300}") from None
    if parts.scheme not in ("http", "https") or not host or port == 0:
        raise Refused("bad_url", f"not http(s)://HOST: {url!r:.300}")
    if any(char <= " " or char == "\x7f" for char in host):
        raise Refused("bad_url", f"control character in the host: {url!r:.300}")
    path = quote(parts.path or "/", safe=PATH_SAFE) + (f"?{quote(parts.query, safe=PATH_SAFE)}" if parts.query else "")
    return Target(parts.scheme, host.lower(), port or (443 if parts.scheme == "https" else 80), path)


def joined(url: str, location: str) -> str:
    """Where a redirect leads. Raises Refused (`bad_url`)."""
    try:
        return urljoin(url, location.encode("latin-1").decode("utf-8", "replace"))  # headers arrive as Latin-1
    except ValueError as error:
        raise Refused("bad_url", f"redirect: {error}: {location!r:.300}") from None


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    missing: tuple[str, str] | None
    """Class and detail when the body is not whole."""

    @property
    def location(self) -> str | None:
        """The target of a redirect; None when the answer is none."""
        found = [value for name, value in self.headers if name.lower() == "location"]
        return found[0] if found and self.status in REDIRECTS else None


class Clock:
    """The time left of one attempt."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self, most: float = float("inf")) -> float:
        """Seconds left, at most `most`. Raises TimeoutError when there are none."""
        seconds = self.end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return min(seconds, most)


class _Limited:
    """A connected socket as `http.client` uses one, with the time left as the timeout of every single operation."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self.sock, self.clock = sock, clock

    def sendall(self, data: Any) -> None:
        self.sock.settimeout(self.clock.left())
        self.sock.sendall(data)  # its timeout is for all of the data

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reader(self.sock, self.clock))

    def close(self) -> None:
        """Nothing: `http.client` closes its socket while it still reads from it; the opener closes the real one."""


class _Reader(io.RawIOBase):
    """The receiving side of a socket."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self.sock, self.clock = sock, clock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(self.clock.left())
        return self.sock.recv_into(buffer)


class Client:
    """Fetches URLs by the rules of a card; used by many threads at once."""

    def __init__(self, rules: FetchRules, connections_per_host: int, proxy: str | None = None) -> None:
        self.rules, self.connections_per_host, self.proxy = rules, connections_per_host, proxy
        self.tls = ssl.create_default_context()
        self._lock = threading.Lock()
        self._memory: OrderedDict[Any, tuple[float, Any]] = OrderedDict()
        self._slots: WeakValueDictionary[Any, threading.Semaphore] = WeakValueDictionary()

    # ------------------------------------------------------------------------------------- requests

    def get(self, url: str) -> bytes:
        """The body of a URL, after redirects, unchanged. Raises Refused."""
        clock = Clock(self.rules.timeout_seconds)
        for _ in range(self.rules.max_redirects + 1):
            target = target_of(url)
            if self.rules.robots and not may_fetch(self._robots(target, clock), target.path):
                raise Refused("robots_denied", f"robots.txt of {target.authority}")
            answer = self._request(target, clock, self.rules.max_bytes)
            reserved = reservation(answer.headers, self.rules.agent) if self.rules.opt_out else None
            if reserved:
                raise Refused("opted_out", reserved[:300])
            if answer.status == 200:
                if answer.missing:
                    raise Refused(*answer.missing)
                return answer.body
            if answer.location is None:
                raise Refused(f"http_{answer.status}", f"{target.authority}{target.path}"[:300])
            url = joined(url, answer.location)
        raise Refused("too_many_redirects", f"more than {self.rules.max_redirects}, the last to {url!r:.300}")

    def reach(self, url: str) -> None:
        """Resolve the host of a URL, connect and hang up. Raises Refused."""
        clock, target = Clock(CONNECT_SECONDS), target_of(url)
        with _classified(target):
            self._connect(target, clock).close()

    def _request(self, target: Target, clock: Clock, most: int) -> Answer:
        """The answer to one request, with the first `most` bytes of its body. Raises Refused."""
        with (
            _classified(target),
            self._slot(("host", target.host), self.connections_per_host, clock),
            closing(self._connect(target, clock)) as sock,
        ):
            connection = http.client.HTTPConnection(target.host, target.port)
            connection.sock = _Limited(sock, clock)
            headers = {
                "Host": target.authority,
                "User-Agent": self.rules.user_agent,
                "Accept": "image/*,*/*;q=0.5",
                "Accept-Encoding": "identity",
                "Connection": "close",
            }
            connection.request("GET", target.path, headers=headers)
            with connection.getresponse() as response:
                body, missing = _body(response, most) if response.status == 200 else (b"", None)
                return Answer(response.status, response.getheaders(), body, missing)

    def _robots(self, target: Target, clock: Clock) -> list[Rule]:
        """The rules of a host's robots.txt. Raises Refused when the host cannot be asked."""
        with _classified(target), self._slot(("robots", target.origin), 1, clock):  # asked once, by the first row
            rules: list[Rule] = self._remembered(("robots", target.origin), lambda: self._ask_robots(target, clock))
            return rules

    def _ask_robots(self, target: Target, clock: Clock) -> list[Rule]:
        """RFC 9309: no file (4xx) allows everything, a server in trouble (5xx) nothing for now."""
        url = f"{target.scheme}://{target.authority}/robots.txt"
        for _ in range(self.rules.max_redirects + 1):
            answer = self._request(target_of(url), clock, MAX_ROBOTS_BYTES)
            if answer.status >= 500:
                raise Refused(f"http_{answer.status}", f"robots.txt of {target.authority}")
            if answer.location is None:
                return parse_robots(answer.body.decode("utf-8", "replace"), self.rules.agent)
            url = joined(url, answer.location)
        return []

    @contextmanager
    def _slot(self, key: Any, places: int, clock: Clock) -> Iterator[None]:
        """One of some places, waited for as long as the clock runs."""
        with self._lock:
            slots = self._slots.get(key)
            if slots is None:  # lives as long as somebody holds or awaits a place
                slots = self._slots[key] = threading.Semaphore(places)
        if not slots.acquire(timeout=clock.left()):
            raise TimeoutError
        try:
            yield
        finally:
            slots.release()

    # ---------------------------------------------------------------------------------- connections

    def _connect(self, target: Target, clock: Clock) -> socket.socket:
        """A socket connected to a checked address of a host, with TLS where the scheme asks for it."""
        failure: OSError = ConnectionError("no address")
        for address in self._addresses(target, clock):
            try:
                sock = self._open(address, target.port, clock)
            except OSError as error:
                failure = error
                continue
            if target.scheme == "http":
                return sock
            try:
                sock.settimeout(clock.left())
                return self.tls.wrap_socket(sock, server_hostname=target.host)
            except BaseException:
                sock.close()
                raise
        raise failure

    def _open(self, address: str, port: int, clock: Clock) -> socket.socket:
        """A connection to exactly this address, through the configured proxy if there is one."""
        if self.proxy is None:
            return socket.create_connection((address, port), clock.left(CONNECT_SECONDS))
        proxy = urlsplit(self.proxy)
        sock = socket.create_connection((proxy.hostname or "", proxy.port or 3128), clock.left(CONNECT_SECONDS))
        try:
            limited = _Limited(sock, clock)
            there = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            limited.sendall(f"CONNECT {there} HTTP/1.1\r\nHost: {there}\r\n\r\n".encode())
            answer = http.client.HTTPResponse(limited, method="CONNECT")  # type: ignore[arg-type]
            answer.begin()
            if answer.status != 200:
                raise ConnectionError(f"the proxy {self.proxy} answered {answer.status} for {there}")
        except BaseException:
            sock.close()
            raise
        return sock

    def _addresses(self, target: Target, clock: Clock) -> list[str]:
        """The addresses of a host that may be contacted. Raises Refused when there are none."""
        found = self._remembered(("addresses", target.host), lambda: _resolve(target.host, clock))
        whys = {address: refusal(address, self.rules.allow_addresses) for address in found}
        allowed = [address for address, why in whys.items() if why is None]
        if not allowed:
            told = ", ".join(f"{address} is {why}" for address, why in whys.items())
            raise Refused("forbidden_address", f"{target.host}: {told}"[:300])
        return allowed

    def _remembered(self, key: Any, make: Any) -> Any:
        """The value made for a key within the last hour, else a new one."""
        now = time.monotonic()
        with self._lock:
            made, value = self._memory.get(key, (float("-inf"), None))
            if now - made < REMEMBERED_SECONDS:
                self._memory.move_to_end(key)
                return value
        value = make()  # outside the lock: it may take seconds
        with self._lock:
            self._memory[key] = now, value
            while len(self._memory) > REMEMBERED:
                self._memory.popitem(last=False)
        return value


@contextmanager
def _classified(target: Target) -> Iterator[None]:
    """Turns what a connection may raise into Refused with its class."""
    place = target.authority
    try:
        yield
    except TimeoutError as error:
        raise Refused("timeout", place) from error
    except ssl.SSLError as error:
        raise Refused("tls_failed", f"{place}: {error}"[:300]) from error
    except OSError as error:
        raise Refused("connection_failed", f"{place}: {error}"[:300]) from error
    except http.client.InvalidURL as error:
        raise Refused("bad_url", f"{place}: {error}"[:300]) from error
    except http.client.HTTPException as error:
        raise Refused("bad_answer", f"{place}: {type(error).__name__}: {error}"[:300]) from error


def _body(response: http.client.HTTPResponse, most: int) -> tuple[bytes, tuple[str, str] | None]:
    """At most `most` bytes of a body, and class and detail of what is missing, if anything is."""
    announced = response.length or 0
    parts, size = [], 0
    try:
        while size <= most and (part := response.read(min(64 * 1024, most + 1 - size))):
            size += len(part)
            parts.append(part)
    except http.client.IncompleteRead:
        return b"".join(parts), ("truncated", f"the connection ended after {size} bytes")
    if max(size, announced) > most:
        return b"".join(parts)[:most], ("too_large", f"more than {most} bytes")
    if size < announced:
        return b"".join(parts), ("truncated", f"{size} bytes of {announced}")
    return b"".join(parts), None


def _resolve(host: str, clock: Clock) -> list[str]:
    """The addresses of a host, in the resolver's order. Raises Refused."""
    answers: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            answers.put(list(dict.fromkeys(str(entry[4][0]) for entry in found)))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    # the resolver knows no deadline: its thread is left to itself when time is up
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=clock.left())
    except queue.Empty:
        raise Refused("dns_failure", f"{host}: no answer in time") from None
    if isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_NONAME:
        raise Refused("no_such_host", host)
    if isinstance(answer, UnicodeError):
        raise Refused("bad_url", f"{host!r:.300}: not a host name")
    if isinstance(answer, OSError):
        raise Refused("dns_failure", f"{host}: {answer}")
    return answer

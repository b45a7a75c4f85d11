"""What may be contacted and fetched: URLs, addresses, robots.txt (RFC 9309), and the headers of an answer.

Addresses are public unicast ones, and the networks a card allows explicitly; which are not public says
`refused_networks.yaml`. robots.txt is read by Protego, since the standard library's parser knows neither `*` nor `$` in
paths, with which lists of images are denied.
"""

import re
import socket
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from protego import Protego

from unifork.config import read_yaml
from unifork.errors import Rejected
from unifork.sources.url_lists import Network

# ------------------------------------------------------------------------------------------- URLs

PORTS = {"http": 80, "https": 443}
"""The schemes that are asked, and where they are when a URL names no port."""
PATH_SAFE = "%/:=&?~#+!$,;'@()*[]"
"""What lists leave as it is in a path; everything else, such as spaces and letters beyond ASCII, is quoted."""


class Refused(Rejected):
    """Why a row has no image, with the host from which nothing came, if that is why."""

    def __init__(self, reason: str, detail: str, host: str = "") -> None:
        super().__init__(reason, detail)
        self.host = host


class Target(NamedTuple):
    """A URL that may be asked for."""

    scheme: str
    host: str
    port: int
    authority: str
    """The value of the header Host."""
    path: str

    @property
    def origin(self) -> str:
        """What a robots.txt is valid for, and the beginning of its URL."""
        return f"{self.scheme}://{self.authority}"

    @property
    def url(self) -> str:
        """All of it again."""
        return self.origin + self.path


def target_of(url: str, base: str = "") -> Target:
    """A URL taken apart, which may be relative to another. Raises Refused (`bad_url`) unless it is http(s)://HOST."""
    try:
        parts = urlsplit(urljoin(base, url.strip()))
        host, port = (parts.hostname or "").rstrip("."), parts.port
        host = host if host.isascii() else host.encode("idna").decode()
    except ValueError as error:
        raise Refused("bad_url", f"{error}: {url!r:.300}") from None
    if parts.scheme not in PORTS or not host or port == 0:
        raise Refused("bad_url", f"not http(s)://HOST: {url!r:.300}")
    if any(char <= " " or char == "\x7f" for char in host):
        raise Refused("bad_url", f"control character in the host: {url!r:.300}")
    host, port = host.lower(), port or PORTS[parts.scheme]
    authority = (f"[{host}]" if ":" in host else host) + (f":{port}" if port != PORTS[parts.scheme] else "")
    query = f"?{quote(parts.query, safe=PATH_SAFE)}" if parts.query else ""
    return Target(parts.scheme, host, port, authority, quote(_without_dots(parts.path), safe=PATH_SAFE) + query)


def _without_dots(path: str) -> str:
    """A path without `.` and `..` (RFC 3986, 5.2.4), which may be escaped."""
    kept: list[str] = []
    segments = re.sub("%2e", ".", path, flags=re.IGNORECASE).split("/")[1:] or [""]
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    return "/" + "/".join(kept + [""] * (segments[-1] in (".", "..")))


# --------------------------------------------------------------------------------------- addresses

PUBLIC_V6 = IPv6Network("2000::/3")
"""The only block of which IANA has assigned global unicast addresses."""
ISATAP = (0x00005EFE, 0x02005EFE)
"""Upper half of an interface identifier that wraps an IPv4 address (RFC 5214)."""

_NOT_PUBLIC = Path(__file__).with_name("refused_networks.yaml")
_TABLE: list[tuple[Network, str]] = [(ip_network(network), why) for network, why in read_yaml(_NOT_PUBLIC).items()]


@lru_cache(2**16)
def refusal(text: str, allowed: tuple[Network, ...] = ()) -> str | None:
    """Why an address must not be contacted; None when it may. Anything but an address is refused."""
    try:
        address = ip_address(text)
    except ValueError:
        return "not an address"
    if any(address in network for network in allowed):
        return None
    for network, why in _TABLE:
        if address in network:
            return why
    if isinstance(address, IPv6Address):
        if address not in PUBLIC_V6:
            return "reserved"
        if (int(address) >> 32) & 0xFFFFFFFF in ISATAP:
            return "ISATAP"
    return None


def resolve(host: str, seconds: float) -> list[str]:
    """The addresses of a host, in the resolver's order; none for a name that does not exist.

    Raises gaierror, UnicodeError or TimeoutError.
    """
    answer: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))
        except Exception as error:  # raised again in the thread that waits
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_NONAME:
                answer.set_result([])
            else:
                answer.set_exception(error)

    # the resolver knows no deadline: its thread is left to itself when time is up
    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answer.result(seconds)
    except TimeoutError:
        raise socket.gaierror(socket.EAI_AGAIN, "no answer in time") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


# ----------------------------------------------------------------------------- robots.txt and headers

RESERVED = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag that reserve an image: against training, or against copies in an index."""
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives of X-Robots-Tag that hold a colon themselves."""
MAX_ROBOTS_BYTES = 512 * 1024
"""RFC 9309 asks to read at least 500 KiB."""

_NAMED = re.compile(r"\s*user[- ]?agent[\s:]+([^\s/#*]+).*", re.IGNORECASE)
"""A line of robots.txt that addresses somebody, by a name that a version or remark may follow."""
_NAME = re.compile(r"[a-z*]")
_SOMEBODY_ELSE = "/"
"""A name that none has."""


def parse_robots(text: str, agent: str) -> Protego:
    """A robots.txt, to be asked by its method `can_fetch` for this agent (lower-case name).

    Names are compared here, as a whole: Protego finds them anywhere in that of the agent.
    """
    lines = []
    for line in text.removeprefix("\ufeff").splitlines():
        named = _NAMED.fullmatch(line)
        who = agent if named and named[1].lower() == agent else _SOMEBODY_ELSE
        lines.append(f"User-agent: {who}" if named else line)
    return Protego.parse("\n".join(lines))


def reservation(headers: Iterable[tuple[str, str]], agent: str) -> str | None:
    """The header by which an answer reserves its content for this agent (lower-case name); None without one."""
    for name, value in headers:
        if name.lower() == "tdm-reservation" and value.strip() == "1":
            return f"{name}: {value}"
        if name.lower() != "x-robots-tag":
            continue
        addressed = agent
        for part in re.split("[,;]", value.lower()):
            before, colon, after = part.partition(":")
            directives = before.split()
            who = directives.pop() if colon and directives else ""
            if directives and addressed in (agent, "*") and not RESERVED.isdisjoint(directives):
                return f"{name}: {value}"
            if who in WITH_VALUE or not _NAME.match(who):  # their values hold colons too, as times do
                continue
            addressed = who.partition("/")[0]  # `name: directive` addresses it and what follows to one agent
            if addressed in (agent, "*") and not RESERVED.isdisjoint(after.split()):
                return f"{name}: {value}"
    return None

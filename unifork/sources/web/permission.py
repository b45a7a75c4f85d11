"""What may be contacted and fetched: addresses, robots.txt (RFC 9309), and the headers of an answer.

Addresses are public unicast ones, and the networks a card allows explicitly; which are not public says
`refused_networks.yaml`. robots.txt is read by Protego, since the standard library's parser knows neither `*` nor `$` in
paths, with which lists of images are denied.
"""

import re
from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path

from protego import Protego

from unifork.config import read_yaml
from unifork.sources.url_lists import Network

# --------------------------------------------------------------------------------------- addresses

PUBLIC_V6 = IPv6Network("2000::/3")
"""The only block of which IANA has assigned global unicast addresses."""
ISATAP = (0x00005EFE, 0x02005EFE)
"""Upper half of an interface identifier that wraps an IPv4 address (RFC 5214)."""

_NOT_PUBLIC = Path(__file__).with_name("refused_networks.yaml")
_TABLE: list[tuple[Network, str]] = [(ip_network(network), why) for network, why in read_yaml(_NOT_PUBLIC).items()]


def refusal(text: str, allowed: Iterable[Network] = ()) -> str | None:
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

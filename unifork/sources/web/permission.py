"""What may be contacted and fetched: addresses, robots.txt (RFC 9309), and the headers of an answer.

Addresses are public unicast ones, and the networks a card allows explicitly. Their tables are written out from
IANA's special-purpose registries, since `ipaddress.is_global` differs between Python releases. The parser of
robots.txt is an own one: the standard library's knows neither `*` nor `$` in paths, with which lists of images are
denied.
"""

from collections.abc import Iterable
from ipaddress import IPv6Address, IPv6Network, ip_address, ip_network
from typing import NamedTuple

from unifork.sources.url_lists import Network

# --------------------------------------------------------------------------------------- addresses

REFUSED_V4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared by a provider (carrier-grade NAT)",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "metadata service of a cloud",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "IETF protocol assignments",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relays",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
REFUSED_V6 = {
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::/96": "IPv4-compatible",
    "::ffff:0:0/96": "IPv4-mapped",
    "::ffff:0:0:0/96": "IPv4-translated",
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "NAT64",
    "2001::/32": "Teredo",
    "2001::/23": "IETF protocol assignments",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
}
PUBLIC_V6 = IPv6Network("2000::/3")
"""The only block of which IANA has assigned global unicast addresses."""
ISATAP = (0x00005EFE, 0x02005EFE)
"""Upper half of an interface identifier that wraps an IPv4 address (RFC 5214)."""

_TABLE = [(ip_network(network), why) for network, why in {**REFUSED_V4, **REFUSED_V6}.items()]


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
"""Directives of X-Robots-Tag that reserve a picture: against training, or against copies in an index."""
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives of X-Robots-Tag that hold a colon themselves."""
MAX_ROBOTS_BYTES = 512 * 1024
"""RFC 9309 asks to read at least 500 KiB."""


class Rule(NamedTuple):
    """One line `Allow` or `Disallow`."""

    allow: bool
    path: str


def parse_robots(text: str, agent: str) -> list[Rule]:
    """The rules of a robots.txt for an agent (lower-case name): those of its groups, else those of `*`."""
    groups: dict[str, list[Rule]] = {}
    names: list[str] = []
    in_names = False
    for line in text.splitlines():
        field, _, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if field == "user-agent":
            names = [*names, value.lower()] if in_names else [value.lower()]
            in_names = True
            groups.setdefault(value.lower(), [])
        elif field in ("allow", "disallow"):
            in_names = False
            if value:
                for name in names:
                    groups[name].append(Rule(field == "allow", value))
    return groups.get(agent, groups.get("*", []))


def may_fetch(rules: Iterable[Rule], path: str) -> bool:
    """Whether rules allow a path with its query: the longest matching rule decides, `Allow` at equal length."""
    matching = [(len(rule.path), rule.allow) for rule in rules if _matches(rule.path, path)]
    return max(matching)[1] if matching else True


def _matches(pattern: str, path: str) -> bool:
    """Without regular expressions, whose cost a hostile pattern could make exponential."""
    first, *parts = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    end, position = pattern.endswith("$"), len(first)
    if not parts:
        return not end or position == len(path)
    for part in parts[:-1]:
        found = path.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    if end:
        return path.endswith(parts[-1]) and len(path) - len(parts[-1]) >= position
    return parts[-1] in path[position:]


def reservation(headers: Iterable[tuple[str, str]], agent: str) -> str | None:
    """The header by which an answer reserves its content for this agent (lower-case name); None without one."""
    for name, value in headers:
        if name.lower() == "tdm-reservation" and value.strip() == "1":
            return f"{name}: {value}"
        if name.lower() != "x-robots-tag":
            continue
        addressed = agent
        for part in value.lower().split(","):
            who, colon, directive = part.partition(":")
            if colon and who.strip() in WITH_VALUE:
                continue
            if colon:  # `name: directive` addresses it and what follows to one agent
                addressed = who.strip()
            if addressed in (agent, "*") and (directive if colon else who).strip() in RESERVED:
                return f"{name}: {value}"
    return None

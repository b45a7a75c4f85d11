"""Which addresses may be contacted: public unicast ones, and the networks a card allows explicitly.

In: an address as the resolver gave it. Out: why it is refused, or None. The networks are written out from
IANA's special-purpose registries, since `ipaddress.is_global` differs between Python releases.
"""

from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

Network = IPv4Network | IPv6Network

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

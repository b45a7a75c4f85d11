"""The options of a `url_list` source: which tables, which columns, and the rules every URL is fetched by.

They are part of the card, since they decide which rows come out; another value makes the shards anew.
"""

from ipaddress import IPv4Network, IPv6Network
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from unifork.config.base import Plain

Network = IPv4Network | IPv6Network


class FetchRules(Plain):
    """What may be fetched, and at what cost."""

    allow_addresses: tuple[Network, ...] = ()
    """Networks that may be contacted although they are not public: tests and intranets."""
    max_bytes: PositiveInt = 32 * 1024**2
    """Largest body of an answer; the connection is closed at the next byte."""
    max_pixels: PositiveInt = 64_000_000
    """Largest width times height; read from the header, so a larger picture is never decoded."""
    max_redirects: NonNegativeInt = 5
    """Redirects followed for one URL; each target is checked like a URL of the list."""
    timeout_seconds: PositiveFloat = 30.0
    """Time for one attempt at a URL from the first packet to the last byte, redirects included."""
    attempts: PositiveInt = 3
    """How often a row is tried when its failure may pass: no answer in time, an overloaded server."""
    backoff_seconds: NonNegativeFloat = 5.0
    """Pause before the second attempt; doubles with each further one."""
    robots: bool = True
    """Ask each host's robots.txt and leave out what it denies."""
    opt_out: bool = True
    """Leave out what its answer's headers reserve (X-Robots-Tag, TDM-Reservation)."""
    user_agent: Annotated[str, Field(pattern=r"^[\x20-\x7e]+$")] = "unifork"
    """Sent with every request; its first word is the name that robots.txt and X-Robots-Tag may address."""
    tail_seconds: PositiveFloat = 120.0
    """Time for the last twentieth of a shard's rows; no attempt starts after it."""
    shard_seconds: PositiveFloat = 7200.0
    """Time for a whole shard; no attempt starts after it."""

    @property
    def agent(self) -> str:
        """The name that robots.txt and X-Robots-Tag may address, lower-case and without a version."""
        return self.user_agent.split()[0].split("/")[0].lower()


class UrlList(Plain):
    """Tables with one URL a row, and how they are read and fetched."""

    files: str
    """A table, a folder of them, or a glob pattern: Parquet, TSV or CSV."""
    columns: dict[str, str] = {}
    """Our column: its spelling in the lists, in any case, where `unifork.sources.columns` does not know it.
    `key: COLUMN` names the rows by a column that differs in every row; otherwise they are file name and number."""
    access: str = ""
    """How a person gets the files."""
    fetch: FetchRules = FetchRules()

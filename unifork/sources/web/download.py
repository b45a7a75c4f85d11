"""The download hop of a `url_list`: list rows -> image-text shard; what cannot be had goes to the quarantine.

Every row of the list is accounted for once: in the shard, or in `quarantine/` with url, class and detail, and
in the manifest's counts. Pictures are kept byte by byte.
"""

import hashlib
from pathlib import Path
from typing import Any

from unifork.config import Card, WebAccess, parse
from unifork.errors import ConfigError, DataError
from unifork.filters.worker import as_dict, origin, planned, quarantined, table_of
from unifork.shards.job import Hop, write_shard
from unifork.shards.schema import columns_of, image_text_schema, text_columns
from unifork.sources import Fault, plan, rows_of, source_of
from unifork.sources.url_lists import UrlList
from unifork.sources.web.client import Client, Refused
from unifork.sources.web.schedule import Health, Outcome, Picture, fetch_all

URL_LIST = "url_list"
"""The kind of source that a card names."""
WEB_VERSION = 1
"""Raise when the same lists, rules and answers would give other rows."""


def options_of(card: Card) -> UrlList:
    """The typed options of a card's source. Raises ConfigError."""
    _, options = source_of(card)
    if not isinstance(options, UrlList):
        raise ConfigError(f"card {card.name}: source.kind {card.source.kind!r} is no list of URLs")
    return options


def web_hop(card: Card, rows: int | None, shard_rows: int, folder: Path) -> Hop:
    """The plan of the download hop of a card with a `url_list`. Raises ConfigError or DataError."""
    tasks = [as_dict(task) for task in plan(card, rows, shard_rows, 0)]
    columns = columns_of(image_text_schema(card))
    made_with = {"version": WEB_VERSION, "columns": columns, "licence": card.licence, **origin(card)}
    lineage = {"source": card.source.model_dump(mode="json"), "licence": card.licence, "attribution": card.attribution}
    return Hop("image-text", card.name, folder, columns, made_with, lineage, tasks)


class Download:
    """A range of a list of URLs -> image-text shard."""

    def __init__(self, card: dict[str, Any], web: dict[str, Any], connections_per_host: int) -> None:
        self.card, self.web = parse(Card, card, "card"), parse(WebAccess, web, "web")
        self.schema = image_text_schema(self.card)
        self.client = Client(options_of(self.card).fetch, connections_per_host, self.web.proxy)
        self.health: Health | None = None

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        kept, rejected, wanted = [], [], []
        for one in rows_of(self.card, planned(task)):
            if isinstance(one, Fault):
                rejected.append({"key": one.key, "url": None, "reason": one.reason, "detail": one.detail})
            else:
                wanted.append(one)
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

    def _check_columns(self, rows: list[dict[str, Any]], task: dict[str, Any]) -> None:
        """Raise DataError when a list lacks a column that the card needs, before anything is fetched."""
        for name in (*text_columns(self.card), *self.card.columns):
            if rows and name not in rows[0]:
                raise DataError(
                    f"{task['file']}: no column for {name!r} of card {self.card.name}; found: {', '.join(rows[0])}. "
                    f"Name it in source.options.columns"
                )

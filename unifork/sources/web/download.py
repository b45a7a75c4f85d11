"""The worker of the download stage for a list of URLs: a slice of the list in, an image-text shard out.

What cannot be had goes to the quarantine. Every row of the list is accounted for once: in the shard, or in
`quarantine/` with url, class and detail, and in the manifest's counts. Images are kept byte by byte.
"""

import hashlib
from typing import Any

from unifork.config import Card, WebAccess, cluster_file, parse
from unifork.errors import ConfigError
from unifork.shards.job import quarantined, table_of, write_shard
from unifork.shards.schema import image_text_schema, text_columns
from unifork.shards.task import ShardResult, ShardTask
from unifork.sources import Fault, rows_of
from unifork.sources.url_lists import UrlList
from unifork.sources.web.client import Client, Refused
from unifork.sources.web.schedule import Health, Outcome, Picture, fetch_all

WEB_VERSION = 1
"""Raise when the same lists, rules and answers would give other rows."""


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

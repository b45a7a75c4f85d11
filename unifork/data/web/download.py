"""The download hop of a `url_list`: list rows -> image-text shard; what cannot be had goes to the quarantine.

Every row of the list is accounted for once: in the shard, or in `quarantine/` with url, class and detail, and
in the manifest's counts. Pictures are kept byte by byte.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

from unifork.config import Card, WebAccess, parse
from unifork.data.hop import Hop, write_shard
from unifork.data.schema import columns_of, image_text_schema
from unifork.data.web.client import Client, Refused
from unifork.data.web.lists import list_rows, options_of, plan_lists
from unifork.data.web.schedule import Health, fetch_all
from unifork.data.workers import table_of, write_quarantine

URL_LIST = "url_list"
"""The kind of source that a card names."""
WEB_VERSION = 1
"""Raise when the same lists, rules and answers would give other rows."""


def web_hop(card: Card, rows: int | None, shard_rows: int, folder: Path) -> Hop:
    """The plan of the download hop of a card with a `url_list`. Raises ConfigError or DataError."""
    options = options_of(card)
    columns = columns_of(image_text_schema(card))
    rules = options.model_dump(mode="json", exclude={"files"})
    made_with = {"version": WEB_VERSION, "columns": columns, "licence": card.licence, "rules": rules}
    lineage = {"source": card.source.model_dump(mode="json"), "licence": card.licence, "attribution": card.attribution}
    return Hop("image-text", card.name, folder, columns, made_with, lineage, plan_lists(card, rows, shard_rows))


class Download:
    """A range of a list of URLs -> image-text shard."""

    def __init__(self, card: dict[str, Any], web: dict[str, Any], connections_per_host: int) -> None:
        self.card, self.web = parse(Card, card, "card"), parse(WebAccess, web, "web")
        self.schema = image_text_schema(self.card)
        self.client = Client(options_of(self.card).fetch, connections_per_host, self.web.proxy)
        self.health: Health | None = None

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        rows = list_rows(self.card, task)
        urls = list(dict.fromkeys(row["url"] for row in rows if row["url"]))  # lists name a picture more than once
        if self.health is None:
            self.health = Health(self.client)
            self.health.preflight(urls)
        outcomes = dict(zip(urls, fetch_all(urls, self.client, self.web.threads, self.health), strict=True))
        missing = Refused("bad_url", "the list has none")
        kept, rejected, keys = [], [], set()
        for row in rows:
            outcome = outcomes.get(row["url"], missing)
            if row["key"] in keys:
                outcome = Refused("duplicate_key", f"another row of this shard has the key {row['key']!r}")
            keys.add(row["key"])
            if isinstance(outcome, Refused):
                rejected.append(
                    {"key": row["key"], "url": row["url"], "reason": outcome.reason, "detail": outcome.detail}
                )
                continue
            size = {"width": outcome.width, "height": outcome.height}
            digest = hashlib.sha256(outcome.data).hexdigest()
            licence = row.get("license") or self.card.licence
            kept.append({**row, **size, "image": outcome.data, "sha256": digest, "license": licence})
        write_quarantine(task, rejected)
        kept.sort(key=lambda row: row["key"])
        return write_shard(task, table_of(kept, self.schema), Counter(row["reason"] for row in rejected))

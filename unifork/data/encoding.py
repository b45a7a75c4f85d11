"""The worker of the encode hop: image-text shard in, shard of codes of one view out.

Decoding, views and the network run in one worker, so that no picture travels between processes.
"""

from functools import cache
from pathlib import Path
from typing import Any

from unifork.config import Card, parse
from unifork.data.hop import Hop, write_shard
from unifork.data.schema import codes_schema, columns_of
from unifork.data.workers import read_rows, table_of, tasks_from
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.manifest import read_manifest
from unifork.vocabulary import Task

ENCODE_VERSION = 1
"""Raise when the same pictures would give other codes or rows."""

BATCH_IMAGES = 64
"""Pictures per call of the network; in low precision part of what decides the codes."""


class View:
    """One task's view of a data set: its encoder, who that is, and the schema of its shards."""

    def __init__(self, card: Card, task: Task, tokenizer: Path, device: str = "cpu") -> None:
        self.use = card.tasks[task]
        self.encoder = CodeEncoder(tokenizer, self.use.view, card.matte, BATCH_IMAGES, device)
        loaded = self.encoder.tokenizer
        self.identity: dict[str, Any] = {
            "codebook_id": loaded.codebook_id,
            "encoder_id": loaded.encoder_id,
            "encoding": self.encoder.encoding,
        }
        self.schema = codes_schema(card, task, loaded.architecture.grid, loaded.architecture.depth, self.identity)


class Encode:
    """Image-text shard -> shard of codes of the view of the task's `use`. All views share the worker."""

    def __init__(self, card: dict[str, Any], tokenizer: str, device: str) -> None:
        self.card = parse(Card, card, "card")
        self.view = cache(lambda use: View(self.card, use, Path(tokenizer), device))

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        view = self.view(task["use"])
        rows, texts = read_rows(task), view.use.texts
        # a row without any text for this task has nothing to say here; it is counted, not lost
        kept = [row for row in rows if any(row[name] for name in texts)]
        codes = view.encoder.encode_pictures([row["image"] for row in kept])
        out = [
            {"key": row["key"], **{name: row[name] for name in texts}, "codes": code.tobytes()}
            for row, code in zip(kept, codes, strict=True)
        ]
        dropped = {"no_text_for_task": len(rows) - len(kept)} if len(kept) < len(rows) else {}
        return write_shard(task, table_of(out, view.schema), dropped)


def encode_hop(card: Card, task: Task, source: Path, folder: Path, tokenizer: Path) -> Hop:
    """The plan of the encode hop of one task: one task per filtered shard."""
    view = View(card, task, tokenizer)
    encoding = {k: v for k, v in view.identity["encoding"].items() if k not in ("device_class", "libraries")}
    made_with = {**view.identity, "version": ENCODE_VERSION, "texts": view.use.texts, "encoding": encoding}
    tasks = [{"use": task, **one} for one in tasks_from(read_manifest(source))]
    lineage = {**view.identity, "task": task}
    return Hop("codes", card.name, folder, columns_of(view.schema), made_with, lineage, tasks, source)

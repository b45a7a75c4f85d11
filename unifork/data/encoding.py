"""The worker of the encode hop: image-text shard in, shard of codes of one task's view out.

Decoding, views and the network run in one worker, so that no picture travels between processes.
"""

from pathlib import Path
from typing import Any

from unifork.config import Card, parse
from unifork.data.hop import Hop, write_shard
from unifork.data.schema import codes_schema
from unifork.data.workers import read_rows, table_of, tasks_from
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.manifest import read_manifest
from unifork.vocabulary import Task

ENCODE_VERSION = 1
"""Raise when the same pictures would give other codes or rows."""

BATCH_IMAGES = 64
"""Pictures per call of the network; in low precision part of what decides the codes."""


def encoder_for(card: Card, task: Task, tokenizer: Path, device: str = "cpu") -> CodeEncoder:
    """The encoder of one task's view of a data set."""
    return CodeEncoder(tokenizer, card.tasks[task].view, card.matte, BATCH_IMAGES, device)


class Encode:
    """Image-text shard -> shard of codes of one task's view."""

    def __init__(self, card: dict[str, Any], task: Task, tokenizer: str, device: str) -> None:
        self.card, self.task = parse(Card, card, "card"), task
        self.encoder = encoder_for(self.card, task, Path(tokenizer), device)
        self.identity = encode_identity(self.encoder)
        shape = self.encoder.tokenizer.architecture
        self.schema = codes_schema(self.card, task, shape.grid, shape.depth, self.identity)

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        rows, texts = read_rows(task), self.card.tasks[self.task].texts
        # a row without any text for this task has nothing to say here; it is counted, not lost
        kept = [row for row in rows if any(row[name] for name in texts)]
        codes = self.encoder.encode_pictures([row["image"] for row in kept])
        out = [
            {"key": row["key"], **{name: row[name] for name in texts}, "codes": code.tobytes()}
            for row, code in zip(kept, codes, strict=True)
        ]
        dropped = {"no_text_for_task": len(rows) - len(kept)} if len(kept) < len(rows) else {}
        return write_shard(Path(task["output"]), table_of(out, self.schema), task["inputs"], dropped).model_dump(
            mode="json"
        )


def encode_identity(encoder: CodeEncoder) -> dict[str, Any]:
    """Who made the codes: the two identities, and how."""
    tokenizer = encoder.tokenizer
    return {"codebook_id": tokenizer.codebook_id, "encoder_id": tokenizer.encoder_id, "encoding": encoder.encoding}


def encode_hop(card: Card, task: Task, source: Path, folder: Path, encoder: CodeEncoder) -> Hop:
    """The plan of the encode hop of one task: one task per filtered shard."""
    identity = encode_identity(encoder)
    made_with = {
        "version": ENCODE_VERSION,
        "codebook_id": identity["codebook_id"],
        "encoder_id": identity["encoder_id"],
        "texts": card.tasks[task].texts,
        "encoding": {
            name: value for name, value in encoder.encoding.items() if name not in ("device_class", "libraries")
        },
    }
    return Hop("codes", card.name, folder, made_with, tasks_from(read_manifest(source)), source)

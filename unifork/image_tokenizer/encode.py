"""The worker of the encode stage: image-text shard in, shard of codes of one view out.

Decoding, views and the network run in one worker, so that no image travels between processes. A worker
has two shards at hand: while one is read or written the network encodes the other.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unifork.config import Card
from unifork.image_tokenizer.architecture import Description, describe
from unifork.image_tokenizer.views import declared
from unifork.shards.job import ShardJob, input_rows, table_of, write_shard
from unifork.shards.manifest import read_manifest
from unifork.shards.schema import codes_schema, columns_of
from unifork.shards.task import ShardResult, ShardTask
from unifork.vocabulary import VOCABULARY_VERSION, Task

if TYPE_CHECKING:
    from unifork.image_tokenizer.code_encoder import CodeEncoder
    from unifork.image_tokenizer.model import ImageTokenizer

ENCODE_VERSION = 1
"""Raise when the same images would give other codes or rows."""

BATCH_IMAGES = 64
"""Images per call of the network; in low precision part of what decides the codes."""
DTYPE = "float32"
"""Of the network."""


class View:
    """One task's view of a data set: its encoder and the schema of its shards, which say who made them."""

    def __init__(self, card: Card, task: Task, encoder: "CodeEncoder") -> None:
        self.use = card.tasks[task]
        self.encoder = encoder.seeing(self.use.view)
        made_by = self.encoder.tokenizer
        identity = _identity(made_by, self.encoder.encoding)
        self.schema = codes_schema(card, task, made_by.architecture.grid, made_by.architecture.depth, identity)


class Encode:
    """Image-text shard -> shard of codes of the view of the task's `use`. All views share the network.

    device: of the network. threads: they decode images. Raises IdentityError for a tokenizer that does not
    encode its canaries as it did.
    """

    TASKS_AT_ONCE = 2

    def __init__(self, card: Card, tokenizer: Path, device: str, threads: int = 1) -> None:
        # only workers wait for torch and transformers
        from unifork.image_tokenizer.code_encoder import CodeEncoder  # noqa: PLC0415

        first = next(iter(card.tasks.values())).view
        encoder = CodeEncoder(tokenizer, first, card.matte, BATCH_IMAGES, device, threads=threads)
        self.views = {task: View(card, task, encoder) for task in card.tasks}

    def __call__(self, task: ShardTask) -> ShardResult:
        assert task.use is not None, f"{task.output}: a task of no view"
        view = self.views[task.use]
        rows, texts = input_rows(task), view.use.texts
        # a row without any text for this task has nothing to say here; it is counted, not lost
        kept = [row for row in rows if any(row[name] for name in texts)]
        codes = view.encoder.encode_images([row["image"] for row in kept])
        out = [
            {"key": row["key"], **{name: row[name] for name in texts}, "codes": code.tobytes()}
            for row, code in zip(kept, codes, strict=True)
        ]
        dropped = {"no_text_for_task": len(rows) - len(kept)} if len(kept) < len(rows) else {}
        return write_shard(task, table_of(out, view.schema), dropped)


def encode_job(card: Card, task: Task, source: Path, folder: Path, tokenizer: Path) -> ShardJob:
    """The plan of encoding one view: one task for each filtered shard.

    Of the tokenizer only `config.json` is read; the workers, where the codes are made, check weights and canaries.
    Machine and libraries are not part of the plan: each shard says its own.
    """
    use, description = card.tasks[task], describe(tokenizer)
    shape = description.architecture
    identity = _identity(description, declared(use.view, card.matte, BATCH_IMAGES, shape.image_size, DTYPE))
    made_with = {**identity, "version": [ENCODE_VERSION, VOCABULARY_VERSION], "texts": use.texts}
    columns = columns_of(codes_schema(card, task, shape.grid, shape.depth, identity))
    tasks = [ShardTask.to_encode(shard, task) for shard in read_manifest(source).shards]
    return ShardJob("codes", card.name, folder, columns, made_with, {**identity, "task": task}, tasks, source)


def _identity(made_by: "Description | ImageTokenizer", encoding: dict[str, Any]) -> dict[str, Any]:
    """What decides the codes of a shard: the tokenizer that makes them, and how it is used."""
    return {"codebook_id": made_by.codebook_id, "encoder_id": made_by.encoder_id, "encoding": encoding}

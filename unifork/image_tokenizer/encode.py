"""The worker of the encode stage: image-text shard in, a shard of codes of each view out.

Decoding, views and the network run in one worker, so that no image travels between processes; it is read and decoded
once for the views that are missing. A worker has two shards at hand: while one is read or written the network encodes
the other.
"""

from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from unifork.config import Card
from unifork.errors import DataError
from unifork.image_tokenizer.architecture import Description, describe
from unifork.images import declared
from unifork.shards.job import KeptRows, ShardJob, kept_rows, table_of, write_shard
from unifork.shards.schema import codes_schema, columns_of
from unifork.shards.task import ShardResult, ShardTask, quarantined
from unifork.vocabulary import MORE_IMAGES, VOCABULARY_VERSION, Task

if TYPE_CHECKING:
    from unifork.image_tokenizer.code_encoder import CodeEncoder
    from unifork.image_tokenizer.model import ImageTokenizer

ENCODE_VERSION = 2
"""Raise when the same images would give other codes or rows."""

BATCH_IMAGES = 64
"""Images per call of the network; in low precision part of what decides the codes."""
UNENCODABLE = "unencodable"
"""Reason of a row whose image no view can be made of, although the filter could decode it."""


class View:
    """One task's view of a data set: its encoder and the schema of its shards, which say who made them."""

    def __init__(self, card: Card, task: Task, encoder: "CodeEncoder") -> None:
        self.use = card.tasks[task]
        self.encoder = encoder.seeing(self.use.view)
        made_by = self.encoder.tokenizer
        identity = _identity(made_by, self.encoder.encoding)
        self.schema = codes_schema(card, task, made_by.architecture.grid, made_by.architecture.depth, identity)


class Encode:
    """Image-text shard -> shard of codes of the view of the task's `use`, and of those beside. All share the network.

    device: of the network. threads: they decode images. Raises IdentityError for a tokenizer that does not
    encode its canaries as it did.
    """

    TASKS_AT_ONCE = 2
    BESIDE = True

    def __init__(self, card: Card, tokenizer: Path, device: str, threads: int = 1) -> None:
        # only workers wait for torch and transformers
        import torch  # noqa: PLC0415

        from unifork.image_tokenizer.code_encoder import CodeEncoder  # noqa: PLC0415

        first = next(iter(card.tasks.values())).view
        dtype = getattr(torch, card.encoder_dtype)
        encoder = CodeEncoder(tokenizer, first, card.matte, BATCH_IMAGES, device, dtype, threads)
        self.images = ["image", *([MORE_IMAGES] if card.several_images == "keep" else [])]
        self.views = {task: View(card, task, encoder) for task in card.tasks}

    def __call__(self, task: ShardTask) -> ShardResult:
        """The shard of a task and of those beside it, whose images are decoded once where all views have the same."""
        tasks = (task, *task.beside)
        views = [self.views[cast(Task, each.use)] for each in tasks]
        texts = {name: None for view in views for name in view.use.texts}
        rows = kept_rows(task, ["key", "url", "sha256", *texts, *self.images]).to_pylist()
        # a row without any text for a task has nothing to say there; it is counted, not lost
        spoken = [[row for row in rows if any(row[name] for name in view.use.texts)] for view in views]
        codes: list[np.ndarray] | list[None] = [None] * len(tasks)
        if len(tasks) > 1 and all(same == spoken[0] for same in spoken):
            with suppress(DataError):  # rare, since the filter has decoded every image; then each view goes by itself
                codes = views[0].encoder.encode_views(_images(spoken[0]), [view.use.view for view in views])
        first, *others = map(self._shard, tasks, views, spoken, codes, [len(rows)] * len(tasks))
        return replace(first, beside=tuple(others))

    def _shard(
        self, task: ShardTask, view: View, spoken: list[dict[str, Any]], codes: np.ndarray | None, rows: int
    ) -> ShardResult:
        """The shard of one view. codes: of all its images, None where these are still to be made."""
        rejected: list[dict[str, str]] = []
        try:
            codes = view.encoder.encode_images(_images(spoken)) if codes is None else codes
        except DataError:  # only now each is looked at alone
            problems = [next(filter(None, map(view.encoder.problem_of, _images([row]))), None) for row in spoken]
            looked_at = list(zip(spoken, problems, strict=True))
            rejected = [{**row, "reason": UNENCODABLE, "detail": problem} for row, problem in looked_at if problem]
            spoken = [row for row, problem in looked_at if not problem]
            codes = view.encoder.encode_images(_images(spoken))
        coded, kept = map(np.ndarray.tobytes, codes), ("key", *view.use.texts)
        out = [{name: row[name] for name in kept} | {"codes": [*islice(coded, len(_images([row])))]} for row in spoken]
        silent = rows - len(spoken) - len(rejected)
        dropped = quarantined(task, rejected) | ({"no_text_for_task": silent} if silent else {})
        return write_shard(task, table_of(out, view.schema), dropped)


def _images(rows: list[dict[str, Any]]) -> list[bytes]:
    images = (image["image"] for row in rows for image in (row, *(row.get(MORE_IMAGES) or ())))
    return [image for image in images if image is not None]


def encode_job(card: Card, task: Task, rows: KeptRows, folder: Path, tokenizer: Path) -> ShardJob:
    """The plan of encoding one view: one task for each image-text shard.

    Of the tokenizer only `config.json` is read; the workers, where the codes are made, check weights and canaries.
    Machine and libraries are not part of the plan: each shard says its own.
    """
    use, description = card.tasks[task], describe(tokenizer)
    shape = description.architecture
    encoding = declared(use.view, card.matte, BATCH_IMAGES, shape.image_size, card.encoder_dtype)
    identity = _identity(description, encoding)
    made_with = {**identity, "version": [ENCODE_VERSION, VOCABULARY_VERSION], "texts": use.texts}
    columns = columns_of(codes_schema(card, task, shape.grid, shape.depth, identity))
    tasks = [
        ShardTask(shard=raw, kept=kept, kept_folder=str(rows.filtered.absolute()), use=task)
        for raw, kept in zip(rows.raw_shards, rows.shards, strict=True)
    ]
    return ShardJob("codes", card.name, folder, columns, made_with, {**identity, "task": task}, tasks, rows.raw)


def _identity(made_by: "Description | ImageTokenizer", encoding: dict[str, Any]) -> dict[str, Any]:
    """What decides the codes of a shard: the tokenizer that makes them, and how it is used."""
    return {"codebook_id": made_by.codebook_id, "encoder_id": made_by.encoder_id, "encoding": encoding}

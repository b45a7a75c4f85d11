"""The worker of the stage `answer`: shard of items in, shard of raw answers or images out.

A shard is answered at once and written when it is, so a run that is killed goes on with the next one and ends with the
same answers. The text that a model was given stands beside each answer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unifork.config import AnswerPart, EvalCard
from unifork.documents.prompts import template_named
from unifork.evaluation.names import ABSENT, identity
from unifork.images import png
from unifork.shards.job import ShardJob, input_rows, table_of, write_shard
from unifork.shards.manifest import read_manifest
from unifork.shards.schema import columns_of
from unifork.shards.task import ShardResult, ShardTask
from unifork.vocabulary import CODE_DTYPE, VOCABULARY_VERSION

ANSWER_VERSION = 1
"""Raise when the same model would give other answers to the same items."""
SCHEMA = pa.schema(
    [*((name, pa.string()) for name in ("id", "prompt", "text")), *((name, pa.binary()) for name in ("image", "codes"))]
)
"""`text` of a question, `image` (PNG) and `codes` of a prompt; the others are null."""
MADE_ON = "unifork.made_on"
"""Schema metadata of a shard: JSON with the device, number type and torch that its answers come from."""


class Answerer:
    """A model with its image tokenizer, asked as a card says. Raises CheckpointError or DataError."""

    def __init__(self, model: Path, request: AnswerPart, device: str) -> None:
        # only workers wait for torch and transformers
        import torch  # noqa: PLC0415

        from unifork.library import Model  # noqa: PLC0415

        self.request, self.model = request, Model.load(model, device, request.dtype)
        here = {"device": torch.device(device).type, "dtype": request.dtype, "torch": torch.__version__}
        self.schema = SCHEMA.with_metadata({MADE_ON: json.dumps(here)})

    def __call__(self, task: ShardTask) -> ShardResult:
        rows = input_rows(task)
        prompts = [self.request.form(row["question"]) for row in rows]
        answered = self._images(rows, prompts) if draws(self.request) else self._texts(rows, prompts)
        for row, prompt, answer in zip(rows, prompts, answered, strict=True):
            answer |= {"id": row["id"], "prompt": prompt}
        return write_shard(task, table_of(answered, self.schema), {})

    def _texts(self, rows: list[dict[str, Any]], prompts: list[str]) -> list[dict[str, Any]]:
        """Every image is encoded once, in the padded view; its questions stand side by side."""
        images = {row["sha256"]: row["bytes"] for row in rows if row["bytes"]}
        codes = dict(zip(images, self.model.images.encode_images(list(images.values())), strict=True))
        shown = np.stack([codes[row["sha256"]] for row in rows])
        request, engine = self.request, self.model.engine
        texts = engine.answer_questions(shown, prompts, request.template, request.max_new_tokens)
        return [{"text": text} for text in texts]

    def _images(self, rows: list[dict[str, Any]], prompts: list[str]) -> list[dict[str, Any]]:
        """What is drawn depends on the prompt and the item's number alone."""
        request, engine, first = self.request, self.model.engine, rows[0]["number"]
        codes = engine.generate_images(prompts, request.sampling, request.template, first=first)
        files = [png(image) for image in self.model.images.decode_codes(codes)]
        return [
            {"image": file, "codes": code.astype(CODE_DTYPE).tobytes()} for file, code in zip(files, codes, strict=True)
        ]


def draws(request: AnswerPart) -> bool:
    """Whether images are asked for, and not texts."""
    return template_named(request.template, "answer.template").task == "generation"


def answer_job(card: EvalCard, items: Path, folder: Path, model: Path, seed: int) -> ShardJob:
    """The plan of answering all items of a benchmark: one task for each shard; none where its files are not here."""
    source = read_manifest(items)
    sampling = card.answer.sampling.model_dump()
    greedy = f"greedy, at most {card.answer.max_new_tokens} tokens"
    drawn = "sampled: " + ", ".join(f"{name} {value}" for name, value in sampling.items())
    lineage = {
        "model": identity(model),
        "items": source.lineage.get("items"),
        "prompt": card.answer.prompt,
        "template": card.answer.template,
        "decoding": f"{drawn if draws(card.answer) else greedy}, {card.answer.dtype}",
        "seed": seed,
        **({ABSENT: source.lineage[ABSENT]} if ABSENT in source.lineage else {}),
    }
    made_with = {**lineage, "version": [ANSWER_VERSION, VOCABULARY_VERSION]}
    tasks = [ShardTask(shard=shard) for shard in source.shards]
    columns = columns_of(SCHEMA)
    return ShardJob("answers", card.name, folder, columns, made_with, lineage, tasks, items, may_be_empty=True)

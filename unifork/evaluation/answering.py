"""The worker of the stage `answer`: shard of items in, shard of raw answers or images out.

A shard is answered part by part. A part is what a model is given at once: always the same items together, since the
last bits of their logits, and so now and then an answer, depend on that. A finished part is a file beside the shard
until the shard is there, so a run that is killed goes on with the next part and ends with the same answers. The text
that a model was given stands beside each answer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from unifork.config import AnswerPart, EvalCard
from unifork.documents.prompts import template_named
from unifork.evaluation.names import ABSENT, MADE_ON, identity
from unifork.images import png
from unifork.shards.job import ShardJob, input_rows, table_of, write_shard
from unifork.shards.manifest import read_manifest, write_json
from unifork.shards.schema import columns_of
from unifork.shards.task import ShardResult, ShardTask
from unifork.vocabulary import CODE_DTYPE, VOCABULARY_VERSION

ANSWER_VERSION = 3
"""Raise when the same model would give other answers to the same items."""
SCHEMA = pa.schema(
    [*((name, pa.string()) for name in ("id", "prompt", "text")), *((name, pa.binary()) for name in ("image", "codes"))]
)
"""`text` of a question, `image` (PNG) and `codes` of a prompt; the others are null."""
PART = {"cpu": 32}
"""Items of a part by kind of device, elsewhere the whole shard. Fewer at once take longer (docs/evaluation.md)."""


class Answerer:
    """A model with its image tokenizer, asked as a card says. Raises CheckpointError or DataError."""

    def __init__(self, model: Path, request: AnswerPart, device: str) -> None:
        # only workers wait for torch and transformers
        import torch  # noqa: PLC0415

        from unifork.library import Model  # noqa: PLC0415

        self.request, self.model = request, Model.load(model, device, request.dtype)
        self.here = {"device": torch.device(device).type, "dtype": request.dtype, "torch": str(torch.__version__)}
        self.schema = SCHEMA.with_metadata({MADE_ON: json.dumps(self.here)})

    def __call__(self, task: ShardTask) -> ShardResult:
        rows = input_rows(task)
        prompts = [self.request.form(row["question"]) for row in rows]
        drawn = draws(self.request)
        codes = [] if drawn else self._codes(rows)
        most = PART.get(self.here["device"], len(rows))
        made_with = {"inputs": task.inputs, "part": most, **self.here}
        files: list[Path] = []
        answers: list[str] = []
        for start in range(0, len(rows), most):
            part, file = slice(start, start + most), Path(f"{task.output}.{start}.json")
            found = json.loads(file.read_text()) if file.exists() else {}
            if found.get("made_with") != made_with:
                first = rows[start]["number"]
                texts = self._drawn(prompts[part], first) if drawn else self._texts(codes[part], prompts[part])
                found = {"made_with": made_with, "answers": texts}
                write_json(file, found)
            files.append(file)
            answers += found["answers"]
        answered = self._images(answers) if drawn else [{"text": text} for text in answers]
        for row, prompt, answer in zip(rows, prompts, answered, strict=True):
            answer |= {"id": row["id"], "prompt": prompt}
        result = write_shard(task, table_of(answered, self.schema), {})
        for file in files:
            file.unlink()
        return result

    def _codes(self, rows: list[dict[str, Any]]) -> list[np.ndarray]:
        """Of each row's image, in the padded view; every image is encoded once."""
        images = {row["sha256"]: row["bytes"] for row in rows if row["bytes"]}
        codes = dict(zip(images, self.model.images.encode_images(list(images.values())), strict=True))
        return [codes[row["sha256"]] for row in rows]

    def _texts(self, codes: list[np.ndarray], prompts: list[str]) -> list[str]:
        """Questions about one image stand side by side."""
        request = self.request
        return self.model.engine.answer_questions(np.stack(codes), prompts, request.template, request.max_new_tokens)

    def _drawn(self, prompts: list[str], first: int) -> list[str]:
        """Codes in hex. What is drawn depends on the prompt and the item's number alone."""
        request = self.request
        codes = self.model.engine.generate_images(prompts, request.sampling, request.template, first=first)
        return [code.astype(CODE_DTYPE).tobytes().hex() for code in codes]

    def _images(self, answers: list[str]) -> list[dict[str, Any]]:
        """The images that codes in hex stand for, decoded together, with the codes."""
        config, codes = self.model.engine.model.config, [bytes.fromhex(answer) for answer in answers]
        codes_BND = np.frombuffer(b"".join(codes), CODE_DTYPE).reshape(-1, config.positions, config.depth)
        files = [png(image) for image in self.model.images.decode_codes(codes_BND)]
        return [{"image": file, "codes": code} for file, code in zip(files, codes, strict=True)]


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

"""The worker of the prepare stage: shard of codes in, shard of tokenized documents of one template out.

Each row is written with the template, tokenized and checked. Only the words of a document are kept: where an image
stands follows from one number, and codes stay in their shards. How long a document may be is a stage's affair: its
length is kept beside it. Rows that cannot be used are quarantined with a reason.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from unifork.batch import BEGIN_IMAGE, TEXT
from unifork.config import Card, PreparedSet
from unifork.documents.mixture import made_with, skeleton
from unifork.documents.prompts import Template, template_named, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import Rejected, tried, unknown
from unifork.shards.job import ARROW, ShardJob, table_of, write_shard
from unifork.shards.manifest import checked, manifest_sha256, present
from unifork.shards.schema import codes_meta, columns_of, documents_schema, images_of_rows
from unifork.shards.task import ShardResult, ShardTask, quarantined


class Prepare:
    """Shard of codes -> shard of documents: a text column, written with a template and tokenized."""

    def __init__(self, card: Card, text: str, template: Template, tokenizer: Path) -> None:
        self.card, self.text, self.template, self.tokenizer = card, text, template, TextTokenizer(tokenizer)

    def __call__(self, task: ShardTask) -> ShardResult:
        assert task.shard is not None, f"{task.output}: a task that is made from no shard"
        folder = Path(task.folder)
        file, source = pq.ParquetFile(checked(folder, task.shard)), str(folder / task.shard.path)
        schema = file.schema_arrow
        if self.text not in schema.names:
            raise unknown("text column", self.text, set(schema.names) - {"key", "codes"}, source)
        image_tokens = codes_meta(schema, source)["shape"][0] + 2
        documents, rejected = [], []
        for group in range(file.num_row_groups):
            rows = file.read_row_group(group, columns=["key", self.text]).to_pylist()
            for number, (row, images) in enumerate(zip(rows, _images(file, group), strict=True)):
                place = {"key": row["key"], "row_group": group, "row": number}
                document = tried(self._document, row[self.text], images, image_tokens)
                if isinstance(document, Rejected):  # whatever a text may raise costs its row alone
                    rejected.append({"key": row["key"], "reason": document.reason, "detail": str(document)})
                else:
                    documents.append({**place, **document, "held_out": int(self.card.holds_out(row["key"]))})
        return write_shard(task, table_of(documents, documents_schema(schema)), quarantined(task, rejected))

    def _document(self, value: Any, images: int, image_tokens: int) -> dict[str, Any]:
        """The columns of a row that can be used. Raises Rejected."""
        doc = skeleton(written(self.template, value, images), self.tokenizer, 1, self.template.border)
        if self.template.task == "understanding" and not doc.loss_mask_T.any():
            raise Rejected("nothing_to_learn", "nothing to learn")
        if doc.loss_mask_T[0]:
            raise Rejected("nothing_before_answer", "the first token cannot be supervised: nothing stands before it")
        is_text_T, begins_T = doc.kinds_T == TEXT, doc.kinds_T == BEGIN_IMAGE
        ids_T, loss_mask_T = doc.text_ids_T[is_text_T].astype(np.int32), doc.loss_mask_T[is_text_T].view(np.uint8)
        return {
            "text_ids": ids_T,
            "loss_mask": loss_mask_T,
            "images_at": np.cumsum(is_text_T)[begins_T].astype(np.int32),
            "tokens": len(ids_T) + int(begins_T.sum()) * image_tokens,
            "supervised": int(loss_mask_T.sum()),
        }


def _images(file: pq.ParquetFile, group: int) -> list[int]:
    """Images of each row of a row group. The codes are read only where some row has none or several."""
    columns = file.metadata.row_group(group)
    codes = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema.startswith("codes."))
    if codes.statistics is not None and codes.statistics.null_count == 0 and codes.num_values == columns.num_rows:
        return [1] * columns.num_rows
    counts_R: list[int] = images_of_rows(file.read_row_group(group, columns=["codes"])["codes"]).tolist()
    return counts_R


def prepare_job(card: Card, chosen: PreparedSet, codes: Path, folder: Path, tokenizer: Path) -> ShardJob:
    """The plan of preparing one text column of a data set for one template: one task for each shard of codes.

    The manifest says of which codes and with what the documents were made; training compares it.
    """
    inputs = made_with(chosen.text, template_named(chosen.template, str(folder)), TextTokenizer(tokenizer))
    inputs["held_out"] = card.held_out
    lineage = {**inputs, "codes": manifest_sha256(codes)}
    tasks = [ShardTask(shard=shard) for shard in present(codes).shards]
    columns, name = columns_of(documents_schema()), "part-{index:05d}" + ARROW
    return ShardJob("documents", chosen.dataset, folder, columns, inputs, lineage, tasks, codes, shard_name=name)

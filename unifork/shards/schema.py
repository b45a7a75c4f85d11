"""The columns of the kinds of shard, derived from the card.

`image-text` rows hold the image as received, or none, and the texts; `codes` rows hold the texts of one view and a
list of the row's images, each the codes of one as a fixed-size binary (little-endian uint16, row by row of the grid,
depth last); `documents` rows hold the tokens of one template.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from unifork.config import Card
from unifork.errors import DataError, Rejected
from unifork.vocabulary import CODE_DTYPE, MORE_IMAGES, Task

CONVERSATIONS = "conversations"
"""The column of dialogues: a list of turns `{role, text}`."""
TURN = pa.struct([("role", pa.string()), ("text", pa.string())])

FIXED_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "image": pa.binary(),
    "width": pa.int32(),
    "height": pa.int32(),
    "url": pa.string(),
    "sha256": pa.string(),
    "license": pa.string(),
}

DOCUMENT_COLUMNS: dict[str, pa.DataType] = {
    "key": pa.string(),
    "text_ids": pa.large_list(pa.int32()),
    "loss_mask": pa.large_list(pa.uint8()),  # of the text tokens: 1 is supervised
    "images_at": pa.large_list(pa.int32()),  # text tokens before each image
    "tokens": pa.int32(),  # length of the document, its images included
    "supervised": pa.int32(),  # text tokens
    "held_out": pa.uint8(),  # 1: nothing is trained on it
    "row_group": pa.int32(),  # of the shard of codes
    "row": pa.int32(),  # of the row group
}
"""All of fixed width or large, so that a mapped file is read without copying."""

MORE_IMAGE = {name: FIXED_COLUMNS[name] for name in ("image", "width", "height", "sha256")}

CODES_META = b"unifork.codes"
"""Schema metadata: JSON with shape, dtype, codebook_id, encoder_id and encoding."""


def text_type(column: str) -> pa.DataType:
    """Arrow type of a text column: dialogues are lists of turns, everything else is a string."""
    return pa.list_(TURN) if column == CONVERSATIONS else pa.string()


def text_columns(card: Card) -> list[str]:
    """Every text column that some task of the card uses, in order of appearance."""
    return list(dict.fromkeys(text for use in card.tasks.values() for text in use.texts))


def image_text_schema(card: Card) -> pa.Schema:
    """Schema of the image-text shards of a data set."""
    texts = {name: text_type(name) for name in text_columns(card)}
    kept = {name: pa.string() for name in card.columns}
    more = {MORE_IMAGES: pa.list_(pa.struct(MORE_IMAGE))} if card.several_images == "keep" else {}
    return pa.schema({**FIXED_COLUMNS, **more, **texts, **kept})


def codes_schema(card: Card, task: Task, grid: int, depth: int, identity: dict[str, Any]) -> pa.Schema:
    """Schema of the code shards of one task of a data set; `identity` goes to the metadata."""
    texts = {name: text_type(name) for name in card.tasks[task].texts}
    meta = {"dtype": CODE_DTYPE, "shape": [grid * grid, depth], **identity}
    return pa.schema(
        {"key": pa.string(), **texts, "codes": codes_type(grid * grid * depth)},
        metadata={CODES_META: json.dumps(meta, sort_keys=True).encode()},
    )


def codes_type(codes: int) -> pa.DataType:
    """Type of a column of the images of rows, each of so many codes."""
    return pa.list_(pa.binary(codes * np.dtype(CODE_DTYPE).itemsize))


def documents_schema(codes: pa.Schema | None = None) -> pa.Schema:
    """Schema of the prepared shards; they say of their codes what the shard of codes says."""
    meta = {name: value for name, value in ((codes and codes.metadata) or {}).items() if name == CODES_META}
    return pa.schema(DOCUMENT_COLUMNS, metadata=meta)


def columns_of(schema: pa.Schema) -> dict[str, str]:
    """Names and types as a manifest lists them."""
    return {field.name: str(field.type) for field in schema}


def codes_meta(schema: pa.Schema, place: str) -> dict[str, Any]:
    """What a code shard says of itself. Raises DataError when it says nothing."""
    raw = (schema.metadata or {}).get(CODES_META)
    if raw is None:
        raise DataError(f"{place}: no {CODES_META.decode()!r} in the schema metadata; this is not a shard of codes")
    return dict(json.loads(raw))


def codes_array(column: pa.ChunkedArray, shape: tuple[int, int]) -> np.ndarray:
    """The images of all rows of a `codes` column as uint16 codes of shape (images, positions, depth), uncopied."""
    images = column.combine_chunks().flatten()
    width = shape[0] * shape[1]
    flat = np.frombuffer(images.buffers()[1] or b"", CODE_DTYPE)
    return flat[images.offset * width : (images.offset + len(images)) * width].reshape(-1, *shape)


def images_of_rows(column: pa.ChunkedArray) -> np.ndarray:
    """How many images each row of a `codes` column has."""
    counts: np.ndarray = pc.list_value_length(column).fill_null(0).to_numpy()
    return counts


def numbered(detail: str, number: int, images: int) -> str:
    """What is wrong with an image, with its number where a row has several; counted from 1."""
    return f"image {number} of {images}: {detail}" if images > 1 else detail


# ---------------------------------------------------------------------------------------- dialogues

IMAGE_MARK = "<image>"

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
"""Names of the roles; `human` and `gpt` are those of LLaVA and InternVL."""


def turns_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns `{role, text}` of a row: its `conversations` of `{from, value}` (LLaVA, InternVL) or `{role, content}`.

    Roles are renamed where they are known and kept where not: `dialogue` judges them. Raises Rejected
    when the row has no list of turns of texts.
    """
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejected("broken_dialogue", "conversations is not a list of turns")
    roles = [str(turn.get("from", turn.get("role"))) for turn in turns]
    texts = [turn.get("value", turn.get("content")) for turn in turns]
    if wrong := next((text for text in texts if isinstance(text, list | dict | bytes)), None):
        raise Rejected("broken_dialogue", f"a turn says {wrong!r:.200}; a text is expected")
    return [{"role": ROLES.get(role, role), "text": str(text or "")} for role, text in zip(roles, texts, strict=True)]

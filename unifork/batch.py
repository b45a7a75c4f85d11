"""What data and models exchange: documents, and the packed rows a model reads in one call.

In: one `Document` per sample (text tokens with image spans). Out: a `Batch` of index arrays that
were all computed on the CPU, so that the model never has to ask the device for a count.

Shape suffixes: B rows, T tokens of a row, N image tokens of the batch (row by row, left to right),
D code depth, S supervised text tokens, M supervised image positions, P positions of one image.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from unifork.vocabulary import MODALITIES, TASKS, Task

TEXT, IMAGE, BEGIN_IMAGE, END_IMAGE = range(4)
"""Kinds of token. Begin and end of image are embeddings of the connector, not of the vocabulary."""

NO_DOCUMENT = -1
"""The document number of padding."""


@dataclass(frozen=True, eq=False)
class Document:
    """One sample as the model reads it.

    kinds_T: kind of each token. text_ids_T: vocabulary ids, 0 where the token is not text.
    learned_T: True where the token is a text token that the model is taught to predict.
    codes_ND: the codes of the image tokens, in order of appearance; in a document of the task
    `generation` the first `supervised_positions` (None: all) are targets, in one of `understanding` none.
    """

    key: str
    task: Task
    kinds_T: np.ndarray
    text_ids_T: np.ndarray
    learned_T: np.ndarray
    codes_ND: np.ndarray
    supervised_positions: int | None = None

    def __len__(self) -> int:
        return len(self.kinds_T)


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows, ready for the model. All index arrays point into the flattened B*T tokens.

    The hidden state at `text_source_S` predicts `text_target_S`; the hidden state at
    `image_source_M` predicts the D codes `image_target_MD` (the source is the token before the
    image token: begin-of-image, then the image tokens but the last).
    """

    text_ids_BT: Tensor
    kinds_BT: Tensor
    documents_BT: Tensor
    """Number of the document within its row, counted from 0; NO_DOCUMENT at padding."""
    positions_BT: Tensor
    """Rotary positions; they start at 0 in every document."""
    tasks_BT: Tensor
    """Index into TASKS; padding carries the task of the token before it (0 in an empty row)."""
    image_index_N: Tensor
    codes_ND: Tensor
    text_source_S: Tensor
    text_target_S: Tensor
    image_source_M: Tensor
    image_target_MD: Tensor
    task_counts: tuple[int, ...]
    """Tokens per task (padding included), in the order of TASKS."""
    modality_counts: tuple[int, ...]
    """Tokens per modality (padding counts as text), in the order of MODALITIES."""
    document_counts: tuple[tuple[int, ...], ...]
    """Tokens of each document per modality, row by row; the padding that ends a row follows as text."""
    tasks_grouped: bool = False
    """Whether the flattened tokens come task by task, so that a task route is slices."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch with every tensor on `device`."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **moved)


def pack(rows: list[list[Document]], row_tokens: int, depth: int) -> Batch:
    """Lay documents out in rows of `row_tokens` tokens, in the order given, never splitting one.

    An empty row is legal and consists of padding. Raises ValueError when a row does not fit,
    which is an error of the caller: packing decides beforehand what goes where.
    """
    B, T = len(rows), row_tokens
    text_ids_BT = np.zeros((B, T), np.int64)
    kinds_BT = np.full((B, T), TEXT, np.int64)
    documents_BT = np.full((B, T), NO_DOCUMENT, np.int64)
    positions_BT = np.zeros((B, T), np.int64)
    tasks_BT = np.zeros((B, T), np.int64)
    codes, text_source, text_target, image_source, image_target = [], [], [], [], []
    document_counts: list[tuple[int, ...]] = []
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            stop = start + len(document)
            if stop > T:
                raise ValueError(f"row {b} holds {sum(map(len, row))} tokens, more than row_tokens={T}")
            span = (b, slice(start, stop))
            text_ids_BT[span] = document.text_ids_T
            kinds_BT[span] = document.kinds_T
            documents_BT[span] = number
            positions_BT[span] = np.arange(len(document))
            tasks_BT[b, start:] = TASKS.index(document.task)
            codes.append(document.codes_ND)
            document_counts.append(_modality_counts(document.kinds_T))
            flat = b * T + start
            learned = np.flatnonzero(document.learned_T)
            text_source.append(flat + learned - 1)
            text_target.append(document.text_ids_T[learned])
            if document.task == "generation":
                learned_N = slice(document.supervised_positions)
                image_source.append(flat + np.flatnonzero(document.kinds_T == IMAGE)[learned_N] - 1)
                image_target.append(document.codes_ND[learned_N])
            start = stop
        if start < T:
            document_counts.append(_modality_counts(kinds_BT[b, start:]))
    flat_kinds = kinds_BT.reshape(-1)
    image_index_N = np.flatnonzero(flat_kinds == IMAGE)
    return Batch(
        text_ids_BT=torch.from_numpy(text_ids_BT),
        kinds_BT=torch.from_numpy(kinds_BT),
        documents_BT=torch.from_numpy(documents_BT),
        positions_BT=torch.from_numpy(positions_BT),
        tasks_BT=torch.from_numpy(tasks_BT),
        image_index_N=torch.from_numpy(image_index_N),
        codes_ND=_joined(codes, depth),
        text_source_S=_joined(text_source),
        text_target_S=_joined(text_target),
        image_source_M=_joined(image_source),
        image_target_MD=_joined(image_target, depth),
        task_counts=tuple(int((tasks_BT == t).sum()) for t in range(len(TASKS))),
        modality_counts=_modality_counts(flat_kinds),
        document_counts=tuple(document_counts),
        tasks_grouped=bool((np.diff(tasks_BT.reshape(-1)) >= 0).all()),
    )


def _modality_counts(kinds_T: np.ndarray) -> tuple[int, ...]:
    in_image = int((kinds_T != TEXT).sum())
    return (len(kinds_T) - in_image, in_image)[: len(MODALITIES)]


def _joined(parts: list[np.ndarray], depth: int | None = None) -> Tensor:
    empty = np.zeros((0,) if depth is None else (0, depth), np.int64)
    return torch.from_numpy(np.concatenate([empty, *parts]).astype(np.int64))

"""What data and models exchange: documents, and the packed rows a model reads in one call.

In: one `Document` per sample (text tokens with image spans). Out: a `Batch` of index arrays that
were all computed on the CPU, so that the model never has to ask the device for a count.

Between them, documents become rows, and rows go to workers: a pure function of lengths and tasks, first fit and longest
first, task by task, so that the documents of a task are neighbours and a task route is two slices. Rows are made as
many as the workers' microbatches hold, and as short as that allows: an empty row costs as much as a full one, and a
step rarely fills its last rows. Packing decides the speed of a step and nothing else.

Shape suffixes: B rows, T tokens of a row, N image tokens of the batch (row by row, left to right),
D code depth, S supervised text tokens, M supervised image positions, X = B*T, R runs of tokens
(documents and padding).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from unifork.errors import ConfigError
from unifork.vocabulary import TASKS, Task

if TYPE_CHECKING:  # documents are prepared by processes that need no torch
    import torch
    from torch import Tensor

TEXT, IMAGE, BEGIN_IMAGE, END_IMAGE = range(4)
"""Kinds of token. Begin and end of image are embeddings of the connector, not of the vocabulary."""

NO_DOCUMENT = -1
"""The document number of padding."""

LENGTHS = 256
"""Rows of a step are a multiple of 1/256 of `row_tokens` long: steps share lengths (5 to 9 in 20 steps of 384
documents), and rounding up costs little where many workers make rows short."""


@dataclass(frozen=True, eq=False)
class Document:
    """One sample as the model reads it.

    kinds_T: kind of each token. text_ids_T: vocabulary ids, 0 where the token is not text.
    loss_mask_T: True where the token is a text token that the model is taught to predict.
    codes_ND: the codes of the image tokens, in order of appearance; in a document of the task
    `generation` the first `supervised_positions` (None: all) are targets, in one of `understanding` none.
    """

    key: str
    task: Task
    kinds_T: np.ndarray
    text_ids_T: np.ndarray
    loss_mask_T: np.ndarray
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

    text_ids_BT: "Tensor"
    kinds_BT: "Tensor"
    documents_BT: "Tensor"
    """Number of the document within its row, counted from 0; NO_DOCUMENT at padding."""
    positions_BT: "Tensor"
    """Rotary positions; they start at 0 in every document."""
    tasks_BT: "Tensor"
    """Index into TASKS; padding carries the task of the token before it (0 in an empty row)."""
    image_index_N: "Tensor"
    codes_ND: "Tensor"
    text_source_S: "Tensor"
    text_target_S: "Tensor"
    image_source_M: "Tensor"
    image_target_MD: "Tensor"
    task_counts: tuple[int, ...]
    """Tokens per task (padding included), in the order of TASKS."""
    modality_counts: tuple[int, ...]
    """Tokens per modality (padding counts as text), in the order of MODALITIES."""
    document_counts: tuple[tuple[int, ...], ...]
    """Tokens of each document per modality, row by row; the padding that ends a row follows as text."""
    tasks_grouped: bool = False
    """Whether the flattened tokens come task by task, so that a task route is slices."""
    places: "tuple[Tensor, Tensor] | None" = None
    """Of tokens that were sorted by modality, where each stood in the rows (X), and where each token of the rows is."""

    def to(self, device: "torch.device | str") -> Self:
        """The same batch with every tensor on `device`.

        To a GPU as one copy from pinned memory for each number type, so that no copy waits for the device.
        """
        import torch  # noqa: PLC0415

        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        if torch.device(device).type != "cuda" or self.kinds_BT.is_cuda:
            moved: dict[str, Any] = {name: value.to(device) for name, value in tensors.items()}
        else:
            moved = together(tensors, lambda flat: flat.pin_memory().to(device, non_blocking=True))
        return replace(self, **moved)


def together(tensors: "Mapping[str, Tensor]", move: "Callable[[Tensor], Tensor]") -> "dict[str, Tensor]":
    """What `move` makes of tensors that are laid end to end, those of each number type at once; in their shapes."""
    import torch  # noqa: PLC0415

    moved = dict(tensors)
    for dtype in {value.dtype for value in tensors.values()}:
        names = [name for name, value in tensors.items() if value.dtype == dtype]
        flat = move(torch.cat([tensors[name].reshape(-1) for name in names]))
        parts = torch.split(flat, [tensors[name].numel() for name in names])
        moved |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return moved


# ------------------------------------------------------------------------------------------- packing


@dataclass(frozen=True)
class Packing:
    """Rows of document numbers, all of the same length in tokens; some may be empty."""

    rows: list[list[int]]
    row_tokens: int
    fill: float
    """Share of the rows' tokens that belong to documents, empty rows included."""


def pack_step(lengths: list[int], tasks: list[Task], row_tokens: int, multiple: int = 1) -> Packing:
    """Pack documents into rows of at most `row_tokens`; the number of rows is a multiple of `multiple`.

    No document is split, every document is in exactly one row. Raises ConfigError when a document
    is longer than a row.
    """
    longest = max(lengths, default=0)
    if longest > row_tokens:
        raise ConfigError(
            f"row_tokens is {row_tokens}, but a document of this step has {longest} tokens; "
            f"raise row_tokens in the cluster file to at least the stage's context"
        )
    by_task = [sorted((n for n in range(len(lengths)) if tasks[n] == t), key=lambda n: (-lengths[n], n)) for t in TASKS]
    rows = _first_fit(by_task, lengths, row_tokens)
    count = -(-max(len(rows), 1) // multiple) * multiple
    unit = -(-row_tokens // LENGTHS)
    least = max(longest, -(-sum(lengths) // count), 1)
    for shorter in range(-(-least // unit) * unit, row_tokens, unit):
        found = _first_fit(by_task, lengths, shorter)
        if len(found) <= count:
            rows, row_tokens = found, shorter
            break
    rows += [[]] * (count - len(rows))
    return Packing(rows, row_tokens, sum(lengths) / (count * row_tokens))


def _first_fit(by_task: list[list[int]], lengths: list[int], row_tokens: int) -> list[list[int]]:
    rows: list[list[int]] = []
    free: list[int] = []
    for numbers in by_task:
        # of the earlier task's rows only the last one is shared, so at most one row is mixed
        first = max(len(rows) - 1, 0)
        for number in numbers:
            for row in range(first, len(rows)):
                if free[row] >= lengths[number]:
                    break
            else:
                row = len(rows)
                rows.append([])
                free.append(row_tokens)
            rows[row].append(number)
            free[row] -= lengths[number]
    return rows


def assign_rows_to_workers(
    rows: list[list[int]], workers: int, rows_per_microbatch: int
) -> list[list[list[list[int]]]]:
    """[worker][microbatch][row] -> document numbers.

    Every worker gets the same number of microbatches of the same number of rows. Raises ValueError
    when the rows do not come out even, which is an error of the caller.
    """
    if len(rows) % (workers * rows_per_microbatch):
        raise ValueError(f"{len(rows)} rows for {workers} workers with {rows_per_microbatch} rows at once")
    return [
        [own_rows[first : first + rows_per_microbatch] for first in range(0, len(own_rows), rows_per_microbatch)]
        for own_rows in (rows[worker::workers] for worker in range(workers))
    ]


def pack(rows: list[list[Document]], row_tokens: int, depth: int) -> Batch:
    """Lay documents out in rows of `row_tokens` tokens, in the order given, never splitting one.

    An empty row is legal and consists of padding. Raises ValueError when a row does not fit,
    which is an error of the caller: packing decides beforehand what goes where.
    """
    from torch import from_numpy  # noqa: PLC0415

    runs: list[tuple[int, int, int, int, int]] = []
    """Tokens, number in the row, task, images' positions, supervised ones; padding is a run of its own."""
    parts: list[Document] = []
    for b, row in enumerate(rows):
        free, task = row_tokens, 0
        for number, document in enumerate(row):
            task = TASKS.index(document.task)
            positions = len(document.codes_ND)
            supervised = len(range(positions)[: document.supervised_positions]) if document.task == "generation" else 0
            runs.append((len(document), number, task, positions, supervised))
            parts.append(document)
            free -= len(document)
        if free < 0:
            raise ValueError(f"row {b} holds {row_tokens - free} tokens, more than row_tokens={row_tokens}")
        if free:
            runs.append((free, NO_DOCUMENT, task, 0, 0))
            parts.append(_padding(free))
    lengths_R, numbers_R, tasks_R, images_R, supervised_R = np.array(runs, np.int64).reshape(-1, 5).T
    starts_R = np.cumsum(lengths_R) - lengths_R
    documents_X, tasks_X = np.repeat(numbers_R, lengths_R), np.repeat(tasks_R, lengths_R)
    positions_X = np.arange(len(rows) * row_tokens) - np.repeat(starts_R, lengths_R)
    positions_X[documents_X == NO_DOCUMENT] = 0
    kinds_X, text_ids_X = _joined([part.kinds_T for part in parts]), _joined([part.text_ids_T for part in parts])
    supervised_S = np.flatnonzero(_joined([part.loss_mask_T for part in parts], bool))
    codes_ND = _joined([part.codes_ND for part in parts if len(part.codes_ND)]).reshape(-1, depth)
    image_index_N = np.flatnonzero(kinds_X == IMAGE)
    place_N = np.arange(len(image_index_N)) - np.repeat(np.cumsum(images_R) - images_R, images_R)
    supervised_N = place_N < np.repeat(supervised_R, images_R)
    in_image_R = np.add.reduceat(kinds_X != TEXT, starts_R, dtype=np.int64) if runs else starts_R
    shape = (len(rows), row_tokens)
    return Batch(
        text_ids_BT=from_numpy(text_ids_X.reshape(shape)),
        kinds_BT=from_numpy(kinds_X.reshape(shape)),
        documents_BT=from_numpy(documents_X.reshape(shape)),
        positions_BT=from_numpy(positions_X.reshape(shape)),
        tasks_BT=from_numpy(tasks_X.reshape(shape)),
        image_index_N=from_numpy(image_index_N),
        codes_ND=from_numpy(codes_ND),
        text_source_S=from_numpy(supervised_S - 1),
        text_target_S=from_numpy(text_ids_X[supervised_S]),
        image_source_M=from_numpy(image_index_N[supervised_N] - 1),
        image_target_MD=from_numpy(codes_ND[supervised_N]),
        task_counts=tuple(int(lengths_R[tasks_R == task].sum()) for task in range(len(TASKS))),
        modality_counts=(int((lengths_R - in_image_R).sum()), int(in_image_R.sum())),
        document_counts=tuple(zip((lengths_R - in_image_R).tolist(), in_image_R.tolist(), strict=True)),
        tasks_grouped=bool((np.diff(tasks_R) >= 0).all()),
    )


def _padding(tokens: int) -> Document:
    none = np.zeros(tokens, np.int8)
    return Document("", "understanding", none, none, none.view(bool), none[:0])


def _joined(parts: list[np.ndarray], dtype: type = np.int64) -> np.ndarray:
    return np.concatenate(parts, dtype=dtype) if parts else np.zeros(0, dtype)

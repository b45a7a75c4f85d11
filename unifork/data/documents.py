"""Code shards + template + text tokenizer -> documents that were all checked before step 0.

A part of a mixture is prepared once per stage: each row is written, tokenised and checked. Rows
that cannot be used (no text for this template, nothing to learn, too long) are quarantined with
key and reason and are not part of the order. Texts stay in memory as flat arrays; codes are read
on demand, one row group at a time.

Shape suffixes: T tokens of a document, N its image tokens, D code depth.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Document
from unifork.config import MixtureEntry
from unifork.data.dialogues import Unusable
from unifork.data.prompts import PICTURE, TEMPLATES, UNCONDITIONAL, Border, Piece, Template, written
from unifork.data.schema import codes_array, codes_meta
from unifork.data.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError, IdentityError, unknown
from unifork.manifest import checked, read_manifest
from unifork.vocabulary import VIEW_OF_TASK, Task

PICTURES = "(pictures)"
"""Column added to rows that are read: how many pictures a row has, 0 where its codes are null."""


@dataclass(frozen=True)
class CodesIdentity:
    """What the model expects of codes: shape and the two identities."""

    positions: int
    depth: int
    codebook_id: str
    encoder_id: str


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A document without its codes."""

    kinds_T: np.ndarray
    text_ids_T: np.ndarray
    learned_T: np.ndarray

    def with_codes(self, key: str, task: Task, codes_ND: np.ndarray) -> Document:
        """The document itself."""
        return Document(key, task, self.kinds_T, self.text_ids_T, self.learned_T, codes_ND)


def skeleton(pieces: Sequence[Piece], tokenizer: TextTokenizer, positions: int, border: Border = "letters") -> Skeleton:
    """Tokenise a written sample; a picture becomes begin, `positions` image tokens and end."""
    kinds, ids, learned = [], [], []
    block = np.array([BEGIN_IMAGE] + [IMAGE] * positions + [END_IMAGE], np.int64)
    for is_picture, stretch in groupby(pieces, key=lambda piece: piece == PICTURE):
        run = list(stretch)
        if is_picture:
            kinds += [block] * len(run)
            ids += [np.zeros(len(block), np.int64)] * len(run)
            learned += [np.zeros(len(block), bool)] * len(run)
        else:
            text_ids, text_learned = tokenizer.encode_pieces(run, border)
            kinds.append(np.full(len(text_ids), TEXT, np.int64))
            ids.append(text_ids)
            learned.append(text_learned)
    return Skeleton(np.concatenate(kinds), np.concatenate(ids), np.concatenate(learned))


def template_named(name: str, place: str) -> Template:
    """A template by name. Raises ConfigError listing the known ones."""
    if name not in TEMPLATES:
        raise unknown("prompt template", name, TEMPLATES, place)
    return TEMPLATES[name]


@dataclass
class Quarantine:
    """Rows of a mixture that are not trained on, with the reason of each."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(data set, key, reason)"""

    def counts(self) -> dict[str, int]:
        """Rows per `data set: reason`, most frequent first."""
        return dict(Counter(f"{dataset}: {reason}" for dataset, _, reason in self.rows).most_common())


class Part:
    """One prepared part of a mixture: documents 0 to len-1, in file order."""

    def __init__(
        self,
        entry: MixtureEntry,
        codes: Path,
        tokenizer: TextTokenizer,
        identity: CodesIdentity,
        context: int,
        quarantine: Quarantine,
    ) -> None:
        """codes: the folder of the data set's views. Raises ConfigError, DataError, IdentityError."""
        self.entry, self.task, self.identity = entry, entry.task, identity
        template = template_named(entry.template, f"mixture entry of {entry.dataset}")
        if template.task != entry.task:
            raise ConfigError(
                f"mixture entry of {entry.dataset}: template {entry.template!r} is for {template.task}, "
                f"the entry says {entry.task}"
            )
        self.folder = codes / entry.dataset / VIEW_OF_TASK[entry.task]
        self.shards = read_manifest(self.folder).shards
        self.keys: list[str] = []
        self.locations: list[tuple[int, int, int]] = []  # shard, row group, row of the group
        self.group_sizes: list[int] = []
        built: list[Skeleton] = []
        for where, rows in self._row_groups(entry.text):
            before = len(built)
            for number, row in enumerate(rows):
                try:
                    pieces = written(template, row[entry.text], row[PICTURES])
                    made = skeleton(pieces, tokenizer, identity.positions, template.border)
                    _check(made, entry.task, context)
                except Unusable as reason:
                    quarantine.rows.append((entry.dataset, row["key"], str(reason)))
                    continue
                built.append(made)
                self.keys.append(row["key"])
                self.locations.append((*where, number))
            if len(built) > before:
                self.group_sizes.append(len(built) - before)
        if not built:
            raise DataError(f"{self.folder}: none of its rows can be used with template {entry.template!r}")
        self._ends = [0, *accumulate(len(one.kinds_T) for one in built)]
        self._kinds = np.concatenate([one.kinds_T for one in built]).astype(np.int8)
        self._ids = np.concatenate([one.text_ids_T for one in built]).astype(np.int32)
        self._learned = np.concatenate([one.learned_T for one in built])
        self._group = lru_cache(maxsize=128)(self._read_group)

    def __len__(self) -> int:
        return len(self.keys)

    def length(self, index: int) -> int:
        """Tokens of a document."""
        return self._ends[index + 1] - self._ends[index]

    def learned(self, index: int) -> int:
        """Text tokens of a document that are learned."""
        return int(self._learned[self._ends[index] : self._ends[index + 1]].sum())

    def document(self, index: int) -> Document:
        """A document with its codes."""
        span = slice(self._ends[index], self._ends[index + 1])
        text = Skeleton(self._kinds[span].astype(np.int64), self._ids[span].astype(np.int64), self._learned[span])
        seen = bool((text.kinds_T == IMAGE).any())
        codes_ND = self.codes(index) if seen else np.zeros((0, self.identity.depth), np.int64)
        return text.with_codes(self.keys[index], self.task, codes_ND)

    def codes(self, index: int) -> np.ndarray:
        """The codes of a document's picture, int64, shape (N, D)."""
        shard, group, row = self.locations[index]
        codes_ND: np.ndarray = self._group(shard, group)[row].astype(np.int64)
        return codes_ND

    def _row_groups(self, text: str) -> Iterator[tuple[tuple[int, int], list[dict[str, Any]]]]:
        for number, shard in enumerate(self.shards):
            path = checked(self.folder, shard)
            file = pq.ParquetFile(path)
            if text not in file.schema_arrow.names:
                raise unknown("text column", text, set(file.schema_arrow.names) - {"key", "codes"}, str(path))
            self._check_identity(codes_meta(file.schema_arrow, str(path)), str(path))
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=["key", text]).to_pylist()
                for row, pictures in zip(rows, _pictures(file, group), strict=True):
                    row[PICTURES] = pictures
                yield (number, group), rows

    def _check_identity(self, meta: dict[str, Any], place: str) -> None:
        want = self.identity
        if meta["shape"] != [want.positions, want.depth]:
            raise IdentityError(
                f"{place}: codes of shape {meta['shape']}, the model reads [{want.positions}, {want.depth}]"
            )
        for name in ("codebook_id", "encoder_id"):
            if meta[name] != getattr(want, name):
                raise IdentityError(
                    f"{place}: {name} {meta[name]}, the model was made for {getattr(want, name)}; "
                    f"these codes come from another image tokenizer. Encode the data again, or use their tokenizer."
                )
        view = meta["encoding"]["view"]
        if view != VIEW_OF_TASK[self.task]:
            raise DataError(f"{place}: codes of the view {view!r}; {self.task} reads {VIEW_OF_TASK[self.task]!r}")

    def _read_group(self, shard: int, group: int) -> np.ndarray:
        file = pq.ParquetFile(self.folder / self.shards[shard].path)
        shape = (self.identity.positions, self.identity.depth)
        return codes_array(file.read_row_group(group, columns=["codes"]).column("codes"), shape)


def _pictures(file: pq.ParquetFile, group: int) -> list[int]:
    """Pictures of each row of a row group. The codes are read only where some are missing."""
    columns = file.metadata.row_group(group)
    codes = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "codes")
    if codes.statistics is not None and codes.statistics.null_count == 0:
        return [1] * columns.num_rows
    present = file.read_row_group(group, columns=["codes"]).column("codes").is_valid()
    return [int(one) for one in present.to_pylist()]


def unconditional(tokenizer: TextTokenizer, positions: int) -> Skeleton:
    """The skeleton that replaces a generation document whose prompt is dropped."""
    return skeleton(UNCONDITIONAL, tokenizer, positions)


def _check(made: Skeleton, task: Task, context: int) -> None:
    if len(made.kinds_T) > context:
        raise Unusable(f"longer than the context of {context} tokens")
    if task == "understanding" and not made.learned_T.any():
        raise Unusable("nothing to learn")
    if task == "generation" and not (made.kinds_T == IMAGE).any():
        raise Unusable("no picture to generate")
    if made.learned_T[0]:
        raise Unusable("the first token cannot be learned: nothing stands before it")

"""Code shards + template + text tokenizer -> documents that were all checked before step 0.

A part of a mixture is prepared once: each row is written, tokenized and checked, and the result is
kept as an index (`data/prepared`) under the hash of everything it depends on. Rows that cannot be
used (no text for this template, nothing to learn, too long) are quarantined with key and reason and
are not part of the order. Codes are read on demand, one row group at a time.

Shape suffixes: T tokens of a document, N its image tokens, D code depth.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tokenizers

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Document
from unifork.config import MixtureEntry, fingerprint
from unifork.documents.index import NO_IMAGE, QUARANTINE, Index, TokenizedDocument, Writer, prepared
from unifork.documents.prompts import IMAGE_PIECE, UNCONDITIONAL, Border, Piece, Template, template_for, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import DataError, IdentityError, unknown
from unifork.layout import Layout
from unifork.shards.manifest import local_path, make_local, manifest_sha256, read_manifest
from unifork.shards.schema import Unusable, codes_array, codes_meta
from unifork.vocabulary import VIEW_OF_TASK, VOCABULARY_VERSION, Task

DOCUMENTS_VERSION = 1
"""Raise when the same row would become another document."""
IMAGES = "(images)"
"""Column added to rows that are read: how many images a row has, 0 where its codes are null."""


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
    loss_mask_T: np.ndarray

    def with_codes(self, key: str, task: Task, codes_ND: np.ndarray, supervised: int | None = None) -> Document:
        """The document itself; `supervised` positions of its image are targets, None: all."""
        return Document(key, task, self.kinds_T, self.text_ids_T, self.loss_mask_T, codes_ND, supervised)


def skeleton(pieces: Sequence[Piece], tokenizer: TextTokenizer, positions: int, border: Border = "letters") -> Skeleton:
    """Tokenize a written sample; an image becomes begin, `positions` image tokens and end."""
    kinds, ids, supervised = [], [], []
    block = np.array([BEGIN_IMAGE] + [IMAGE] * positions + [END_IMAGE], np.int64)
    for is_image, stretch in groupby(pieces, key=lambda piece: piece == IMAGE_PIECE):
        run = list(stretch)
        if is_image:
            kinds += [block] * len(run)
            ids += [np.zeros(len(block), np.int64)] * len(run)
            supervised += [np.zeros(len(block), bool)] * len(run)
        else:
            text_ids, text_supervised = tokenizer.encode_pieces(run, border)
            kinds.append(np.full(len(text_ids), TEXT, np.int64))
            ids.append(text_ids)
            supervised.append(text_supervised)
    return Skeleton(np.concatenate(kinds), np.concatenate(ids), np.concatenate(supervised))


@dataclass
class Quarantine:
    """Rows of a mixture that are not trained on, with the reason of each."""

    parts: list[tuple[str, Index]] = field(default_factory=list)
    """Data set and index of every part."""

    def counts(self) -> dict[str, int]:
        """Rows per `data set: reason`, most frequent first."""
        total: Counter[str] = Counter()
        for dataset, index in self.parts:
            total.update({f"{dataset}: {reason}": count for reason, count in index.quarantined.items()})
        return dict(total.most_common())

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(data set, key, reason) of every row."""
        for dataset, index in self.parts:
            with open(index.folder / QUARANTINE) as lines:
                for line in lines:
                    key, reason = json.loads(line)
                    yield dataset, key, reason


class MixturePart:
    """One prepared part of a mixture: documents 0 to len-1, in file order."""

    def __init__(
        self,
        entry: MixtureEntry,
        layout: Layout,
        tokenizer: TextTokenizer,
        identity: CodesIdentity,
        context: int,
        quarantine: Quarantine,
    ) -> None:
        """Raises ConfigError, DataError, IdentityError."""
        self.entry, self.task, self.identity = entry, entry.task, identity
        template = template_for(entry, f"mixture entry of {entry.dataset}")
        self.folder = layout.codes / entry.dataset / VIEW_OF_TASK[entry.task]
        self.shards, self.copies = read_manifest(self.folder).shards, layout.fetched
        self.paths = [local_path(self.folder, shard, self.copies) for shard in self.shards]
        inputs = {
            "codes": manifest_sha256(self.folder),
            "identity": asdict(identity),
            "text": entry.text,
            "template": asdict(template),
            "tokenizer": tokenizer.identity,
            "context": context,
            "versions": [DOCUMENTS_VERSION, VOCABULARY_VERSION, tokenizers.__version__],
        }
        name = f"{entry.dataset}-{entry.template}-{fingerprint(inputs)}"
        self.index = prepared(
            layout.prepared / name, lambda writer: self._prepare(writer, template, tokenizer, context)
        )
        for shard, path in zip(self.shards, self.paths, strict=True):  # hashes were checked when the index was made
            if not path.exists() or path.stat().st_size != shard.bytes:
                make_local(self.folder, shard, self.copies)
        quarantine.parts.append((entry.dataset, self.index))
        self._group = lru_cache(maxsize=128)(self._read_group)

    def __len__(self) -> int:
        return self.index.rows

    @property
    def group_sizes(self) -> np.ndarray:
        """Usable documents of each row group that has any, in file order."""
        return self.index.group_sizes_G

    def key(self, index: int) -> str:
        """Key of a document."""
        return self.index.key(index)

    def length(self, index: int) -> int:
        """Tokens of a document."""
        text = self.index.text(index)
        seen = self.index.image_at_R[index] != NO_IMAGE
        return int(text.stop - text.start) + (self.identity.positions + 2 if seen else 0)

    def supervised(self, index: int) -> int:
        """Text tokens of a document that are supervised."""
        return int(self.index.supervised_count_R[index])

    def document(self, index: int, supervised: int | None = None) -> Document:
        """A document with its codes; `supervised` positions of its image are targets, None: all."""
        text = self.index.text(index)
        at, image = int(self.index.image_at_R[index]), self.identity.positions + 2
        if at == NO_IMAGE:
            ids_T, loss_mask_T = self.index.text_ids_S[text].astype(np.int64), np.array(self.index.loss_mask_S[text])
            alone = Skeleton(np.full(len(ids_T), TEXT, np.int64), ids_T, loss_mask_T)
            return alone.with_codes(self.key(index), self.task, np.zeros((0, self.identity.depth), np.int64))
        T = text.stop - text.start + image
        kinds_T, text_ids_T, loss_mask_T = np.full(T, TEXT, np.int8), np.zeros(T, np.int32), np.zeros(T, bool)
        kinds_T[at], kinds_T[at + 1 : at + image - 1], kinds_T[at + image - 1] = BEGIN_IMAGE, IMAGE, END_IMAGE
        for target_T, source in ((text_ids_T, self.index.text_ids_S), (loss_mask_T, self.index.loss_mask_S)):
            target_T[:at], target_T[at + image :] = source[text][:at], source[text][at:]
        doc = Skeleton(kinds_T, text_ids_T, loss_mask_T)
        return doc.with_codes(self.key(index), self.task, self.codes(index), supervised)

    def codes(self, index: int) -> np.ndarray:
        """The codes of a document's image, uint16, shape (N, D)."""
        shard, group, row = self.index.where_R3[index].tolist()
        return np.asarray(self._group(shard, group)[row])

    def _prepare(self, writer: Writer, template: Template, tokenizer: TextTokenizer, context: int) -> None:
        for (shard, group), rows in self._row_groups(self.entry.text):
            usable = []
            for number, row in enumerate(rows):
                try:
                    pieces = written(template, row[self.entry.text], row[IMAGES])
                    doc = skeleton(pieces, tokenizer, self.identity.positions, template.border)
                    _check(doc, self.task, context)
                except Unusable as reason:
                    writer.quarantine(row["key"], str(reason))
                    continue
                text = doc.kinds_T == TEXT
                at = NO_IMAGE if text.all() else int(np.argmin(text))
                usable.append(TokenizedDocument(row["key"], doc.text_ids_T[text], doc.loss_mask_T[text], at, number))
            writer.add(shard, group, usable)
        if not writer.rows:
            raise DataError(
                f"{self.folder}: none of its rows can be used with template {self.entry.template!r}: "
                f"{dict(writer.quarantined.most_common(3))}"
            )

    def _row_groups(self, text: str) -> Iterator[tuple[tuple[int, int], list[dict[str, Any]]]]:
        for number, shard in enumerate(self.shards):
            path = make_local(self.folder, shard, self.copies)
            file = pq.ParquetFile(path)
            if text not in file.schema_arrow.names:
                raise unknown("text column", text, set(file.schema_arrow.names) - {"key", "codes"}, str(path))
            self._check_identity(codes_meta(file.schema_arrow, str(path)), str(path))
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=["key", text]).to_pylist()
                for row, images in zip(rows, _images(file, group), strict=True):
                    row[IMAGES] = images
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
        file = pq.ParquetFile(self.paths[shard])
        shape = (self.identity.positions, self.identity.depth)
        return codes_array(file.read_row_group(group, columns=["codes"]).column("codes"), shape)


def _images(file: pq.ParquetFile, group: int) -> list[int]:
    """Images of each row of a row group. The codes are read only where some are missing."""
    columns = file.metadata.row_group(group)
    codes = next(c for c in map(columns.column, range(columns.num_columns)) if c.path_in_schema == "codes")
    if codes.statistics is not None and codes.statistics.null_count == 0:
        return [1] * columns.num_rows
    present = file.read_row_group(group, columns=["codes"]).column("codes").is_valid()
    return [int(valid) for valid in present.to_pylist()]


def unconditional(tokenizer: TextTokenizer, positions: int) -> Skeleton:
    """The skeleton that replaces a generation document whose prompt is dropped."""
    return skeleton(UNCONDITIONAL, tokenizer, positions)


def _check(doc: Skeleton, task: Task, context: int) -> None:
    if len(doc.kinds_T) > context:
        raise Unusable(f"longer than the context of {context} tokens")
    if task == "understanding" and not doc.loss_mask_T.any():
        raise Unusable("nothing to learn")
    if task == "generation" and not (doc.kinds_T == IMAGE).any():
        raise Unusable("no image to generate")
    if doc.loss_mask_T[0]:
        raise Unusable("the first token cannot be supervised: nothing stands before it")

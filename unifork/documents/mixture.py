"""Prepared documents and codes -> the parts of a mixture, as files that are mapped into memory.

What `pipelines.prepare` made is opened, nothing is tokenized. How long a document may be is known only here: longer
ones are counted and are not part of the order. Memory grows by a few numbers for each row group; documents are looked
up, and codes read, one row group at a time.

Shape suffixes: T tokens of a document, N its image tokens, P positions of an image, D code depth, R documents, S text
tokens and I images of a shard or row group, G row groups of all shards.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tokenizers

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Document
from unifork.config import MixtureEntry
from unifork.documents.prompts import IMAGE_PIECE, UNCONDITIONAL, Border, Piece, Template, template_for
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import DataError, IdentityError
from unifork.layout import Layout, command_for
from unifork.shards.job import mapped_table
from unifork.shards.manifest import (
    MANIFEST,
    Manifest,
    local_path,
    make_local,
    manifest_sha256,
    present,
    read_manifest,
)
from unifork.shards.schema import codes_array, codes_meta, images_of_rows
from unifork.vocabulary import VIEW_OF_TASK, VOCABULARY_VERSION, Task

DOCUMENTS_VERSION = 3
"""Raise when the same row would become another document, or prepared shards would look otherwise."""
GROUPS_AT_HAND, DOCUMENTS_AT_HAND = 128, 4096
"""Shards that stay mapped and row groups whose codes stay in memory (neighbors of the order lie in 64), and documents
whose place is not looked up again: a step asks for each several times."""


@dataclass(frozen=True)
class CodesIdentity:
    """What the model expects of codes: shape and the two identities."""

    positions: int
    depth: int
    codebook_id: str
    encoder_id: str
    codebook_size: int = 2**16
    """Codes are below it; by default as many as a code of two bytes can name."""


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


def made_with(text: str, template: Template, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Everything but the codes that decides the documents of a text column."""
    return {
        "text": text,
        "template": asdict(template),
        "tokenizer": tokenizer.identity,
        "versions": [DOCUMENTS_VERSION, VOCABULARY_VERSION, tokenizers.__version__],
    }


class Documents(NamedTuple):
    """The columns of a prepared shard, views of the mapped file."""

    keys: pa.StringArray
    codes: dict[str, Any]
    """What the shard of codes says of itself."""
    text_ids_S: np.ndarray
    loss_mask_S: np.ndarray
    text_starts_R1: np.ndarray
    """Where a document's text tokens begin, and where the last one's end; the same of its images."""
    images_at_I: np.ndarray
    image_starts_R1: np.ndarray
    tokens_R: np.ndarray
    supervised_R: np.ndarray
    held_out_R: np.ndarray
    row_group_R: np.ndarray
    row_R: np.ndarray

    @classmethod
    def mapped(cls, path: Path) -> "Documents":
        """Those of a file with at least one row."""
        table = mapped_table(path)
        column = {name: table[name].chunk(0) for name in table.column_names}
        texts, images = column["text_ids"], column["images_at"]
        numbers = map(column.get, ("tokens", "supervised", "held_out", "row_group", "row"))
        views = [texts.values, column["loss_mask"].values, texts.offsets, images.values, images.offsets, *numbers]
        text_ids_S, loss_mask_S, *others = (view.to_numpy() for view in views)
        codes = codes_meta(table.schema, str(path))
        return cls(column["key"], codes, text_ids_S, loss_mask_S.view(bool), *others)

    def usable(self, context: int, held_out: bool, rows: slice = slice(None)) -> np.ndarray:
        """Mask over some rows: documents that a context can hold, of those to train on or of those held out."""
        mask: np.ndarray = (self.tokens_R[rows] <= context) & (self.held_out_R[rows] == held_out)
        return mask


class MixturePart:
    """One part of a mixture: its documents 0 to len-1 that a context can hold, in file order.

    Those that are held out are a part of their own, which may be empty.
    """

    def __init__(
        self, entry: MixtureEntry, layout: Layout, tokenizer: TextTokenizer, identity: CodesIdentity, context: int,
        *, held_out: bool = False,
    ) -> None:  # fmt: skip
        """Raises ConfigError, DataError, IdentityError, all before a document is read."""
        self.entry, self.task, self.identity, self.context = entry, entry.task, identity, context
        self.held_out = held_out
        template = template_for(entry, f"mixture entry of {entry.dataset}")
        codes, self.folder = layout.codes / entry.dataset / VIEW_OF_TASK[entry.task], layout.prepared / entry.prepared
        if not (self.folder / MANIFEST).exists():
            raise DataError(f"{self.folder}: not there yet; {command_for(self.folder)} makes it")
        manifest = present(self.folder)
        expected = {**made_with(entry.text, template, tokenizer), "codes": manifest_sha256(codes)}
        if other := [name for name, value in expected.items() if manifest.lineage.get(name) != value]:
            raise DataError(
                f"{self.folder}: made with other {' and '.join(other)} than are here now; "
                f"`dvc repro --force --single-item prepare@{entry.prepared}` makes it anew"
            )
        self.shards = manifest.shards
        self._documents = lru_cache(maxsize=GROUPS_AT_HAND)(self._map)
        self._usable = lru_cache(maxsize=GROUPS_AT_HAND)(self._usable_rows)
        self._find = lru_cache(maxsize=DOCUMENTS_AT_HAND)(self._look_up)
        self._codes = lru_cache(maxsize=GROUPS_AT_HAND)(self._read_codes)
        self._open(manifest)
        shards, copies = read_manifest(codes).shards, layout.fetched
        self.code_paths = [local_path(codes, shard, copies) for shard in shards]
        for shard, path in zip(shards, self.code_paths, strict=True):
            if not path.exists() or path.stat().st_size != shard.bytes:
                make_local(codes, shard, copies)

    def _open(self, manifest: Manifest) -> None:
        """Count what the context can hold, a shard at a time."""
        groups, too_long = [np.zeros((0, 4), np.int64)], 0
        for number, shard in enumerate(self.shards):
            if shard.rows:
                documents = self._documents(number)
                self._check_identity(documents.codes, str(self.folder / shard.path))
                first_G = np.flatnonzero(np.diff(documents.row_group_R, prepend=-1))
                usable_R = documents.usable(self.context, self.held_out)
                usable_G = np.add.reduceat(usable_R, first_G, dtype=np.int64)
                too_long += int((documents.tokens_R > self.context).sum())
                stop_G = np.append(first_G[1:], shard.rows)
                groups.append(np.stack([np.full(len(first_G), number), first_G, stop_G, usable_G], 1)[usable_G > 0])
        shard_G, first_G, stop_G, self.group_sizes = np.concatenate(groups).T
        self._groups_G3, self._ends_G = np.stack([shard_G, first_G, stop_G], 1), np.cumsum(self.group_sizes)
        lost = {**manifest.dropped, f"longer than the context of {self.context} tokens": too_long}
        self.quarantined = Counter({reason: n for reason, n in lost.items() if n})
        """Rows of which no document is used, by reason."""
        if not len(self) and not self.held_out:
            few = dict(self.quarantined.most_common(3))
            raise DataError(f"{self.folder}: none of its rows can be used with this context: {few}")

    def __len__(self) -> int:
        return int(self.group_sizes.sum())

    def key(self, index: int) -> str:
        """Key of a document."""
        documents, row, _ = self._find(index)
        return str(documents.keys[row])

    def length(self, index: int) -> int:
        """Tokens of a document."""
        documents, row, _ = self._find(index)
        return int(documents.tokens_R[row])

    def supervised(self, index: int) -> int:
        """Text tokens of a document that are supervised."""
        documents, row, _ = self._find(index)
        return int(documents.supervised_R[row])

    def document(self, index: int, supervised: int | None = None) -> Document:
        """A document with its codes; `supervised` positions of its image are targets, None: all."""
        documents, row, _ = self._find(index)
        text = slice(documents.text_starts_R1[row], documents.text_starts_R1[row + 1])
        images = slice(documents.image_starts_R1[row], documents.image_starts_R1[row + 1])
        T, length = int(documents.tokens_R[row]), self.identity.positions + 2
        kinds_T, text_ids_T, loss_mask_T = np.full(T, TEXT, np.int8), np.zeros(T, np.int32), np.zeros(T, bool)
        ids_S, mask_S, done = documents.text_ids_S[text], documents.loss_mask_S[text], 0
        for number, before in enumerate([*documents.images_at_I[images].tolist(), len(ids_S)]):
            words = slice(done + number * length, before + number * length)
            text_ids_T[words], loss_mask_T[words] = ids_S[done:before], mask_S[done:before]
            begin, end, done = words.stop, words.stop + length - 1, before
            if end < T:
                kinds_T[begin], kinds_T[begin + 1 : end], kinds_T[end] = BEGIN_IMAGE, IMAGE, END_IMAGE
        doc = Skeleton(kinds_T, text_ids_T, loss_mask_T)
        return doc.with_codes(self.key(index), self.task, self.codes(index), supervised)

    def codes(self, index: int) -> np.ndarray:
        """The codes of a document's images one after the other, uint16, shape (N, D)."""
        documents, row, shard = self._find(index)
        first, last = documents.image_starts_R1[row : row + 2]
        if first == last:
            return np.zeros((0, self.identity.depth), np.uint16)
        codes_IPD, starts_R1 = self._codes(shard, int(documents.row_group_R[row]))
        row = documents.row_R[row]
        return np.asarray(codes_IPD[starts_R1[row] : starts_R1[row + 1]].reshape(-1, self.identity.depth))

    def _look_up(self, index: int) -> tuple[Documents, int, int]:
        """The columns of a document's shard, its row there, and the number of the shard."""
        group = int(np.searchsorted(self._ends_G, index, side="right"))
        documents, row_U = self._usable(group)
        row = row_U[index - self._ends_G[group]]  # counted from the end of the group
        return documents, int(row), int(self._groups_G3[group, 0])

    def _usable_rows(self, group: int) -> tuple[Documents, np.ndarray]:
        """The shard of a row group, and the rows of those of its documents that the context can hold."""
        shard, first, stop = self._groups_G3[group].tolist()
        documents = self._documents(shard)
        return documents, first + np.flatnonzero(documents.usable(self.context, self.held_out, slice(first, stop)))

    def _map(self, shard: int) -> Documents:
        return Documents.mapped(self.folder / self.shards[shard].path)

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

    def _read_codes(self, shard: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes of the images of a row group, and where those of each row begin and the last one's end.

        Raises DataError for a code that the codebook does not have.
        """
        file, most = pq.ParquetFile(self.code_paths[shard]), self.identity.codebook_size - 1
        shape = (self.identity.positions, self.identity.depth)
        column = file.read_row_group(group, columns=["codes"]).column("codes")
        codes_IPD, starts_R1 = codes_array(column, shape), np.append(0, np.cumsum(images_of_rows(column)))
        if codes_IPD.max(initial=0) > most:
            image = int((codes_IPD > most).any((1, 2)).argmax())
            row = int(np.searchsorted(starts_R1, image, side="right")) - 1
            key = file.read_row_group(group, columns=["key"])["key"][row].as_py()
            raise DataError(
                f"{self.code_paths[shard]}: key {key!r} of {self.entry.dataset} has code {codes_IPD[image].max()}; "
                f"the codebook ends at {most}. Encode the data set again"
            )
        return codes_IPD, starts_R1


def unconditional(tokenizer: TextTokenizer, positions: int) -> Skeleton:
    """The skeleton that replaces a generation document whose prompt is dropped."""
    return skeleton(UNCONDITIONAL, tokenizer, positions)

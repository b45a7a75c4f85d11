"""Text in, token ids out: byte-level BPE directories as they come from the Hub, special tokens by name.

Either a `tokenizer.json`, or `vocab.json` + `merges.txt` + the added tokens of
`tokenizer_config.json` (Qwen2's older form). The `tokenizers` library is used directly: it gives
character offsets and costs no import of torch. The demo trains a small tokenizer of the same kind.

What people wrote is never read as a control token: only a template's own words may name one.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unifork.config import Card, fingerprint
from unifork.documents.prompts import Border, Piece
from unifork.errors import DataError
from unifork.shards.job import KeptRows
from unifork.shards.manifest import write_atomically, write_json
from unifork.shards.schema import text_columns
from unifork.vocabulary import DROPPED_PROMPT, PAD, SPECIAL_TOKENS, TURN_END, TURN_START

TEXT_TOKENIZER_VERSION = 1
"""Raise when the same texts, or the same imported files, would give another tokenizer."""
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2.5's rule for splitting text before BPE (its tokenizer.json)."""

FILE, CONFIG_FILE, VOCABULARY, MERGES = "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"
FILES = (FILE, CONFIG_FILE, VOCABULARY, MERGES, "special_tokens_map.json", "LICENSE")
"""Files of a tokenizer directory; of other directories with these names, such as a whole model, nothing else."""

SLOW_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
"""Tokenizers whose splitting rule follows from their class, where there is no `tokenizer.json`."""

NEEDED = (TURN_START, TURN_END, PAD, DROPPED_PROMPT)
"""Special tokens without which no stage can be written."""


class TextTokenizer:
    """A tokenizer directory, read-only."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError when files or special tokens are missing, or a file is damaged."""
        self.place = str(directory)
        self._tokenizer = _opened(directory)
        # the same vocabulary without any added token: what people wrote goes through this one
        self._plain = Tokenizer(self._tokenizer.model)
        self._plain.normalizer, self._plain.pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        self._added = {number: token.content for number, token in self._tokenizer.get_added_tokens_decoder().items()}
        missing = [token for token in NEEDED if token not in self._added.values()]
        if missing:
            raise DataError(
                f"{directory}: no special token {', '.join(missing)} among its {len(self._added)} added tokens; "
                f"Qwen2.5's tokenizer has them"
            )
        longest_first = sorted(self._added.values(), key=len, reverse=True)
        self._control = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self._tokenizer.get_vocab_size(with_added_tokens=False), max(self._added) + 1)

    @property
    def identity(self) -> str:
        """Fingerprint of the whole tokenizer."""
        return fingerprint(self._tokenizer.to_str())

    @property
    def special_tokens(self) -> dict[str, int]:
        """Ids of Qwen2.5's special tokens, as far as the vocabulary has them."""
        ids = {token: number for number, token in self._added.items()}
        return {token: ids[token] for token in SPECIAL_TOKENS if token in ids}

    def id_of(self, token: str) -> int:
        """The id of a token by name. Raises DataError when the vocabulary lacks it."""
        found: int | None = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"{self.place}: no token {token!r} in the vocabulary of {self.vocab_size} entries")
        return found

    def control_token(self, number: int) -> str | None:
        """The name of a control token by id; None for a token of text."""
        return self._added.get(number)

    def encode(self, text: str) -> list[int]:
        """Token ids of what people wrote; the names of special tokens in it are letters like any other."""
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_pieces(self, pieces: Sequence[Piece], border: Border = "letters") -> tuple[np.ndarray, np.ndarray]:
        """Ids (T) of pieces of text that follow each other, and which of these tokens are supervised (T).

        The pieces are tokenized as one text, in which only control tokens are borders.
        """
        ids: list[int] = []
        supervised: list[bool] = []
        units = [unit for piece in pieces for unit in self._units(piece)]
        for is_control, stretch in groupby(units, key=lambda unit: unit[2]):
            run = list(stretch)
            if is_control:
                ids += [self.id_of(text) for text, _, _ in run]
                supervised += [taught for _, taught, _ in run]
            else:
                taught_L = np.repeat([taught for _, taught, _ in run], [len(text) for text, _, _ in run])
                text = "".join(text for text, _, _ in run)
                encoding = self._plain.encode(text, add_special_tokens=False)
                ids += encoding.ids
                if not taught_L.any():
                    supervised += [False] * len(encoding.ids)
                elif border == "letters":
                    start_T, stop_T = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
                    taught_before_L1 = np.concatenate([[0], np.cumsum(taught_L)])
                    taught_T = taught_before_L1[stop_T] - taught_before_L1[start_T]
                    supervised += ((taught_T == stop_T - start_T) & (stop_T > start_T)).tolist()
                else:
                    given = len(self.encode(text[: int(taught_L.argmax())]))
                    supervised += [number >= given for number in range(len(encoding.ids))]
        return np.array(ids, np.int64), np.array(supervised, bool)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _units(self, piece: Piece) -> Iterator[tuple[str, bool, bool]]:
        """(text, supervised, whether it is a control token) of the stretches of a piece."""
        parts = self._control.split(piece.text or "") if piece.control else [piece.text or ""]
        for number, text in enumerate(parts):
            if text:
                yield text, piece.supervised, number % 2 == 1


def _opened(directory: Path) -> Tokenizer:
    """The tokenizer of a directory, of whichever form."""
    if (directory / FILE).exists():
        try:
            return Tokenizer.from_file(str(directory / FILE))
        except Exception as error:  # the library raises nothing more specific
            raise DataError(f"{directory / FILE}: not a tokenizer: {error}") from None
    missing = [name for name in (VOCABULARY, MERGES, CONFIG_FILE) if not (directory / name).exists()]
    if missing:
        raise DataError(
            f"{directory}: not a text tokenizer, it has neither {FILE} nor {', '.join(missing)}; "
            f"a directory has {FILE}, or all of {VOCABULARY}, {MERGES} and {CONFIG_FILE}"
        )
    try:
        tokenizer = Tokenizer(models.BPE.from_file(str(directory / VOCABULARY), str(directory / MERGES)))
        config = json.loads((directory / CONFIG_FILE).read_text())
        kind, added = config["tokenizer_class"], config["added_tokens_decoder"]
        tokens = {int(number): AddedToken(**token) for number, token in added.items()}
    except Exception as error:
        raise DataError(f"{directory}: not a Qwen2 tokenizer: {type(error).__name__}: {error}") from None
    if kind not in SLOW_CLASSES:
        raise DataError(f"{directory / CONFIG_FILE}: tokenizer_class {kind!r}; known without a {FILE}: {SLOW_CLASSES}")
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), _splitting()
    tokenizer.decoder = decoders.ByteLevel()
    for number, token in sorted(tokens.items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != number:
            raise DataError(
                f"{directory / CONFIG_FILE}: {token.content!r} is said to have id {number}, after {VOCABULARY} "
                f"and the tokens before it it has {tokenizer.token_to_id(token.content)}"
            )
    return tokenizer


def _splitting() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def import_text_tokenizer(folder: Path, directory: Path) -> TextTokenizer:
    """Copy the tokenizer of a folder as it is. Raises DataError when it is not one that can be used."""
    TextTokenizer(folder)
    for name in FILES:
        if (folder / name).exists():
            data = (folder / name).read_bytes()
            write_atomically(directory / name, lambda path, data=data: path.write_bytes(data))  # type: ignore[misc]
    return TextTokenizer(directory)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> TextTokenizer:
    """Train a byte-level BPE with Qwen2.5's splitting rule and special tokens, and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitting()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    write_atomically(directory / FILE, lambda path: tokenizer.save(str(path)))
    # lets transformers' AutoTokenizer open the directory too
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TURN_END, "pad_token": PAD}
    write_json(directory / "tokenizer_config.json", names)
    return TextTokenizer(directory)


def texts_of(rows: KeptRows, card: Card) -> Iterator[str]:
    """Every text of a set's kept rows that are not held out, dialogues turn by turn."""
    for table in rows.tables(["key", *text_columns(card)]):
        for row in table.to_pylist():
            if card.holds_out(row.pop("key")):
                continue
            for value in row.values():
                yield from [value] if isinstance(value, str) else (turn["text"] for turn in value or [])

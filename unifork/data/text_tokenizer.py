"""Text in, token ids out: any byte-level BPE in a `tokenizer.json`, special tokens by name.

The `tokenizers` library is used directly: it loads Qwen2.5's real tokenizer as it comes from the
Hub, gives character offsets, and costs no import of torch. The demo trains a small one of the same
kind on its own texts.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from unifork.config import Card, fingerprint
from unifork.data.hop import read_table
from unifork.data.schema import text_columns
from unifork.errors import DataError
from unifork.manifest import read_manifest, write_atomically, write_json
from unifork.vocabulary import PAD, SPECIAL_TOKENS, TURN_END

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2.5's rule for splitting text before BPE (its tokenizer.json)."""

FILE = "tokenizer.json"


class TextTokenizer:
    """A tokenizer directory, read-only."""

    def __init__(self, directory: Path) -> None:
        path = directory / FILE
        if not path.exists():
            raise DataError(f"{path}: no such file; a text tokenizer is a directory with a {FILE}")
        self._tokenizer = Tokenizer.from_file(str(path))
        self.place = str(path)

    @property
    def vocab_size(self) -> int:
        """Entries, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def identity(self) -> str:
        """Fingerprint of the whole tokenizer."""
        return fingerprint(self._tokenizer.to_str())

    def id_of(self, token: str) -> int:
        """The id of a token by name. Raises DataError when the vocabulary lacks it."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"{self.place}: no token {token!r} in the vocabulary of {self.vocab_size} entries")
        return found

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens in it are recognised, none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_learned(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, and which tokens lie wholly inside one of the learned character spans.

        A token that crosses the border of a span is not learned: part of it was given.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        offsets_T2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        learned_T = np.zeros(len(offsets_T2), bool)
        for start, stop in spans:
            learned_T |= (offsets_T2[:, 0] >= start) & (offsets_T2[:, 1] <= stop)
        return np.array(encoding.ids, np.int64), learned_T

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def train_text_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> TextTokenizer:
    """Train a byte-level BPE with Qwen2.5's splitting rule and special tokens, and save it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
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


def texts_of(folder: Path, card: Card) -> Iterator[str]:
    """Every text of a set's filtered rows, dialogues turn by turn."""
    manifest, names = read_manifest(folder), text_columns(card)
    for shard in manifest.shards:
        for row in read_table(folder, shard, names).to_pylist():
            for value in row.values():
                yield from [value] if isinstance(value, str) else (turn["text"] for turn in value or [])

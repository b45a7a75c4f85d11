"""`06_text.json`: token ids, labels and supervised positions of every stage's template.

In: a fixture folder with its tokenizer. Out: what the original's templates and masks gave, beside
what the templates of `unifork.documents.prompts` give for the same caption or dialogue. An image is one
token in both: the original's marker.

Shape suffixes: T tokens of a sample.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from benchmarks.parity.comparison import Comparison
from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE
from unifork.documents.mixture import skeleton
from unifork.documents.prompts import TEMPLATES, UNCONDITIONAL, Piece, Template, question, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import DataError
from unifork.shards.schema import IMAGE_MARK, turns_of
from unifork.vocabulary import TURN_END

ITEM = "06_text"
IGNORED = -100
IMAGE_ID = -200
"""The original's marker for an image, in ids and, where the image is supervised, in labels."""

SAMPLES: dict[str, str] = {
    "stage1_imagenet_gen": "generate-class",
    "stage1_imagenet_und": "name-class",
    "stage1.5_gen": "generate-plain",
    "stage1.5_und": "official-caption-plain",
    "stage2_und": "official-answer-plain",
    "stage2_3_4_gen": "generate",
    "stage3_und": "official-answer",
}
"""Template of the cases whose name begins so."""
DROPPED, INFERENCE = "gen_dropped", "inference_und"
"""The cases of a dropped prompt, and of a question without an answer."""


def comparisons(folder: Path) -> Iterator[Comparison]:
    """Every case of `06_text.json`. Raises DataError at the end for cases that no template is known for."""
    tokenizer = TextTokenizer(folder / "tokenizer")
    cases = json.loads((folder / f"{ITEM}.json").read_text())
    supported = {name: case for name, case in cases.items() if name.startswith((*SAMPLES, DROPPED, INFERENCE))}
    for name, case in supported.items():
        actual = _computed(name, case, tokenizer)
        for key in actual:
            if key in case:
                yield Comparison(ITEM, f"{name}.{key}", _tensor(case[key]), _tensor(actual[key]))
    if supported != cases:
        others = ", ".join(name for name in cases if name not in supported)
        raise DataError(f"{folder / ITEM}.json: no template is known for {others}; known: {', '.join(SAMPLES)}")


def _computed(name: str, case: dict[str, Any], tokenizer: TextTokenizer) -> dict[str, list[int]]:
    """input_ids, labels and supervised_positions of a case."""
    if name.startswith(DROPPED):
        return _labelled(UNCONDITIONAL, TEMPLATES["generate"], tokenizer)
    if name.startswith(INFERENCE):
        question_text = _between(case["text"], "USER: ", " ASSISTANT:").removeprefix(f"{IMAGE_MARK}\n")
        return _labelled(question(TEMPLATES["official-answer"], question_text), TEMPLATES["official-answer"], tokenizer)
    template = next(TEMPLATES[form] for start, form in SAMPLES.items() if name.startswith(start))
    if template.text:
        return _labelled(written(template, case.get("caption", case.get("text"))), template, tokenizer)
    turns = case["conversation"] if "conversation" in case else _conversation_of(case["input_ids"], tokenizer)
    images = sum(IMAGE_MARK in text for _, text in turns)
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    return _labelled(written(template, turns_of(row), images), template, tokenizer)


def _labelled(pieces: Sequence[Piece], template: Template, tokenizer: TextTokenizer) -> dict[str, list[int]]:
    doc = skeleton(pieces, tokenizer, 1, template.border)
    ids, labels = [], []
    for kind, number, supervised in zip(doc.kinds_T, doc.text_ids_T.tolist(), doc.loss_mask_T, strict=True):
        if kind == IMAGE:
            ids.append(IMAGE_ID)
            labels.append(IMAGE_ID if template.task == "generation" else IGNORED)
        elif kind not in (BEGIN_IMAGE, END_IMAGE):
            ids.append(number)
            labels.append(number if supervised else IGNORED)
    positions = [place for place, label in enumerate(labels) if label != IGNORED]
    return {"input_ids": ids, "labels": labels, "supervised_positions": positions}


def _conversation_of(ids: list[int], tokenizer: TextTokenizer) -> list[tuple[str, str]]:
    """The one exchange that ids of a stage 3 sample were made from, where the case does not give it."""
    text = ""
    for name, run in groupby(ids, key=lambda i: IMAGE_MARK if i == IMAGE_ID else tokenizer.control_token(i)):
        numbers = list(run)
        text += name * len(numbers) if name else tokenizer.decode(numbers)
    user, _, assistant = _between(text, "USER: ", TURN_END).rpartition(" ASSISTANT: ")
    return [("human", user), ("gpt", assistant)]


def _between(text: str, start: str, stop: str) -> str:
    return text.partition(start)[2].rpartition(stop)[0]


def _tensor(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)

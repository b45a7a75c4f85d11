"""What a stage loses on held-out rows while it trains, and what its model makes of them at its end.

In: the parts of the mixtures whose cards hold rows out. Out: one row of losses for each part and validation, by all
workers; at the end, by one of them, answers beside what was expected and images beside those that were held out.
Nothing here draws numbers that training reads, so weights do not depend on it.

Shape suffixes: B images, N image positions, D code depth.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn
from typing_extensions import TypedDict

from unifork.batch import IMAGE, Document
from unifork.config import Stage
from unifork.documents.loader import Slot, TrackLoader
from unifork.documents.mixture import MixturePart
from unifork.documents.prompts import TEMPLATES
from unifork.inference import Engine
from unifork.training.loop import TrackRun, WorkerContext
from unifork.training.tables import HeldOutPart
from unifork.vocabulary import TASKS

LONGER = 16
"""Tokens that an answer may have beyond the longest expected one of its part."""
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
"""A word; where none are written apart, a character."""

Row = dict[str, Any]
HELD_OUT = "held_out.json"


class Rates(TypedDict):
    """How good the answers for a part of a mixture are: means, with their standard errors."""

    part: str
    dataset: str
    task: str
    answers: int
    exact_match: float
    exact_match_standard_error: float
    token_f1: float
    token_f1_standard_error: float


class Answered(TypedDict):
    """An answer beside what was expected."""

    part: str
    key: str
    expected: str
    answer: str
    exact_match: float
    token_f1: float


class Prompt(TypedDict):
    """What an image was drawn for."""

    part: str
    prompt: str


class HeldOut(TypedDict):
    """What a finished model makes of held-out documents: the file `held_out.json`."""

    scores: list[Rates]
    answers: list[Answered]
    prompts: list[Prompt]


class Validation:
    """The held-out documents of a stage, by track."""

    def __init__(self, stage: Stage, documents: Mapping[str, TrackLoader]) -> None:
        self.stage, self.config, self.documents = stage, stage.validation, documents
        held_out = [part for track in documents.values() for part in track.parts if len(part)]
        self.parts = {part.entry.prepared: part for part in held_out}

    def due(self, finished: int, total: int) -> bool:
        """Whether losses are taken after a number of steps."""
        return bool(self.parts) and (finished % self.config.every == 0 or finished == total)

    def losses(
        self, finished: int, tracks: Mapping[str, TrackRun], wrapped: nn.Module, run: WorkerContext
    ) -> list[Row]:
        """One row for each part of each track, after a number of steps. Every worker must call this."""
        rows = []
        for name, documents in self.documents.items():
            for number, part in enumerate(documents.parts):
                slots = [Slot(number, index) for index in spread(len(part), self.config.documents)]
                if slots:
                    row: HeldOutPart = {
                        "finished_steps": finished, "track": name, "part": part.entry.prepared,
                        "dataset": part.entry.dataset, "task": part.task, "documents": len(slots),
                    }  # fmt: skip
                    rows.append({**row, **tracks[name].losses(wrapped, documents, slots, run)})
        return rows

    def examine(self, engine: Engine) -> tuple[HeldOut, dict[str, np.ndarray]]:
        """What a finished model makes of held-out documents, as words and as codes (B, N, D) of images.

        `scores`: exact match and token F1 of each part, with standard errors; `answers`; `prompts` of the images, with
        their parts; `codes` of the images that were held out, and those that were `drawn`.
        """
        by_task = {task: [part for part in self.parts.values() if part.task == task] for task in TASKS}
        asking = [part for part in by_task["understanding"] if TEMPLATES[part.entry.template].images != 0]
        answers = {part: _answers(engine, part, self.config.answers) for part in asking}  # of plain text none
        scores = [_rates(part, found) for part, found in answers.items() if found]
        share = math.ceil(self.config.prompts / max(len(by_task["generation"]), 1))
        prompts: list[Prompt] = []
        codes, drawn = [], []
        for part in by_task["generation"]:
            if not (indices := spread(len(part), share)):
                continue
            texts = [engine.caption(part.entry.template, part.document(index)) for index in indices]
            prompts += [{"part": part.entry.prepared, "prompt": text} for text in texts]
            codes.append(np.stack([part.codes(index) for index in indices]))
            drawn.append(engine.generate_images(texts, self.stage.sampling, part.entry.template))
        rows = [row for found in answers.values() for row in found]
        images, most = {"codes": codes, "drawn": drawn}, self.config.prompts
        words: HeldOut = {"scores": scores, "answers": rows, "prompts": prompts[:most]}
        return words, {name: np.concatenate(group)[:most] if group else np.zeros(0) for name, group in images.items()}


def spread(length: int, count: int) -> list[int]:
    """At most `count` evenly spaced numbers below `length`."""
    return sorted({i * length // count for i in range(count)}) if length else []


def summary_of(rows: Sequence[Row]) -> str:
    """Text and image losses of every part, as a line for people."""
    losses = ((row["part"], row["text_loss"] if row["task"] == "understanding" else row["image_loss"]) for row in rows)
    return ", ".join(f"{part} {loss:.3f}" for part, loss in losses)


def _answers(engine: Engine, part: MixturePart, count: int) -> list[Answered]:
    """The first supervised stretch of each document as it stands there, and as the model writes it."""
    documents = [part.document(index) for index in spread(len(part), count)]
    starts = [int(document.loss_mask_T.argmax()) for document in documents]
    stretches = [_stretch(document, start) for document, start in zip(documents, starts, strict=True)]
    longest = max(map(len, stretches), default=0) + LONGER
    begun = [_until(document, start) for document, start in zip(documents, starts, strict=True)]
    given = engine.answer_documents(begun, longest)
    expected = [engine.tokenizer.decode(ids).strip() for ids in stretches]
    return [
        {"part": part.entry.prepared, "key": document.key, "expected": right, "answer": answer,
         "exact_match": float(_words(answer) == _words(right)), "token_f1": token_f1(answer, right)}
        for document, right, answer in zip(documents, expected, given, strict=True)
    ]  # fmt: skip


def _stretch(document: Document, start: int) -> list[int]:
    """Ids of the supervised tokens from a place on, up to the next that is given."""
    length = int(np.argmin([*document.loss_mask_T[start:], False]))
    return [int(number) for number in document.text_ids_T[start : start + length]]


def _until(document: Document, stop: int) -> Document:
    """The beginning of a document, without the images that come later."""
    kinds_T = document.kinds_T[:stop]
    codes_ND = document.codes_ND[: int((kinds_T == IMAGE).sum())]
    return Document(document.key, document.task, kinds_T, document.text_ids_T[:stop], np.zeros(stop, bool), codes_ND)


def _rates(part: MixturePart, rows: Sequence[Answered]) -> Rates:
    exact, exact_error = _mean([row["exact_match"] for row in rows])
    f1, f1_error = _mean([row["token_f1"] for row in rows])
    return {
        "part": part.entry.prepared, "dataset": part.entry.dataset, "task": part.task, "answers": len(rows),
        "exact_match": exact, "exact_match_standard_error": exact_error,
        "token_f1": f1, "token_f1_standard_error": f1_error,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of independent values, and its standard error."""
    return float(np.mean(values)), float(np.std(values) / math.sqrt(len(values)))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def token_f1(answer: str, expected: str) -> float:
    """F1 of the words of an answer, counted as often as they occur in both; as in SQuAD, but articles count."""
    given, right = _words(answer), _words(expected)
    common = (Counter(given) & Counter(right)).total()
    return 2 * common / (len(given) + len(right)) if common else float(given == right)

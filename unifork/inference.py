"""Words and codes in, words and codes out: a model with its text tokenizer and prompt templates.

Pixels are not known here; evaluation and the command line put the image tokenizer around it.

Shape suffixes: B pictures, N image positions, D code depth.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unifork.batch import Document
from unifork.config import Sampling, parse
from unifork.documents.mixture import skeleton
from unifork.documents.prompts import PICTURE, UNCONDITIONAL, Piece, question, template_named, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError
from unifork.models.generation import answer_texts, generate_images
from unifork.models.modeling import UniForkModel, load_model
from unifork.vocabulary import TURN_END

TEXT_TOKENIZER = "text_tokenizer"
IMAGE_TOKENIZER = "image_tokenizer"
COMPANIONS = (TEXT_TOKENIZER, IMAGE_TOKENIZER)
"""Folders inside a model directory that travel with it from stage to stage."""


def stage_sampling(model: Path) -> Sampling:
    """How the stage that made a model directory draws its samples; the defaults where no stage made it."""
    summary = model / "training" / "summary.json"
    if not summary.exists():
        return Sampling()
    return parse(Sampling, json.loads(summary.read_text())["stage"]["sampling"], str(summary))


@dataclass(frozen=True, eq=False)
class Speaker:
    """A model that can be asked for pictures and for answers."""

    model: UniForkModel
    tokenizer: TextTokenizer
    batch: int = 64
    """Pictures or questions processed together."""

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> "Speaker":
        """A model directory with its text tokenizer. Raises CheckpointError or DataError."""
        return cls(_on(load_model(directory), device), TextTokenizer(directory / TEXT_TOKENIZER))

    def paint(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        template: str = "generate",
        progress: Callable[[int], None] = lambda _: None,
    ) -> np.ndarray:
        """Codes (B, N, D) of one picture per prompt; picture i depends on prompt i, i and the seed alone."""
        form = template_named(template, "paint")
        if form.task != "generation":
            raise ConfigError(f"paint: template {template!r} is for {form.task}, not for generation")
        ids = [self._until_image(written(form, prompt)) for prompt in prompts]
        away = UNCONDITIONAL if sampling.negative_prompt is None else written(form, sampling.negative_prompt)
        config, made = self.model.config, []
        for numbers in self._batches(len(prompts)):
            codes = generate_images(
                self.model,
                [ids[n] for n in numbers],
                self._until_image(away),
                sampling,
                image_numbers=list(numbers),
            )
            made.append(codes.cpu().numpy())
            progress(numbers.stop)
        return np.concatenate([np.zeros((0, config.positions, config.depth), np.int64), *made])

    def answer(
        self, codes_BND: np.ndarray, questions: Sequence[str], template: str = "answer", max_new_tokens: int = 32
    ) -> list[str]:
        """The likeliest answer to each question about its picture."""
        form, stop = template_named(template, "answer"), self.tokenizer.id_of(TURN_END)
        positions = self.model.config.positions
        prompts = [
            skeleton(question(form, asked), self.tokenizer, positions).with_codes(
                "", "understanding", codes.astype(np.int64)
            )
            for asked, codes in zip(questions, codes_BND, strict=True)
        ]
        answers: list[str] = [""] * len(prompts)
        # prompts of one length side by side: padding costs time, not correctness
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        for numbers in self._batches(len(prompts)):
            chosen = [order[n] for n in numbers]
            group: list[Document] = [prompts[n] for n in chosen]
            for n, ids in zip(chosen, answer_texts(self.model, group, max_new_tokens, stop), strict=True):
                answers[n] = self.tokenizer.decode(ids).strip()
        return answers

    def _until_image(self, pieces: Sequence[Piece]) -> list[int]:
        ids: list[int] = self.tokenizer.encode_pieces(pieces[: pieces.index(PICTURE)])[0].tolist()
        return ids

    def _batches(self, total: int) -> Iterator[range]:
        for start in range(0, total, self.batch):
            yield range(start, min(start + self.batch, total))


def _on(model: UniForkModel, device: str) -> UniForkModel:
    model.to(torch.device(device))  # type: ignore[arg-type]
    model.train(False)
    return model

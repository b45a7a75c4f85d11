"""Words and codes in, words and codes out: a model with its text tokenizer and prompt templates.

Pixels are not known here; evaluation and the command line put the image tokenizer around it.

Shape suffixes: B pictures, N image positions, D code depth.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unifork.batch import Document
from unifork.config import Sampling, parse
from unifork.documents.mixture import Skeleton, skeleton
from unifork.documents.prompts import PICTURE, UNCONDITIONAL, Template, question, template_named, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError
from unifork.layout import MODEL_TEXT_TOKENIZER
from unifork.models.generation import answer_texts, generate_images
from unifork.models.modeling import UniForkModel, load_model
from unifork.shards.schema import Unusable
from unifork.vocabulary import TURN_END, Task


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
        model = load_model(directory)
        model.to(torch.device(device))  # type: ignore[arg-type]
        return cls(model, TextTokenizer(directory / MODEL_TEXT_TOKENIZER))

    def paint(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        template: str = "generate",
        progress: Callable[[int], None] = lambda _: None,
    ) -> np.ndarray:
        """Codes (B, N, D) of one picture per prompt; picture i depends on prompt i, i and the seed alone.

        Raises ConfigError for a template of another task, and for a prompt that the model has no positions for.
        """
        form = _template(template, "generation")
        ids = [self._until_image(form, prompt) for prompt in prompts]
        away = self._until_image(form, sampling.negative_prompt)
        config, made = self.model.config, []
        for numbers in self._batches(len(prompts)):
            chosen = [ids[n] for n in numbers]
            codes = generate_images(self.model, chosen, away, sampling, image_numbers=list(numbers))
            made.append(codes.cpu().numpy())
            progress(numbers.stop)
        return np.concatenate([np.zeros((0, config.positions, config.depth), np.int64), *made])

    def answer(
        self, codes_BND: np.ndarray, questions: Sequence[str], template: str = "answer", max_new_tokens: int = 32
    ) -> list[str]:
        """The likeliest answer to each question about its picture. Raises ConfigError as `paint` does."""
        form, stop = _template(template, "understanding"), self.tokenizer.id_of(TURN_END)
        prompts = [
            self._asked(form, asked).with_codes("", "understanding", codes.astype(np.int64))
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

    def _until_image(self, form: Template, prompt: str | None) -> list[int]:
        """Token ids up to the picture; of the dropped prompt for None."""
        with _naming("prompt", prompt or ""):
            pieces = UNCONDITIONAL if prompt is None else written(form, prompt)
            ids: list[int] = self.tokenizer.encode_pieces(pieces[: pieces.index(PICTURE)])[0].tolist()
            self._check_room(len(ids) + self.model.config.positions)
        return ids

    def _asked(self, form: Template, asked: str) -> Skeleton:
        with _naming("question", asked):
            made = skeleton(question(form, asked), self.tokenizer, self.model.config.positions)
            self._check_room(len(made.kinds_T))
        return made

    def _check_room(self, tokens: int) -> None:
        room = self.model.config.backbone_config().max_position_embeddings
        if tokens > room:
            raise Unusable(f"{tokens} tokens with its image; the model reads at most {room} (max_position_embeddings)")

    def _batches(self, total: int) -> Iterator[range]:
        for start in range(0, total, self.batch):
            yield range(start, min(start + self.batch, total))


def _template(name: str, task: Task) -> Template:
    form = template_named(name, "--template")
    if form.task != task:
        raise ConfigError(f"--template {name}: is for {form.task}, not for {task}")
    return form


@contextmanager
def _naming(what: str, text: str) -> Iterator[None]:
    """Errors of one text of many begin with it."""
    try:
        yield
    except Unusable as error:
        raise ConfigError(f"{what} {text!r:.60}: {error}") from None

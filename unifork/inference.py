"""Words and codes in, words and codes out: a model with its text tokenizer and prompt templates.

Pixels are not known here; evaluation and the command line put the image tokenizer around it.

Shape suffixes: B images, N image positions, D code depth.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unifork.batch import BEGIN_IMAGE, Document
from unifork.config import Sampling, parse
from unifork.documents.mixture import Skeleton, skeleton
from unifork.documents.prompts import IMAGE_PIECE, UNCONDITIONAL, Exchange, Template, question, template_named, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError
from unifork.layout import MODEL_TEXT_TOKENIZER
from unifork.models.generation import answer_texts, generate_images
from unifork.models.modeling import UniForkModel, load_model
from unifork.shards.schema import IMAGE_MARK, Unusable
from unifork.vocabulary import TURN_END, TURN_START, Task


def stage_sampling(model: Path) -> Sampling:
    """How the stage that made a model directory draws its samples; the defaults where no stage made it."""
    summary = model / "training" / "summary.json"
    if not summary.exists():
        return Sampling()
    return parse(Sampling, json.loads(summary.read_text())["stage"]["sampling"], str(summary))


@dataclass(frozen=True, eq=False)
class Engine:
    """A model that can be asked for images and for answers."""

    model: UniForkModel
    tokenizer: TextTokenizer
    batch: int = 64
    """Images or questions processed together."""

    @classmethod
    def load(cls, directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> "Engine":
        """A model directory with its text tokenizer. Raises CheckpointError or DataError."""
        model = load_model(directory, dtype).to(device)  # type: ignore[arg-type]
        return cls(model, TextTokenizer(directory / MODEL_TEXT_TOKENIZER))

    def generate_images(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        template: str = "generate",
        progress: Callable[[int], None] = lambda _: None,
    ) -> np.ndarray:
        """Codes (B, N, D) of one image per prompt; image i depends on prompt i, i and the seed alone.

        Raises ConfigError for a template of another task, and for a prompt that the model has no positions for.
        """
        form = _template(template, "generation")
        ids = [self._until_image(form, prompt) for prompt in prompts]
        away = self._until_image(form, sampling.negative_prompt)
        config = self.model.config
        generated = [np.zeros((0, config.positions, config.depth), np.int64)]
        for numbers in self._batches(range(len(prompts))):
            chosen = [ids[n] for n in numbers]
            codes = generate_images(self.model, chosen, away, sampling, image_numbers=list(numbers))
            generated.append(codes.cpu().numpy())
            progress(numbers[-1] + 1)
        return np.concatenate(generated)

    def answer_questions(
        self, codes: np.ndarray, questions: Sequence[str], template: str = "answer", max_new_tokens: int = 32
    ) -> list[str]:
        """The likeliest answer to each question about its image. Raises ConfigError as `generate` does.

        codes: (B, N, D), or (B, N * D) as an encoder gives them.
        """
        config = self.model.config
        codes_BND = codes.astype(np.int64).reshape(-1, config.positions, config.depth)
        form = _template(template, "understanding")
        prompts = [
            self._asked(form, question_text).with_codes("", "understanding", codes_ND)
            for question_text, codes_ND in zip(questions, codes_BND, strict=True)
        ]
        return self.answer_documents(prompts, max_new_tokens)

    def answer_turn(
        self, codes: np.ndarray | None, before: Sequence[Exchange], question_text: str, max_new_tokens: int
    ) -> str:
        """The likeliest answer in a dialogue, about an image of codes (N, D) or about none. Raises ConfigError."""
        shape = (self.model.config.positions, self.model.config.depth)
        codes_ND = np.zeros((0, shape[1])) if codes is None else codes.reshape(shape)
        form = _template("answer", "understanding")
        doc = self._asked(form, question_text, before, image=codes is not None and not before)
        document = doc.with_codes("", "understanding", codes_ND.astype(np.int64))
        return self.answer_documents([document], max_new_tokens)[0]

    def answer_documents(self, prompts: Sequence[Document], max_new_tokens: int) -> list[str]:
        """The likeliest continuation of each document up to the end of the turn."""
        answers, stop = [""] * len(prompts), self.tokenizer.id_of(TURN_END)
        # prompts of one length side by side: padding costs time, not correctness
        order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
        for numbers in self._batches(order):
            answered = answer_texts(self.model, [prompts[n] for n in numbers], max_new_tokens, stop)
            for n, ids in zip(numbers, answered, strict=True):
                answers[n] = self.tokenizer.decode(ids).strip()
        return answers

    def caption(self, template: str, document: Document) -> str:
        """The text that a generation document was written with."""
        until_image = document.text_ids_T[: int((document.kinds_T == BEGIN_IMAGE).argmax())]
        form = _template(template, "generation").text.replace(TURN_START, "").replace(IMAGE_MARK, "")
        before, _, after = form.partition("{caption}")
        return self.tokenizer.decode(until_image.tolist()).removeprefix(before).removesuffix(after)

    def _until_image(self, form: Template, prompt: str | None) -> list[int]:
        """Token ids up to the image; of the dropped prompt for None."""
        with _naming("prompt", prompt or ""):
            pieces = UNCONDITIONAL if prompt is None else written(form, prompt)
            ids: list[int] = self.tokenizer.encode_pieces(pieces[: pieces.index(IMAGE_PIECE)])[0].tolist()
            self._check_room(len(ids) + self.model.config.positions)
        return ids

    def _asked(
        self, form: Template, question_text: str, before: Sequence[Exchange] = (), image: bool = True
    ) -> Skeleton:
        with _naming("question", question_text):
            pieces = question(form, question_text, before, image)
            doc = skeleton(pieces, self.tokenizer, self.model.config.positions)
            self._check_room(len(doc.kinds_T))
        return doc

    def _check_room(self, tokens: int) -> None:
        room = self.model.config.backbone_config().max_position_embeddings
        if tokens > room:
            raise Unusable(f"{tokens} tokens with its image; the model reads at most {room} (max_position_embeddings)")

    def _batches(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        return (numbers[start : start + self.batch] for start in range(0, len(numbers), self.batch))


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

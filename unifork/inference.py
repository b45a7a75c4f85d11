"""Words and codes in, words and codes out: a model with its text tokenizer and prompt templates.

Pixels are not known here; evaluation and the command line put the image tokenizer around it.

Shape suffixes: B images, N image positions, D code depth.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from unifork.batch import BEGIN_IMAGE, Document
from unifork.config import Sampling, parse
from unifork.devices import is_capture_trusted
from unifork.documents.mixture import Skeleton, skeleton
from unifork.documents.prompts import IMAGE_PIECE, UNCONDITIONAL, Exchange, Template, question, template_named, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, Rejected, refusing
from unifork.layout import MODEL_TEXT_TOKENIZER
from unifork.models.generation import answer_texts, generate_images
from unifork.models.modeling import UniForkModel, load_model
from unifork.shards.schema import IMAGE_MARK
from unifork.vocabulary import TURN_END, TURN_START, Task

MOST_ROWS = {"cpu": 64, "cuda": 256}
"""Images or questions processed together on a kind of device; more gain nothing."""
MOST_TOKENS = 2**17
"""Tokens of all rows together where the free memory is not known."""
MEMORY_SHARE = 0.8
"""Of the free memory of a device, what tokens may take."""


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
    batch: int | None = None
    """Images or questions processed together at most; None: what fits the device. Results do not depend on it."""

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
        first: int = 0,
    ) -> np.ndarray:
        """Codes (B, N, D) of one image per prompt; image i depends on prompt i, first + i and the seed alone.

        Raises ConfigError for a template of another task, and for a prompt that the model has no positions for.
        """
        form = _template(template, "generation")
        ids = [self._until_image(form, prompt) for prompt in prompts]
        away = self._until_image(form, sampling.negative_prompt)
        config, capture = self.model.config, is_capture_trusted(self.model.device)
        generated = [np.zeros((0, config.positions, config.depth), np.int64)]
        tokens = [2 * (max(len(prompt_ids), len(away)) + config.positions) for prompt_ids in ids]
        for numbers in self._batches(range(len(prompts)), tokens):
            chosen = [ids[n] for n in numbers]
            codes = generate_images(
                self.model, chosen, away, sampling, image_numbers=[first + n for n in numbers], capture=capture
            )
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
        # questions about one image side by side, which is read once; but long ones apart: they pad all others
        images: dict[bytes, int] = {}
        places = [images.setdefault(prompt.codes_ND.tobytes(), len(images)) for prompt in prompts]
        tokens = [len(prompt) + max_new_tokens for prompt in prompts]
        long = [(count - self.model.config.positions).bit_length() for count in tokens]
        order = sorted(range(len(prompts)), key=lambda n: (long[n], places[n], tokens[n]))
        for numbers in self._batches(order, tokens):
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
        with refusing(ConfigError, f"prompt {prompt or ''!r:.60}", Rejected):
            pieces = UNCONDITIONAL if prompt is None else written(form, prompt)
            ids: list[int] = self.tokenizer.encode_pieces(pieces[: pieces.index(IMAGE_PIECE)])[0].tolist()
            self._check_room(len(ids) + self.model.config.positions)
        return ids

    def _asked(
        self, form: Template, question_text: str, before: Sequence[Exchange] = (), image: bool = True
    ) -> Skeleton:
        with refusing(ConfigError, f"question {question_text!r:.60}", Rejected):
            pieces = question(form, question_text, before, image)
            doc = skeleton(pieces, self.tokenizer, self.model.config.positions)
            self._check_room(len(doc.kinds_T))
        return doc

    def _check_room(self, tokens: int) -> None:
        room = self.model.config.backbone_config().max_position_embeddings
        if tokens > room:
            most = f"the model reads at most {room} (max_position_embeddings)"
            raise Rejected("too_long", f"{tokens} tokens with its image; {most}")

    def _batches(self, numbers: Sequence[int], tokens: Sequence[int]) -> Iterator[Sequence[int]]:
        """Parts of `numbers` that fit the device; number n takes `tokens[n]`, or as many as the longest beside it."""
        most = self.batch or MOST_ROWS.get(self.model.device.type, MOST_ROWS["cpu"])
        most_tokens, start, longest = most_tokens_at_once(self.model), 0, 0
        for end, number in enumerate(numbers):
            longest = max(longest, tokens[number])
            if end > start and (end - start == most or (end - start + 1) * longest > most_tokens):
                yield numbers[start:end]
                start, longest = end, tokens[number]
        if len(numbers):
            yield numbers[start:]


def most_tokens_at_once(model: UniForkModel) -> int:
    """How many tokens the device has memory for: their keys and values, and what an MLP holds while they are read."""
    if model.device.type != "cuda":
        return MOST_TOKENS
    cache, weight = model.new_cache(1, 1), model.embed_tokens.weight
    bytes_each = 4 * model.config.backbone_config().intermediate_size * weight.element_size()
    bytes_each += sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
    return int(MEMORY_SHARE * free_bytes(model.device) / bytes_each)


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that nobody uses, with what torch holds back for later."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def _template(name: str, task: Task) -> Template:
    form = template_named(name, "--template")
    if form.task != task:
        raise ConfigError(f"--template {name}: is for {form.task}, not for {task}")
    return form

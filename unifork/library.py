"""A model directory as a program uses it: texts in and images out, images and questions in and answers out.

import unifork

model = unifork.load("models/unifork-s3")
model.generate_images(["a red circle", "two blue squares"], seed=0)[0].save("circle.png")
model.answer_questions(["circle.png"], ["What color is the circle?"])
chat = model.chat("circle.png")
chat.ask("What is it?")
chat.ask("And what color does it have?")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unifork.config import Sampling, parse
from unifork.devices import chosen_device, chosen_dtype
from unifork.documents.prompts import Exchange
from unifork.errors import DataError
from unifork.image_tokenizer.code_encoder import CodeEncoder, ImageInput
from unifork.images import MATTE
from unifork.inference import Engine, stage_sampling
from unifork.layout import MODEL_IMAGE_TOKENIZER

BATCH_IMAGES = 64


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded model with its tokenizers around it; made by `unifork.load`."""

    directory: Path
    engine: Engine

    @classmethod
    def load(cls, directory: Path | str, device: str | None = None, dtype: str = "float32") -> "Model":
        """device: None is a GPU where there is one. dtype: `float32` or `bfloat16`, of the model alone.

        Raises ConfigError for a device that is not here, CheckpointError or DataError for a damaged directory.
        """
        chosen = chosen_device(device, "device"), chosen_dtype(dtype, "dtype")
        return cls(Path(directory), Engine.load(Path(directory), *chosen))

    @cached_property
    def images(self) -> CodeEncoder:
        """The image tokenizer, which sees questions' images padded; in float32, since its codes depend on that."""
        device = self.engine.model.device
        return CodeEncoder(self.directory / MODEL_IMAGE_TOKENIZER, "pad", MATTE, BATCH_IMAGES, device)

    def generate_images(
        self,
        prompts: Sequence[str],
        *,
        template: str = "generate",
        progress: Callable[[int], None] = lambda _: None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """One image for each prompt; the codes of image i depend on prompt i, i and the seed alone.

        sampling: `seed`, `guidance`, `temperature`, `top_k`, `top_p`, `negative_prompt` (see `config.Sampling`); what
        is not given is as the model's last stage draws. template: prompt template of that stage. progress: called
        with the number of images so far. Raises ConfigError for a prompt that the model has no positions for.
        """
        chosen = parse(Sampling, {**stage_sampling(self.directory).model_dump(), **sampling}, "sampling")
        return self.images.decode_codes(self.engine.generate_images(prompts, chosen, template, progress))

    def answer_questions(
        self,
        images: Sequence[ImageInput | str],
        questions: Sequence[str],
        *,
        template: str = "answer",
        max_new_tokens: int = 128,
    ) -> list[str]:
        """The likeliest answer to each question about its image: an image of Pillow, encoded bytes or a file.

        Raises DataError for an image that cannot be read, ConfigError for a question that is too long.
        """
        if len(images) != len(questions):
            raise DataError(f"{len(images)} images for {len(questions)} questions; each question needs its image")
        return self.engine.answer_questions(self._codes(images), questions, template, max_new_tokens)

    def chat(self, image: ImageInput | str | None = None) -> "Chat":
        """A dialogue about one image, or about none."""
        return Chat(self, None if image is None else self._codes([image])[0])

    def _codes(self, images: Sequence[ImageInput | str]) -> np.ndarray:
        return self.images.encode_images([Path(image) if isinstance(image, str) else image for image in images])


@dataclass(eq=False)
class Chat:
    """A dialogue: what was said so far is read again with each question."""

    model: Model
    codes: np.ndarray | None
    exchanges: list[Exchange] = field(default_factory=list)

    def ask(self, question: str, max_new_tokens: int = 128) -> str:
        """The likeliest answer. Raises ConfigError when the dialogue is longer than the model can read."""
        answer = self.model.engine.answer_turn(self.codes, self.exchanges, question, max_new_tokens)
        self.exchanges.append(Exchange(question, answer, self.codes is not None and not self.exchanges))
        return answer

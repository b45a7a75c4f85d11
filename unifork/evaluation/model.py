"""A model directory as benchmarks ask it: texts in and images out, images and questions in and answers out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from unifork.config import Sampling
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.inference import Engine
from unifork.layout import MODEL_IMAGE_TOKENIZER

BATCH_IMAGES = 64
MATTE = (255, 255, 255)


class ImageModel:
    """A loaded model with its image tokenizer around it; `generated` holds the codes of all images it made."""

    def __init__(self, directory: Path, sampling: Sampling, tell: Callable[[str], None]) -> None:
        """tell: takes lines of progress. Raises CheckpointError or DataError."""
        self.engine = Engine.load(directory)
        self.tokenizer = CodeEncoder(directory / MODEL_IMAGE_TOKENIZER, "pad", MATTE, BATCH_IMAGES)
        self.sampling, self.tell = sampling, tell
        self.generated: list[np.ndarray] = []

    def generate_images(self, prompts: list[str]) -> list[Image.Image]:
        """One image for each text."""
        tell = lambda done: self.tell(f"{done}/{len(prompts)} images")  # noqa: E731
        self.generated.append(self.engine.generate_images(prompts, self.sampling, progress=tell))
        return self.tokenizer.decode_codes(self.generated[-1])

    def answer(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        """One answer for each image and its question; the model sees the padded view."""
        return self.engine.answer_questions(self.tokenizer.encode_images(images), questions)

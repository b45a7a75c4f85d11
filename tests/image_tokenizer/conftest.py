"""A tiny tokenizer, fresh or trained for a second, that all tests of this folder share."""

from pathlib import Path

import numpy as np
import pytest
import torch

from unifork.config import DecoderConfig, EncoderConfig, ImageTokenizerConfig, TokenizerTraining
from unifork.image_tokenizer.architecture import Architecture
from unifork.image_tokenizer.model import ImageTokenizer

SIZE = 32


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def config() -> ImageTokenizerConfig:
    return ImageTokenizerConfig(
        image_size=SIZE,
        patch_size=8,
        encoder=EncoderConfig(hidden_size=32, layers=2, heads=2, intermediate_size=48),
        depth=3,
        codebook_size=48,
        decoder=DecoderConfig(
            z_channels=16, channels=8, multipliers=(1, 1, 2, 2), blocks=0, attention_levels=(3,), norm_groups=4
        ),
        training=TokenizerTraining(
            datasets=("shapes",),
            steps=60,
            quantize_from_step=20,
            batch_images=16,
            learning_rate=3e-3,
            warmup_steps=5,
            commitment=0.25,
            ema_decay=0.9,
            held_out_images=16,
        ),
        seed=1,
    )


@pytest.fixture
def tokenizer(config) -> ImageTokenizer:
    """Fresh weights with a codebook taken from its own features, so that codes differ."""
    torch.manual_seed(3)
    tokenizer = ImageTokenizer(Architecture.of(config))
    features = tokenizer.encoder(torch.rand(8, 3, SIZE, SIZE) * 2 - 1).flatten(0, 1)
    tokenizer.quantizer.codebook.copy_(features[: config.codebook_size] * torch.rand(config.codebook_size, 1))
    return tokenizer


@pytest.fixture
def directory(tokenizer, tmp_path) -> Path:
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(scope="session")
def blocks() -> np.ndarray:
    """96 images of flat rectangles on a light ground."""
    rng = np.random.default_rng(0)
    images = np.full((96, SIZE, SIZE, 3), 240, dtype=np.uint8)
    for image in images:
        for _ in range(2):
            left, top = rng.integers(0, SIZE - 12, 2)
            image[top : top + 12, left : left + 12] = rng.choice([[220, 30, 30], [20, 90, 220], [30, 30, 30]])
    return images

"""A new model directory: the model, and beside it the tokenizers that it was made with.

In: a variant and the directories of its two tokenizers. Out: a directory that exists only when all of
it is written. Stages copy the tokenizers on, so that every model says by itself what its codes and
tokens mean.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unifork.config import Variant
from unifork.documents.text_tokenizer import TextTokenizer, import_text_tokenizer
from unifork.errors import ConfigError, IdentityError
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.layout import MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER
from unifork.models.modeling import UniForkModel
from unifork.models.warm_start import create_model
from unifork.shards.manifest import whole_folder
from unifork.weights import local_folder


def create(variant: Variant, image_tokenizer: Path, text_tokenizer: Path, out: Path) -> UniForkModel:
    """Write step 0 of a variant around the frozen codebook of an image tokenizer.

    Raises ConfigError where `out` exists or the parts do not fit, DataError or CheckpointError where one of them
    cannot be read.
    """
    images, text = ImageTokenizer.load(image_tokenizer), TextTokenizer(text_tokenizer)
    codebook, shape = images.quantizer.codebook, images.architecture
    model = create_model(
        variant, codebook, shape.depth, shape.grid, images.encoder_id, text.vocab_size, text.special_tokens
    )
    read_before = local_folder(variant.warm_start) / MODEL_TEXT_TOKENIZER if variant.warm_start else Path()
    if variant.warm_start and read_before.is_dir() and TextTokenizer(read_before).identity != text.identity:
        raise IdentityError(f"{text_tokenizer} is not {read_before}, which the model reads; import that one")
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        shutil.copytree(image_tokenizer, partial / MODEL_IMAGE_TOKENIZER)
        import_text_tokenizer(text_tokenizer, partial / MODEL_TEXT_TOKENIZER)
    return model


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that takes its place when all of it is written. Raises ConfigError where one stands."""
    if out.exists():
        raise ConfigError(f"--out {out}: exists already; name another directory, or remove it")
    with whole_folder(out) as partial:
        yield partial

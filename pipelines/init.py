"""Create a variant's model around the frozen codebook: step 0, which the first stage begins with."""

import shutil

from pipelines.common import IMAGE_TOKENIZER, MODELS, TEXT_TOKENIZER, experiment, program
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import unknown
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.layout import MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER
from unifork.models.warm_start import create_model


def main(name: str) -> None:
    params = experiment()
    if name not in params.variants:
        raise unknown("variant", name, params.variants, "params.yaml: variants")
    variant = params.variants[name]
    pictures, text = ImageTokenizer.load(IMAGE_TOKENIZER), TextTokenizer(TEXT_TOKENIZER)
    model = create_model(
        variant,
        pictures.quantizer.codebook,
        pictures.architecture.depth,
        pictures.architecture.grid,
        pictures.encoder_id,
        text.vocab_size,
        special_tokens=text.special_tokens,
    )
    folder = MODELS / f"{name}-init"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    shutil.copytree(IMAGE_TOKENIZER, folder / MODEL_IMAGE_TOKENIZER)
    shutil.copytree(TEXT_TOKENIZER, folder / MODEL_TEXT_TOKENIZER)
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {variant.plan}, {count / 1e6:.2f} M parameters -> {folder}")


if __name__ == "__main__":
    program("pipelines.init", lambda name: MODELS / f"{name}-init", main, "variant of the experiment")

"""Create a variant's model around the frozen codebook: step 0, which the first stage begins with.

tokenizers/image + tokenizers/text + `variants` of params.yaml -> models/<variant>-init
"""

import shutil
from pathlib import Path

from unifork.assembly import create
from unifork.config import load_experiment
from unifork.errors import one_of
from unifork.jobs import program
from unifork.layout import Layout

LAYOUT = Layout()


def folder(name: str) -> Path:
    return LAYOUT.model(f"{name}-init")


def main(name: str) -> None:
    variants = load_experiment().variants
    one_of("variant", name, variants, "params.yaml: variants")
    shutil.rmtree(folder(name), ignore_errors=True)
    model = create(variants[name], LAYOUT.image_tokenizer, LAYOUT.text_tokenizer, folder(name))
    print(f"{name}: {variants[name].plan}, {model.num_parameters() / 1e6:.2f} M parameters -> {folder(name)}")


if __name__ == "__main__":
    program(folder, main, "variant of the experiment")

"""The image tokenizer: a small one trained on filtered images, or an official one imported."""

import json
from functools import partial

import torch

from unifork.config import ImportedTokenizer, load_card, load_cluster, load_experiment
from unifork.errors import DataError
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.measures import REPORT
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.image_tokenizer.readers import read_back
from unifork.image_tokenizer.samples import MAX_IMAGES, sample_sets
from unifork.image_tokenizer.training import decode_all, encode_all, measure, train_tokenizer
from unifork.jobs import own_device, program
from unifork.layout import Layout
from unifork.shards.manifest import MANIFEST, write_json

LAYOUT = Layout()
MEASURED_IMAGES = 32
"""Images of each set and view on which an imported tokenizer is measured."""


def main(_: str) -> None:
    torch.set_num_threads(max(1, int(load_cluster().for_step("image_tokenizer").cpus)))
    device = torch.device(own_device("image_tokenizer"))
    params, folder = load_experiment(), LAYOUT.image_tokenizer
    config = params.image_tokenizer

    if isinstance(config, ImportedTokenizer):
        # in: an official tokenizer, and a few images of the data sets that are there
        tokenizer = read_official(config.source, config.image_size, config.vision_tower)
        tokenizer.save(folder)
        print(f"{config.source}: codebook_id {tokenizer.codebook_id}, encoder_id {tokenizer.encoder_id}", flush=True)
        filtered = [name for name in params.datasets if (LAYOUT.filtered(name) / MANIFEST).exists()]
        held_out = sample_sets(filtered, LAYOUT, config.image_size, params.data_seed, MEASURED_IMAGES)
        if not held_out:
            return
        report = measure(tokenizer, held_out)
    else:
        # in: the images of some data sets in all views; the first ones of each are kept out of training
        training = config.training
        images = sample_sets(training.datasets, LAYOUT, config.image_size, config.seed, MAX_IMAGES)
        print(", ".join(f"{len(group)} {name}" for name, group in images.items()), flush=True)
        for name, group in images.items():
            if len(group) <= training.held_out_images:
                raise DataError(
                    f"{name} has {len(group)} different images that are no held-out rows, and "
                    f"image_tokenizer.training.held_out_images takes {training.held_out_images} of them: lower it"
                )
        held_out = {name: group[: training.held_out_images] for name, group in images.items()}
        trained_on = {name: group[training.held_out_images :] for name, group in images.items()}
        report = train_tokenizer(config, trained_on, held_out, folder, partial(print, flush=True), device)

    # out, beside the tokenizer: what codes lose, and how much of what images show survives them
    tokenizer = ImageTokenizer.load(folder)
    for name, originals in held_out.items():
        card = load_card(name.partition("/")[0], LAYOUT.cards)
        if card.reader:
            drawn = decode_all(tokenizer, encode_all(tokenizer, originals))
            report["detector"][name] = read_back(card, originals, drawn)
    write_json(folder / REPORT, report)
    print(json.dumps(report["detector"]), f"-> {folder}")


if __name__ == "__main__":
    program(lambda _: LAYOUT.image_tokenizer, main)

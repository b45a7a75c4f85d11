"""The image tokenizer: a small one trained on filtered pictures, or an official one imported."""

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.common import FILTERED, IMAGE_TOKENIZER, experiment, program
from unifork.cluster import load_cluster
from unifork.config import HopResources, ImageTokenizerConfig, ImportedTokenizer, load_card
from unifork.image_tokenizer.conversion import read_official
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.image_tokenizer.samples import MAX_PICTURES, sample_views
from unifork.image_tokenizer.training import (
    decode_all,
    encode_all,
    measure,
    save_whole,
    train_tokenizer,
    without_repeats,
)
from unifork.shapes.detector import detect, same_objects
from unifork.shapes.source import KIND as SHAPES
from unifork.shards.manifest import MANIFEST, write_json

Views = dict[str, np.ndarray]
Report = dict[str, Any]

MEASURED_PICTURES = 32
"""Pictures of each set and view on which an imported tokenizer is measured."""


def main(_: str) -> None:
    torch.set_num_threads(int(load_cluster().hops.get("image_tokenizer", HopResources()).cpus))
    params = experiment()
    config = params.image_tokenizer
    if isinstance(config, ImportedTokenizer):
        filtered = [name for name in params.datasets if (FILTERED / name / MANIFEST).exists()]
        report, held_out = imported(config, filtered, params.seed)
    else:
        report, held_out = trained(config)
    if not held_out:
        return
    tokenizer = ImageTokenizer.load(IMAGE_TOKENIZER)
    readable = [group for group in held_out if load_card(group.partition("/")[0]).source.kind == SHAPES]
    report["detector"] = {group: read_back(tokenizer, held_out[group]) for group in readable}
    write_json(IMAGE_TOKENIZER / "report.json", report)
    print(json.dumps(report["detector"]), f"-> {IMAGE_TOKENIZER}")


def trained(config: ImageTokenizerConfig) -> tuple[Report, Views]:
    """Train on the pictures of all views; returns the report and the pictures that were held out."""
    kept_out = config.training.held_out_images
    views = sampled(config.training.datasets, config.image_size, config.seed, MAX_PICTURES)
    print(", ".join(f"{len(pictures)} {group}" for group, pictures in views.items()), flush=True)
    held_out = {group: pictures[:kept_out] for group, pictures in views.items()}
    report = train_tokenizer(
        config,
        {group: pictures[kept_out:] for group, pictures in views.items()},
        held_out,
        IMAGE_TOKENIZER,
        lambda progress: print(progress, flush=True),
    )
    print(f"trained in {report.pop('seconds'):.0f} s")
    return report, held_out


def imported(config: ImportedTokenizer, datasets: Iterable[str], seed: int) -> tuple[Report, Views]:
    """Import, and measure on a few pictures of the data sets that are there."""
    tokenizer = read_official(config.source, config.image_size, config.vision_tower)
    save_whole(tokenizer, IMAGE_TOKENIZER)
    print(f"{config.source}: codebook_id {tokenizer.codebook_id}, encoder_id {tokenizer.encoder_id}", flush=True)
    views = sampled(datasets, config.image_size, seed, MEASURED_PICTURES)
    return (measure(tokenizer, views) if views else {}), views


def sampled(datasets: Iterable[str], size: int, seed: int, most: int) -> Views:
    """Pictures of every view that the tasks of the sets read, by `<set>/<view>`."""
    views: Views = {}
    for name in datasets:
        card = load_card(name)
        for use in card.tasks.values():
            views[f"{name}/{use.view}"] = sample_views(FILTERED / name, card, use.view, size, seed, most)
    return without_repeats(views)  # square pictures look the same in both views


def read_back(tokenizer: ImageTokenizer, pictures: np.ndarray) -> dict[str, int]:
    """From how many reconstructions the detector of `shapes` reads the same objects as from the originals."""
    drawn = decode_all(tokenizer, encode_all(tokenizer, pictures))
    pairs = [(detect(Image.fromarray(a)), detect(Image.fromarray(b))) for a, b in zip(pictures, drawn, strict=True)]
    return {"same": sum(same_objects(a, b) for a, b in pairs), "total": len(pairs)}


if __name__ == "__main__":
    program("pipelines.image_tokenizer", lambda _: IMAGE_TOKENIZER, main, None)

"""Train the demo's small image tokenizer on filtered pictures, both views of each set it is used with."""

import json

import numpy as np
import torch
from PIL import Image

from pipelines.common import FILTERED, IMAGE_TOKENIZER, experiment, program
from unifork.cluster import load_cluster
from unifork.config import HopResources, load_card
from unifork.data.pictures import sample_views
from unifork.data.shapes.detector import detect, same_objects
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.image_tokenizer.training import decode_all, encode_all, train_tokenizer, without_repeats
from unifork.manifest import write_json


def main(_: str) -> None:
    torch.set_num_threads(int(load_cluster().hops.get("image_tokenizer", HopResources()).cpus))
    config = experiment().image_tokenizer
    kept_out, views, readable = config.training.held_out_images, {}, []
    for name in config.training.datasets:
        card = load_card(name)
        for use in card.tasks.values():
            group = f"{name}/{use.view}"
            views[group] = sample_views(FILTERED / name, card, use.view, config.image_size, config.seed)
            readable += [group] if card.source.kind == "shapes" else []
    views = without_repeats(views)  # square pictures look the same in both views
    print(", ".join(f"{len(pictures)} {group}" for group, pictures in views.items()), flush=True)
    report = train_tokenizer(
        config,
        {group: pictures[kept_out:] for group, pictures in views.items()},
        {group: pictures[:kept_out] for group, pictures in views.items()},
        IMAGE_TOKENIZER,
        lambda progress: print(progress, flush=True),
    )
    seconds = report.pop("seconds")
    tokenizer = ImageTokenizer.load(IMAGE_TOKENIZER)
    report["detector"] = {group: read_back(tokenizer, views[group][:kept_out]) for group in readable if group in views}
    write_json(IMAGE_TOKENIZER / "report.json", report)
    print(json.dumps(report["detector"]), f"trained in {seconds:.0f} s -> {IMAGE_TOKENIZER}")


def read_back(tokenizer: ImageTokenizer, pictures: np.ndarray) -> dict[str, int]:
    """From how many reconstructions the detector of `shapes` reads the same objects as from the originals."""
    drawn = decode_all(tokenizer, encode_all(tokenizer, pictures))
    pairs = [(detect(Image.fromarray(a)), detect(Image.fromarray(b))) for a, b in zip(pictures, drawn, strict=True)]
    return {"same": sum(same_objects(a, b) for a, b in pairs), "total": len(pairs)}


if __name__ == "__main__":
    program("pipelines.image_tokenizer", lambda _: IMAGE_TOKENIZER, main, None)

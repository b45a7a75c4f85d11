"""Train the demo's small image tokenizer on filtered pictures, both views of each set it is used with."""

import json

from pipelines.common import FILTERED, IMAGE_TOKENIZER, experiment, program
from unifork.config import load_card
from unifork.data.pictures import sample_views
from unifork.image_tokenizer.training import train_tokenizer
from unifork.manifest import write_json


def main(_: str) -> None:
    config = experiment().image_tokenizer
    training, groups, held_out = config.training, {}, {}
    for name in training.datasets:
        card = load_card(name)
        for use in card.tasks.values():
            pictures = sample_views(FILTERED / name, card, use.view, config.image_size, config.seed)
            held_out[f"{name}/{use.view}"] = pictures[: training.held_out_images]
            groups[f"{name}/{use.view}"] = pictures[training.held_out_images :]
    print(", ".join(f"{len(pictures)} {name}" for name, pictures in groups.items()), flush=True)
    report = train_tokenizer(config, groups, held_out, IMAGE_TOKENIZER, lambda progress: print(progress, flush=True))
    seconds = report.pop("seconds")
    write_json(IMAGE_TOKENIZER / "report.json", report)
    print(json.dumps(report, indent=1))
    print(f"image tokenizer trained in {seconds:.0f} s -> {IMAGE_TOKENIZER}")


if __name__ == "__main__":
    program("pipelines.image_tokenizer", lambda _: IMAGE_TOKENIZER, main, None)

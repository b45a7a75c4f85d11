"""Turn filtered pictures into RVQ codes, one folder per view, on one pool of actors. 1 shard : 1 shard per view.

Decoding, views and the network run in the same actor: no picture travels between processes.
"""

from pipelines.common import CODES, FILTERED, IMAGE_TOKENIZER, program, run
from unifork.cluster import load_cluster
from unifork.config import HopResources, load_card
from unifork.image_tokenizer.encode import Encode, encode_hop


def main(name: str) -> None:
    card = load_card(name)
    resources = load_cluster().hops.get("encode", HopResources())
    device, threads = "cuda" if resources.gpus else "cpu", max(1, int(resources.cpus))
    hops = [
        encode_hop(card, task, FILTERED / name, CODES / name / use.view, IMAGE_TOKENIZER)
        for task, use in card.tasks.items()
    ]
    run("encode", hops, Encode, card.model_dump(mode="json"), str(IMAGE_TOKENIZER.absolute()), device, threads)


if __name__ == "__main__":
    program("pipelines.encode", lambda name: CODES / name, main, "data set, a card in datasets/")

"""Bring a data set's pictures and texts into image-text shards, as its card says. 1 source range : 1 shard."""

from pipelines.common import RAW, dataset_use, experiment, program, run
from unifork.config import load_card
from unifork.data.workers import Materialise, download_hop


def main(name: str) -> None:
    card, params = load_card(name), experiment()
    use = dataset_use(params, name)
    hop = download_hop(card, use.rows, use.shard_rows, params.seed, RAW / name)
    run("download", [hop], Materialise, card.model_dump(mode="json"))


if __name__ == "__main__":
    program("pipelines.download", lambda name: RAW / name, main, "data set, a card in datasets/")

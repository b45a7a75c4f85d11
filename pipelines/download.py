"""Bring a data set's pictures and texts into image-text shards, as its card says. 1 source range : 1 shard."""

from pipelines.common import RAW, dataset_use, experiment, program, run
from unifork.config import load_card
from unifork.data.schema import columns_of, image_text_schema
from unifork.data.workers import Materialise, download_hop


def main(name: str) -> None:
    card, params = load_card(name), experiment()
    use = dataset_use(params, name)
    hop = download_hop(card, use.rows, use.shard_rows, params.seed, RAW / name)
    lineage = {"source": card.source.model_dump(mode="json"), "licence": card.licence, "attribution": card.attribution}
    run(hop, Materialise, (card.model_dump(mode="json"),), "download", columns_of(image_text_schema(card)), lineage)


if __name__ == "__main__":
    program("pipelines.download", lambda name: RAW / name, main, "data set, a card in datasets/")

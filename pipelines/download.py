"""Bring a data set's pictures and texts into image-text shards, as its card says. 1 source range : 1 shard."""

from pipelines.common import RAW, dataset_use, experiment, program, run
from unifork.cluster import load_cluster
from unifork.config import Card, DatasetUse, HopResources, load_card
from unifork.errors import ConfigError
from unifork.filters.worker import Materialise, download_hop
from unifork.sources.web.download import URL_LIST, Download, web_hop


def main(name: str) -> None:
    card, params = load_card(name), experiment()
    use = dataset_use(params, name)
    if card.source.kind == URL_LIST:
        from_the_web(card, use)
        return
    hop = download_hop(card, use.rows, use.shard_rows, params.seed, RAW / name)
    run("download", [hop], Materialise, card.model_dump(mode="json"))


def from_the_web(card: Card, use: DatasetUse) -> None:
    cluster = load_cluster()
    workers = max(1, cluster.hops.get("download", HopResources()).workers)
    connections = cluster.web.connections_per_host
    if workers > connections:
        raise ConfigError(
            f"cluster {cluster.name}: {workers} download workers, but connections_per_host is {connections}: "
            f"each worker needs at least one. Use fewer workers, or raise web.connections_per_host"
        )
    hop = web_hop(card, use.rows, use.shard_rows, RAW / card.name)
    plain = card.model_dump(mode="json"), cluster.web.model_dump(mode="json")
    run("download", [hop], Download, *plain, connections // workers)


if __name__ == "__main__":
    program("pipelines.download", lambda name: RAW / name, main, "data set, a card in datasets/")

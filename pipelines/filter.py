"""Keep the rows that a data set's card wants; count and quarantine the others. 1 shard : 1 shard."""

from pipelines.common import FILTERED, RAW, program, run
from unifork.config import load_card
from unifork.data.schema import columns_of, image_text_schema
from unifork.data.workers import Filter, filter_hop


def main(name: str) -> None:
    card = load_card(name)
    hop = filter_hop(card, RAW / name, FILTERED / name)
    lineage = {"filters": [rule.model_dump(mode="json") for rule in card.filters]}
    manifest = run(hop, Filter, (card.model_dump(mode="json"),), "filter", columns_of(image_text_schema(card)), lineage)
    drops = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
    print(f"{name}: kept {manifest.rows} rows, dropped {drops or 'none'}")


if __name__ == "__main__":
    program("pipelines.filter", lambda name: FILTERED / name, main, "data set, a card in datasets/")

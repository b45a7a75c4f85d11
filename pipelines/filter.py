"""Keep the rows that a data set's card wants; count and quarantine the others. 1 shard : 1 shard."""

from pipelines.common import FILTERED, RAW, program, run
from unifork.config import load_card
from unifork.data.workers import Filter, filter_hop


def main(name: str) -> None:
    card = load_card(name)
    hop = filter_hop(card, RAW / name, FILTERED / name)
    (manifest,) = run("filter", [hop], Filter, card.model_dump(mode="json"))
    drops = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
    print(f"{name}: kept {manifest.rows} rows, dropped {drops or 'none'}")


if __name__ == "__main__":
    program("pipelines.filter", lambda name: FILTERED / name, main, "data set, a card in datasets/")

"""Keep the rows that a data set's card wants; count and quarantine the others. 1 shard : 1 shard."""

from pipelines.common import FILTERED, RAW, SIGNATURES, program, run
from unifork.config import Card, load_card
from unifork.filters.duplicates import Sign, check_order, compared_with, decide, looks_around, sign_hop
from unifork.filters.worker import Filter, filter_hop
from unifork.processes import exclusive

SIGNING_SECONDS = 24 * 3600.0
"""Two filters that look at the same set wait for each other."""


def twins(card: Card) -> dict[int, str]:
    """Sign this set and those it is compared with, and decide which of its rows have an earlier twin."""
    others = [load_card(name) for name in compared_with(card)]
    check_order(card, others)
    for one in (card, *others):
        with exclusive(SIGNATURES / one.name, SIGNING_SECONDS):
            run("filter", [sign_hop(one, RAW / one.name, SIGNATURES / one.name)], Sign, one.model_dump(mode="json"))
    return decide(
        card, SIGNATURES / card.name, {one.name: SIGNATURES / one.name for one in others}, FILTERED / card.name
    )


def main(name: str) -> None:
    card = load_card(name)
    hop = filter_hop(card, RAW / name, FILTERED / name, twins(card) if looks_around(card) else None)
    (manifest,) = run("filter", [hop], Filter, card.model_dump(mode="json"))
    drops = ", ".join(f"{count} {reason}" for reason, count in manifest.dropped.items())
    print(f"{name}: kept {manifest.rows} rows, dropped {drops or 'none'}")


if __name__ == "__main__":
    program("pipelines.filter", lambda name: FILTERED / name, main, "data set, a card in datasets/")

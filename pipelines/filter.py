"""Keep the rows that a data set's card wants; count and quarantine the others. 1 image-text shard : 1 shard."""

from unifork.cluster import run_jobs
from unifork.config import Card, Cluster, load_card, load_cluster
from unifork.filters.duplicates import Sign, check_order, compared_with, decide, looks_around, sign_job
from unifork.filters.worker import Filter, filter_job
from unifork.jobs import program
from unifork.layout import Layout
from unifork.processes import exclusive

LAYOUT = Layout()
SIGNING_SECONDS = 24 * 3600.0
"""Two filters that look at the same set wait for each other."""


def main(name: str) -> None:
    card, cluster = load_card(name), load_cluster()
    duplicates = find_duplicates(card, cluster) if looks_around(card) else None
    job = filter_job(card, LAYOUT.raw(name), LAYOUT.filtered(name), duplicates)
    (manifest,) = run_jobs([job], Filter, card, cluster=cluster, step="filter")
    print(manifest.summary(LAYOUT.filtered(name)))


def find_duplicates(card: Card, cluster: Cluster) -> dict[int, str]:
    """Sign this set and those it is compared with, and decide which of its rows have an earlier duplicate."""
    others = [load_card(name) for name in compared_with(card)]
    check_order(card, others)
    for signed in (card, *others):
        folder = LAYOUT.signatures(signed.name)
        with exclusive(folder, SIGNING_SECONDS):
            run_jobs([sign_job(signed, LAYOUT.raw(signed.name), folder)], Sign, signed, cluster=cluster, step="filter")
    folders = {other.name: LAYOUT.signatures(other.name) for other in others}
    return decide(card, LAYOUT.signatures(card.name), folders, LAYOUT.filtered(card.name))


if __name__ == "__main__":
    program(LAYOUT.filtered, main, "data set, a card in datasets/")

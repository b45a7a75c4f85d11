"""Keep the rows that a data set's card wants; count and quarantine the others. 1 image-text shard : 1 shard.

Images are measured once. Every decision is made from the rows and their measurements, so a changed rule reads no image.
"""

from unifork.cluster import run_jobs
from unifork.config import load_card, load_cluster
from unifork.filters.duplicates import Sign, check_order, compared_with, decide, looks_around, sign_job
from unifork.filters.measure import Measure, measure_job
from unifork.filters.worker import Filter, filter_job
from unifork.jobs import program
from unifork.layout import Layout
from unifork.processes import exclusive
from unifork.shards.task import warnings_of

LAYOUT = Layout()
WAIT_SECONDS = 24 * 3600.0
"""Two filters that look at the same set wait for each other."""


def main(name: str) -> None:
    card, cluster = load_card(name), load_cluster()
    others = [load_card(other) for other in compared_with(card)]
    check_order(card, others)

    # in: images, looked at once
    for seen in (card, *others):
        with exclusive(folder := LAYOUT.measured(seen.name), WAIT_SECONDS):
            run_jobs([measure_job(seen, LAYOUT.raw(seen.name), folder)], Measure, seen, cluster=cluster, step="filter")

    # which rows have an earlier duplicate, in this set or in those it is compared with
    duplicates = None
    if looks_around(card):
        for seen in (card, *others):
            with exclusive(folder := LAYOUT.signatures(seen.name), WAIT_SECONDS):
                job = sign_job(seen, LAYOUT.measured(seen.name), folder)
                run_jobs([job], Sign, seen, cluster=cluster, step="filter")
        folders = {other.name: LAYOUT.signatures(other.name) for other in others}
        duplicates = decide(card, LAYOUT.signatures(name), folders, LAYOUT.filtered(name))

    # out: the rows that are kept, and the quarantine of the others
    job = filter_job(card, LAYOUT.measured(name), LAYOUT.filtered(name), duplicates)
    (manifest,) = run_jobs([job], Filter, card, cluster=cluster, step="filter")
    print(manifest.summary(LAYOUT.filtered(name)), *warnings_of(manifest, "filter", card.losses), sep="\n")


if __name__ == "__main__":
    program(LAYOUT.filtered, main, "data set, a card in datasets/")

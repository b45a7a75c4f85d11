"""Bring a data set's images and texts into image-text shards, as its card says. 1 slice of the source : 1 shard."""

from unifork.cluster import run_jobs
from unifork.config import load_card, load_cluster, load_experiment
from unifork.filters.rules import check_card
from unifork.jobs import program
from unifork.layout import Layout
from unifork.shards.task import warnings_of
from unifork.sources import Materialize, download_job, source_of
from unifork.sources.web.download import WEB_VERSION, Download

LAYOUT = Layout()


def main(name: str) -> None:
    card, params, cluster = load_card(name), load_experiment(), load_cluster()
    check_card(card)  # the filters too: a mistake in one is found before a download of days
    use, folder = params.dataset(name), LAYOUT.raw(name)
    if source_of(card)[1].web:
        # no seed: another one must not fetch the web again
        job = download_job(card, use.rows, use.shard_rows, 0, folder, WEB_VERSION)
        workers = max(1, cluster.for_step("download").workers)
        (manifest,) = run_jobs([job], Download, card, cluster.web, workers, cluster=cluster, step="download")
    else:
        job = download_job(card, use.rows, use.shard_rows, params.data_seed, folder)
        (manifest,) = run_jobs([job], Materialize, card, cluster=cluster, step="download")
    print(manifest.summary(folder), *warnings_of(manifest, "download", card.losses), sep="\n")


if __name__ == "__main__":
    program(LAYOUT.raw, main, "data set, a card in datasets/")

"""Bring the items of a benchmark in: official files, or what is made from the seed -> table with questions and images.

A benchmark whose files are not here is noted as such, with what to put where; nothing fails.
"""

from unifork.config import load_eval, load_experiment
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import selected, write_items
from unifork.evaluation.names import ABSENT
from unifork.evaluation.suites import suite_of
from unifork.jobs import program
from unifork.layout import Layout

LAYOUT = Layout()


def main(name: str) -> None:
    params = load_experiment()
    card = load_eval(name).used(params.benchmarks[name])
    suite, options = suite_of(card)
    archive, folder = Archive(card, options), LAYOUT.items(name)
    if archive.absent:
        write_items(card, [], archive.image, folder, {ABSENT: archive.absent})
        print(f"{name}: not here: {archive.absent}")
        return
    files = archive.check()
    items = selected(card, suite.items_of(archive, options, params.data_seed))
    lineage = {"revision": card.items.revision, "files": files, "seed": params.data_seed}
    manifest = write_items(card, items, lambda image: suite.image(archive, image), folder, lineage)
    print(manifest.summary(folder))


if __name__ == "__main__":
    program(LAYOUT.items, main, "benchmark, a card in datasets/evals/")

"""Run benchmarks of text on a model by lm-evaluation-harness: a model and files -> results with all log-likelihoods.

Benchmarks whose files are not here are noted as such, with what to put where; nothing fails.
"""

import shutil

from unifork.config import load_experiment, load_text
from unifork.errors import one_of
from unifork.evaluation.names import ABSENT
from unifork.evaluation.text import run_tasks
from unifork.jobs import own_device, program
from unifork.layout import Layout
from unifork.shards.manifest import Manifest, write_manifest

LAYOUT = Layout()


def main(name: str) -> None:
    params = load_experiment()
    entries = {f"{entry['variant']}/{entry['benchmark']}": entry for entry in params.text_runs.values()}
    one_of("text evaluation", name, entries, "params.yaml: text_runs")
    card, folder = load_text(entries[name]["benchmark"]), LAYOUT.answers(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if card.absent:
        lineage = {ABSENT: card.absent}
        write_manifest(folder, Manifest(kind="text", dataset=card.name, columns={}, shards=(), lineage=lineage))
        print(f"{name}: not here: {card.absent}")
        return
    device = own_device("text")
    run_tasks(card, LAYOUT.root / entries[name]["model"], folder, device, params.data_seed)
    print(f"{folder}: {', '.join(card.tasks)}")


if __name__ == "__main__":
    program(LAYOUT.answers, main, "text evaluation, <variant>/<card of datasets/evals/text>")

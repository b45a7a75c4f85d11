"""Have networks look at images: those of a model's answers, or the reference of a benchmark -> what is in them.

1 shard of images : 1 shard of findings. Where images or networks are not here, that is noted, and nothing fails.
"""

from pathlib import Path

from unifork.cluster import run_jobs
from unifork.config import load_cluster, load_eval, load_experiment
from unifork.errors import one_of
from unifork.evaluation.examining import Examiner, examine_job, write_summary
from unifork.evaluation.items import read_items
from unifork.evaluation.names import ABSENT
from unifork.jobs import program
from unifork.layout import Layout

LAYOUT = Layout()


def main(name: str) -> None:
    params, cluster = load_experiment(), load_cluster()
    entries = {entry["name"]: entry for entry in params.examined.values()}
    one_of("name", name, entries, "params.yaml: examined")
    benchmark = entries[name]["benchmark"]
    card = load_eval(benchmark).used(params.benchmarks[benchmark])
    images = None if name == benchmark else LAYOUT.answers(name)
    job, worker = examine_job(card, read_items(LAYOUT.items(benchmark)), images, output(name))
    (manifest,) = run_jobs([job], Examiner, *worker, cluster.device("answer"), cluster=cluster, step="answer")
    absent = manifest.lineage.get(ABSENT)
    print(f"{name}: not here: {absent}" if absent else manifest.summary(job.folder))
    if images is None and not absent:
        print(*write_summary(card, job.folder), sep="\n")


def output(name: str) -> Path:
    """Beside the answers of `<variant>/<benchmark>`; of a benchmark, beside its items."""
    return LAYOUT.answers(f"{name}.found") if "/" in name else LAYOUT.items(f"{name}-reference")


if __name__ == "__main__":
    program(output, main, "evaluation, <variant>/<benchmark>, or a benchmark, whose reference is meant")

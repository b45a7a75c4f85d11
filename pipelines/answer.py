"""Have a model answer the items of a benchmark. 1 shard of items : 1 shard of raw answers or images.

A run that is killed goes on with the next part of a shard and ends with the same answers.
"""

from unifork.cluster import run_jobs
from unifork.config import load_cluster, load_eval, load_experiment
from unifork.errors import one_of
from unifork.evaluation.answering import Answerer, answer_job
from unifork.evaluation.names import ABSENT
from unifork.jobs import program
from unifork.layout import Layout

LAYOUT = Layout()


def main(name: str) -> None:
    params, cluster = load_experiment(), load_cluster()
    entries = {f"{entry['variant']}/{entry['benchmark']}": entry for entry in params.evaluations.values()}
    one_of("evaluation", name, entries, "params.yaml: evaluations")
    benchmark = entries[name]["benchmark"]
    card = load_eval(benchmark).used(params.benchmarks[benchmark])
    device, model = cluster.device("answer"), (LAYOUT.root / entries[name]["model"]).absolute()
    job = answer_job(card, LAYOUT.items(benchmark), LAYOUT.answers(name), model, params.data_seed)
    (manifest,) = run_jobs([job], Answerer, model, card.answer, device, cluster=cluster, step="answer")
    absent = manifest.lineage.get(ABSENT)
    print(f"{name}: not here: {absent}" if absent else manifest.summary(job.folder))


if __name__ == "__main__":
    program(LAYOUT.answers, main, "evaluation, <variant>/<benchmark>")

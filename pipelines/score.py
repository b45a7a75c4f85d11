"""Score all answers of a variant: verdicts of every item and rule, scores with errors. No model, no torch: seconds.

A benchmark whose files are not here is listed as such.
"""

import shutil

from unifork.config import load_eval, load_experiment
from unifork.errors import unknown
from unifork.evaluation.answers import join, read_answers
from unifork.evaluation.items import ABSENT, read_items
from unifork.evaluation.scoring import by_split, origin_of, score_answers, write_scores
from unifork.evaluation.suites import suite_of
from unifork.jobs import program
from unifork.layout import Layout
from unifork.shards.manifest import read_manifest, write_json

LAYOUT = Layout()


def main(name: str) -> None:
    params, table = load_experiment(), {}
    if name not in params.scored:
        raise unknown("variant", name, params.scored, "params.yaml: scored")
    shutil.rmtree(LAYOUT.scores(name), ignore_errors=True)
    for benchmark in params.scored[name]:
        card, answers = load_eval(benchmark).used(params.benchmarks[benchmark]), LAYOUT.answers(name) / benchmark
        if suite_of(card)[0].examine:
            answers = answers.with_name(f"{benchmark}.found")  # what networks found in the images
        if absent := read_manifest(answers).lineage.get(ABSENT):
            table[benchmark] = {ABSENT: absent}
            print(f"{name}: {benchmark}: not here: {absent}")
            continue
        items = read_items(LAYOUT.items(benchmark))
        found = join(card, items, read_answers(answers), str(answers))
        scores, lines = score_answers(card, items, found, origin_of(answers))
        write_scores(LAYOUT.scores(name) / benchmark, card, scores, lines)
        table[benchmark] = by_split(scores)
        print("\n".join(f"{name}: {benchmark}: {score}" for score in scores))
    LAYOUT.scores(name).mkdir(parents=True, exist_ok=True)
    write_json(LAYOUT.scores(f"{name}.json"), table)


if __name__ == "__main__":
    program(LAYOUT.scores, main, "variant of the experiment")

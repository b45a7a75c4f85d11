"""Score all answers of a variant: verdicts of every item and rule, scores with errors. No model, no torch: seconds.

A benchmark whose files are not here is listed as such.
"""

import shutil

from unifork.config import load_eval, load_experiment, load_text
from unifork.errors import unknown
from unifork.evaluation.answers import join, read_answers
from unifork.evaluation.items import read_items
from unifork.evaluation.names import ABSENT
from unifork.evaluation.scoring import METRICS, by_split, origin_of, score_answers, write_scores
from unifork.evaluation.suites import suite_of
from unifork.evaluation.text_scores import text_scores
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
        answers, of_text = LAYOUT.answers(name) / benchmark, benchmark in params.text_evals
        card = None if of_text else load_eval(benchmark).used(params.benchmarks[benchmark])
        if card and suite_of(card)[0].examine:
            answers = answers.with_name(f"{benchmark}.found")  # what networks found in the images
        if absent := read_manifest(answers).lineage.get(ABSENT):
            table[benchmark] = {ABSENT: absent}
            print(f"{name}: {benchmark}: not here: {absent}")
            continue
        if card is None:
            scores = text_scores(load_text(benchmark), answers)
            write_json(LAYOUT.scores(name) / benchmark / METRICS, by_split(scores))
        else:
            items = read_items(LAYOUT.items(benchmark))
            joined = join(card, items, read_answers(answers), str(answers))
            scores, lines = score_answers(card, items, joined, origin_of(answers))
            write_scores(LAYOUT.scores(name) / benchmark, card, scores, lines)
        table[benchmark] = by_split(scores)
        print("\n".join(f"{name}: {benchmark}: {score}" for score in scores))
    LAYOUT.scores(name).mkdir(parents=True, exist_ok=True)
    write_json(LAYOUT.scores(f"{name}.json"), table)


if __name__ == "__main__":
    program(LAYOUT.scores, main, "variant of the experiment")

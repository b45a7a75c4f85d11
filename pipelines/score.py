"""Score all answers of a variant: verdicts of every item and rule, scores with errors. No model, no torch: seconds.

answers/<variant> + data/evals -> scores/<variant>, and the values of its headlines in scores/<variant>.json, for DVC. A
benchmark whose files are not here has none.
"""

import shutil

from unifork.config import EvalCard, TextCard, load_eval, load_experiment, load_text
from unifork.errors import one_of
from unifork.evaluation.answers import join, origin_of, read_answers
from unifork.evaluation.items import read_items
from unifork.evaluation.names import ABSENT
from unifork.evaluation.scoring import METRICS, by_split, headline_values, score_answers, write_scores
from unifork.evaluation.suites import suite_of
from unifork.evaluation.text_scores import text_scores
from unifork.jobs import program
from unifork.layout import Layout
from unifork.shards.manifest import read_manifest, write_json

LAYOUT = Layout()


def main(name: str) -> None:
    params, values = load_experiment(), dict[str, float]()
    one_of("variant", name, params.scored, "params.yaml: scored")
    shutil.rmtree(LAYOUT.scores(name), ignore_errors=True)
    for benchmark in params.scored[name]:
        answers, of_text = LAYOUT.answers(name) / benchmark, benchmark in params.text_evals
        card = load_text(benchmark) if of_text else load_eval(benchmark).used(params.benchmarks[benchmark])
        if isinstance(card, EvalCard) and suite_of(card)[0].examine:
            answers = answers.with_name(f"{benchmark}.found")  # what networks found in the images
        if absent := read_manifest(answers).lineage.get(ABSENT):
            print(f"{name}: {benchmark}: not here: {absent}")
            continue
        if isinstance(card, TextCard):
            scores = text_scores(card, answers)
            write_json(LAYOUT.scores(name) / benchmark / METRICS, by_split(scores))
        else:
            items = read_items(LAYOUT.items(benchmark))
            joined = join(card, items, read_answers(answers), str(answers))
            scores, lines = score_answers(card, items, joined, origin_of(answers))
            write_scores(LAYOUT.scores(name) / benchmark, card, scores, lines)
        values |= headline_values(card, scores)
        print("\n".join(f"{name}: {benchmark}: {score}" for score in scores))
    LAYOUT.scores(name).mkdir(parents=True, exist_ok=True)
    write_json(LAYOUT.scores(f"{name}.json"), values)


if __name__ == "__main__":
    program(LAYOUT.scores, main, "variant of the experiment")

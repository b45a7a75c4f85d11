"""Run one benchmark on one trained model: outputs of every sample, scores with standard errors."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from unifork.config import load_experiment
from unifork.errors import unknown
from unifork.evaluation.benchmarks import Model, evaluate
from unifork.evaluation.model import ImageModel
from unifork.jobs import program
from unifork.layout import Layout
from unifork.shards.manifest import write_atomically, write_json

LAYOUT = Layout()


def main(name: str) -> None:
    # in: a benchmark of the experiment, and the last model of a variant
    params = load_experiment()
    if name not in params.evaluations:
        raise unknown("evaluation", name, params.evaluations, "params.yaml: evaluations")
    evaluation = params.evaluations[name]
    benchmark = params.benchmarks[evaluation["benchmark"]]
    model = ImageModel(Path(evaluation["model"]), benchmark.sampling, lambda line: print(f"{name}: {line}", flush=True))

    # the model generates or answers every item, and is judged
    place = f"params.yaml: benchmarks.{evaluation['benchmark']}.kind"
    records, scores = evaluate(benchmark, params.seed, Model(model.generate_images, model.answer), place)

    # out: a record of every sample, the codes of every generated image, and the scores by split and name
    folder = LAYOUT.scores(name)
    shutil.rmtree(folder, ignore_errors=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(folder / "outputs" / "samples.jsonl", lambda path: path.write_text(lines))
    if model.generated:
        np.savez(folder / "outputs" / "codes.npz", codes=np.concatenate(model.generated))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for score in scores:
        row = asdict(score)
        table.setdefault(row.pop("split"), {})[row.pop("name")] = row
        print(f"{name}: {score}")
    write_json(folder / "metrics.json", table)


if __name__ == "__main__":
    program(LAYOUT.scores, main, "evaluation, <variant>-<benchmark>")

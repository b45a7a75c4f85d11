"""Run one benchmark on one trained model: outputs of every sample, scores with standard errors."""

import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.common import SCORES, experiment, program
from unifork.errors import unknown
from unifork.evaluation.benchmarks import Model, evaluate
from unifork.image_tokenizer.code_encoder import CodeEncoder
from unifork.inference import Speaker
from unifork.layout import MODEL_IMAGE_TOKENIZER
from unifork.shards.manifest import write_atomically, write_json

BATCH_PICTURES = 64
GROUND = (255, 255, 255)


def main(name: str) -> None:
    params = experiment()
    if name not in params.evaluations:
        raise unknown("evaluation", name, params.evaluations, "params.yaml: evaluations")
    directory = Path(params.evaluations[name]["model"])
    benchmark = params.benchmarks[params.evaluations[name]["benchmark"]]
    speaker = Speaker.load(directory)
    shape = (speaker.model.config.positions, speaker.model.config.depth)
    crop, pad = (CodeEncoder(directory / MODEL_IMAGE_TOKENIZER, v, GROUND, BATCH_PICTURES) for v in ("crop", "pad"))
    painted: list[np.ndarray] = []

    def paint(prompts: list[str]) -> list[Image.Image]:
        tell = lambda done: print(f"{name}: {done}/{len(prompts)} pictures", flush=True)  # noqa: E731
        painted.append(speaker.paint(prompts, benchmark.sampling, progress=tell))
        return crop.decode_codes(painted[-1])

    def answer(pictures: list[Image.Image], questions: list[str]) -> list[str]:
        codes = pad.encode_pictures(pictures).reshape(-1, *shape)
        return speaker.answer(codes, questions)

    result = evaluate(benchmark, params.seed, Model(paint, answer), f"params.yaml: benchmarks ({name})")
    folder = SCORES / name
    shutil.rmtree(folder, ignore_errors=True)
    records = "".join(json.dumps(record) + "\n" for record in result.records)
    write_atomically(folder / "outputs" / "samples.jsonl", lambda path: path.write_text(records))
    if painted:
        np.savez(folder / "outputs" / "codes.npz", codes=np.concatenate(painted))
    table: dict[str, dict[str, dict[str, float]]] = {}
    for score in result.scores:
        row = score.to_dict()
        table.setdefault(row.pop("split"), {})[row.pop("name")] = row
        print(
            f"{name}: {score.split} {score.name} {score.value:.3f} +- {score.standard_error:.3f} "
            f"(chance {score.chance:.3f})"
        )
    write_json(folder / "metrics.json", table)


if __name__ == "__main__":
    program("pipelines.evaluate", lambda name: SCORES / name, main, "evaluation, <variant>-<benchmark>")

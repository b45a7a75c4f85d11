"""Benchmarks of text alone, through lm-evaluation-harness: a model and a card go in, results come out.

One branch of the model is written as the dense language model that it is, and the harness ranks the answers of its
tasks by their log-likelihood there. What it found is kept, with every log-likelihood; `text_scores` reads that file.
"""

import json
import os
from contextlib import chdir
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from unifork.config import TextCard, fingerprint
from unifork.errors import ConfigError
from unifork.evaluation.names import METRICS, SAMPLES, identity
from unifork.layout import MODEL_TEXT_TOKENIZER
from unifork.shards.manifest import Manifest, Shard, file_sha256, write_atomically, write_manifest

TEXT_VERSION = 1
"""Raise when the same model would get other results."""
KEPT = ("doc_id", "doc_hash", "prompt_hash", "target_hash", "target", "arguments", "filtered_resps", *METRICS)


def run_tasks(card: TextCard, model: Path, folder: Path, device: str, seed: int) -> None:
    """Write `samples.jsonl`, a line for each question with all log-likelihoods, and a manifest with the results.

    Raises ConfigError without the package, and for a task or data set that cannot be found.
    """
    if not card.online:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    try:
        from lm_eval import simple_evaluate  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(f"card {card.name}: {error}; text needs `pip install '.[text-evals]'`") from None
    model, folder, place = model.absolute(), folder.absolute(), f"card {card.name} ({card.include_path or 'its cache'})"
    with TemporaryDirectory(dir=folder) as dense, chdir(card.include_path or "."):
        tasks = TaskManager(include_path="." if card.include_path else None)
        try:
            tasks.load([*card.tasks])
        except (KeyError, OSError) as error:  # a task; a file or the Hub
            raise ConfigError(f"{place}: {' '.join(str(error).split())}; put {card.access} there") from None
        export(model, card.branch, card.dtype, Path(dense))
        found = simple_evaluate(
            model="hf", model_args={"pretrained": dense, "dtype": card.dtype}, tasks=[*card.tasks],
            num_fewshot=card.num_fewshot, batch_size=card.batch_size, device=device, task_manager=tasks,
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
        )  # fmt: skip
    lines = [
        json.dumps({"task": task, **{key: row[key] for key in KEPT if key in row}}, default=str)
        for task, rows in found["samples"].items()
        for row in rows
        if row["filter"] == "none"
    ]
    write_atomically(folder / SAMPLES, lambda path: path.write_text("".join(f"{line}\n" for line in lines)))
    shots = "/".join(map(str, sorted({*found["n-shot"].values()})))
    versions = ", ".join(f"{task} {found['versions'].get(task)}" for task in card.tasks)
    how = f"log-likelihoods of the branch {card.branch}, {shots}-shot, {card.dtype}, on {device}"
    lineage = {key: found.get(key, {}) for key in ("results", "group_subtasks")} | {"model": identity(model)}
    lineage |= {"decoding": f"{how}, lm-eval {version('lm_eval')}, versions {versions}", "seed": seed}
    size, digest, inputs = (folder / SAMPLES).stat().st_size, file_sha256(folder / SAMPLES), fingerprint(lineage)
    shard = Shard(path=SAMPLES, rows=len(lines), bytes=size, sha256=digest, inputs=inputs)
    write_manifest(folder, Manifest(kind="text", dataset=card.name, columns={}, shards=(shard,), lineage=lineage))


def export(model: Path, branch: str, dtype: str, out: Path) -> None:
    """One branch of a model directory as a dense model of transformers, with its text tokenizer."""
    # only this needs torch
    import torch  # noqa: PLC0415

    from unifork.documents.text_tokenizer import import_text_tokenizer  # noqa: PLC0415
    from unifork.models.conversion import dense_branch  # noqa: PLC0415
    from unifork.models.modeling import load_model  # noqa: PLC0415

    dense_branch(load_model(model, getattr(torch, dtype)), branch).save_pretrained(out)
    import_text_tokenizer(model / MODEL_TEXT_TOKENIZER, out)

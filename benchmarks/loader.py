"""Samples a second of the loader on one core, from Parquet shards with real-size codes.

`python benchmarks/loader.py` writes shards of 576 positions x 4 codes with captions of about 40
words, prepares them (text is tokenized there) and then times steps of 384 documents:
order and packing, codes from Parquet, and finished batches with everything a route needs. Rates are
per second of processor time.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import interval, machine, table

from unifork.cluster import run_jobs
from unifork.config import MixtureEntry, OptimizerConfig, PreparedSet, Track, load_card
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import CodesIdentity
from unifork.documents.prepare import Prepare, prepare_job
from unifork.documents.prompts import TEMPLATES
from unifork.documents.text_tokenizer import TextTokenizer, train_text_tokenizer
from unifork.layout import Layout
from unifork.shards.job import table_of, write_shard
from unifork.shards.manifest import Manifest, write_manifest
from unifork.shards.schema import codes_schema, columns_of
from unifork.shards.task import ShardTask
from unifork.vocabulary import VIEW_OF_TASK

GRID, DEPTH, CODES = 24, 4, 16_384
WORDS = 40
CARDS = Path(__file__).parent.parent / "datasets"


def make_shards(root: Path, rows: int, shard_rows: int) -> TextTokenizer:
    """Both views of a made-up data set, and a text tokenizer."""
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(2000)])
    texts = [" ".join(rng.choice(words, WORDS)) for _ in range(rows)]
    card = load_card("shapes", CARDS)
    for task, text in (("generation", "caption"), ("understanding", "description")):
        view = card.tasks[task].view
        card_of_one = card.model_copy(update={"tasks": {task: card.tasks[task].model_copy(update={"texts": (text,)})}})
        identity = {"codebook_id": "c" * 16, "encoder_id": "e" * 16, "encoding": {"view": view}}
        schema = codes_schema(card_of_one, task, GRID, DEPTH, identity)
        folder, shards = Layout(root).codes / "shapes" / view, []
        for first in range(0, rows, shard_rows):
            codes = rng.integers(0, CODES, (shard_rows, GRID**2 * DEPTH)).astype("<u2")
            plain = [
                {"key": f"{first + n:08d}", text: texts[first + n], "codes": [codes[n].tobytes()]}
                for n in range(shard_rows)
            ]
            shard_task = ShardTask().placed(None, folder / f"{first:08d}.parquet", None, "benchmark")
            shards.append(write_shard(shard_task, table_of(plain, schema), {}).shard)
        write_manifest(folder, Manifest(kind="codes", dataset="shapes", columns=columns_of(schema), shards=shards))
    return train_text_tokenizer(texts[:500], 2000, root / "text")


def per_second(count: int, seconds: list[float]) -> str:
    """Rate with its interval."""
    rates = interval([count / duration for duration in seconds])
    return f"{rates.median:,.0f} [{rates.low:,.0f}, {rates.high:,.0f}]"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_480)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-documents", type=int, default=384)
    parser.add_argument("--row-tokens", type=int, default=16_384)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = make_shards(root, given.rows, 2048)
        entries = (
            MixtureEntry(dataset="shapes", task="generation", text="caption", template="generate", weight=0.5),
            MixtureEntry(dataset="shapes", task="understanding", text="description", template="caption", weight=0.5),
        )
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant", warmup_steps=0)
        track = Track(mixture=entries, steps=given.steps, batch_documents=given.batch_documents,
                      trainable=("*",), optimizer=optimizer, prompt_drop=0.1)  # fmt: skip
        started, card = time.process_time(), load_card("shapes", CARDS)
        for entry in entries:
            chosen = PreparedSet(
                dataset=entry.dataset, text=entry.text, template=entry.template,
                codes=f"data/codes/shapes/{VIEW_OF_TASK[entry.task]}",
            )  # fmt: skip
            job = prepare_job(card, chosen, root / chosen.codes, Layout(root).prepared / entry.prepared, root / "text")
            run_jobs([job], Prepare, card, chosen.text, TEMPLATES[chosen.template], root / "text")
        preparing = time.process_time() - started
        loader = TrackLoader(
            "joint", track, Layout(root), tokenizer, CodesIdentity(GRID**2, DEPTH, "c" * 16, "e" * 16),
            seed=0, context=1350, row_tokens=given.row_tokens, rows_per_microbatch=1,
        )  # fmt: skip
        plans, codes, batches = [], [], []
        for step in range(given.steps):
            marks = [time.process_time()]
            plan = loader.plan(step, 1)
            marks.append(time.process_time())
            for slot in plan.slots:
                loader.parts[slot.part].codes(slot.document)
            marks.append(time.process_time())
            for _ in loader.batches(plan, 0):
                pass
            marks.append(time.process_time())
            took = [stop - start for start, stop in itertools.pairwise(marks)]
            for seconds, duration in zip((plans, codes, batches), took, strict=True):
                seconds.append(duration)
    n = given.batch_documents
    whole = [sum(durations) for durations in zip(plans, codes, batches, strict=True)]
    print(f"{machine('cpu')}; {given.rows:,} rows of each of two views, steps of {n} documents, "
          f"row_tokens {given.row_tokens}\n")  # fmt: skip
    print(table(["part", "documents a second (median of steps, 95 % interval)"], [
        ["preparing: texts tokenized and checked, by `prepare`", f"{2 * given.rows / preparing:,.0f}"],
        ["order, prompts, packing plan", per_second(n, plans)],
        ["codes from Parquet, in the order of the step", per_second(n, codes)],
        ["finished batches (codes already read)", per_second(n, batches)],
        ["all of a step", per_second(n, whole)],
    ]))  # fmt: skip


if __name__ == "__main__":
    main()

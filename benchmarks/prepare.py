"""How fast texts become documents, and what it costs to open them.

    python benchmarks/prepare.py [--rows 20000] [--sizes 10000 100000 1000000 10000000]

First table: rows a second of the prepare stage, with Qwen2.5's tokenizer, texts of this project's pages and codes of
576 x 4: the worker alone in this process (per second of processor time), then the whole job (wall time, with writing,
hashing and starting Ray for 1 and 2 workers).

Second table: a part of a mixture opened by a fresh process, for growing numbers of rows. Prepared shards of 10,000
rows are one real file under many names (so their pages are warm), with shards of codes likewise. Printed: seconds to
open, for a context that holds every document and one that holds half of them, memory that belongs to the process
alone (RssAnon; pages of mapped files are the system's), the time of a seek, and of looking up one document's key,
length and supervised tokens in the order of training.
"""

import argparse
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import machine, table

from unifork.cluster import local_ray, run_jobs
from unifork.config import Card, Cluster, JobResources, MixtureEntry, PreparedSet, load_card
from unifork.documents.loader import SetOrder
from unifork.documents.mixture import CodesIdentity, MixturePart
from unifork.documents.prepare import Prepare, prepare_job
from unifork.documents.prompts import TEMPLATES
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.layout import Layout
from unifork.shards.job import table_of, write_shard
from unifork.shards.manifest import Manifest, manifest_sha256, read_manifest, write_manifest
from unifork.shards.schema import codes_schema, columns_of
from unifork.shards.task import ShardTask
from unifork.vocabulary import VIEW_OF_TASK

ROOT = Path(__file__).parent.parent
SHARD_ROWS = 10_000
KINDS = {
    "captions of 40 words": ("caption", "generate"),
    "dialogues of 3 x (12 + 40) words": ("conversations", "answer"),
}
IDENTITY = {"codebook_id": "c" * 16, "encoder_id": "e" * 16}
SEEKS, WALKED = 200, 50_000


def write_tokenizer(folder: Path) -> Path:
    """Qwen2.5's tokenizer, from the tests."""
    packed = ROOT / "tests/fixtures/qwen2.5_tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(lzma.decompress((packed / "tokenizer.json.xz").read_bytes()))
    (folder / "tokenizer_config.json").write_bytes((packed / "tokenizer_config.json").read_bytes())
    return folder


def write_codes(root: Path, text: str, template: str, rows: int, shard_rows: int, grid: int) -> PreparedSet:
    """Shards of codes with texts from this project's pages."""
    rng, task = np.random.default_rng(0), TEMPLATES[template].task
    words = re.findall(r"[\w',.-]+", " ".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))))

    def some(count: int) -> str:
        start = int(rng.integers(0, len(words) - count))
        return " ".join(words[start : start + count])

    def value() -> object:
        if text == "caption":
            return some(int(rng.integers(20, 61)))
        turns = [("user", 12), ("assistant", 40)] * 3
        return [{"role": role, "text": some(int(rng.integers(count // 2, count * 3 // 2)))} for role, count in turns]

    card: Card = load_card("shapes", ROOT / "datasets")
    use = card.tasks[task].model_copy(update={"texts": (text,)})
    view = VIEW_OF_TASK[task]
    schema = codes_schema(
        card.model_copy(update={"tasks": {task: use}}), task, grid, 4, {**IDENTITY, "encoding": {"view": view}}
    )
    folder, shards = Layout(root).codes / "shapes" / view, []
    for first in range(0, rows, shard_rows):
        codes = rng.integers(0, 16384, (shard_rows, grid * grid * 4)).astype("<u2")
        plain = [{"key": f"{first + n:012d}", text: value(), "codes": [codes[n].tobytes()]} for n in range(shard_rows)]
        task_of_one = ShardTask().placed(None, folder / f"part-{first // shard_rows:05d}.parquet", None, "benchmark")
        shards.append(write_shard(task_of_one, table_of(plain, schema), {}).shard)
    write_manifest(folder, Manifest(kind="codes", dataset="shapes", columns=columns_of(schema), shards=tuple(shards)))
    return PreparedSet(dataset="shapes", text=text, template=template, codes=str(folder))


def rates(kind: str, rows: int) -> list[str]:
    """A row of the first table."""
    card = load_card("shapes", ROOT / "datasets")
    text, template = KINDS[kind]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = write_tokenizer(root / "text")
        chosen = write_codes(root, text, template, rows, 2500, 24)
        worker, job = (
            Prepare(card, text, TEMPLATES[template], tokenizer),
            prepare_job(card, chosen, Path(chosen.codes), root / "alone", tokenizer),
        )
        tasks = job.missing()
        worker(tasks[0])
        started = time.process_time()
        for task in tasks[1:]:
            worker(task)
        cells = [kind, f"{(rows - 2500) / (time.process_time() - started):,.0f}"]
        for workers in (0, 1, 2):
            cluster = Cluster(name="benchmark", cpus=2, jobs={"prepare": JobResources(workers=workers, cpus=1)})
            job = prepare_job(card, chosen, Path(chosen.codes), root / f"job{workers}", tokenizer)
            with local_ray(cluster, needed=workers > 0), open(os.devnull, "w") as nowhere:
                started, printed, sys.stdout = time.perf_counter(), sys.stdout, nowhere
                try:
                    form = TEMPLATES[template]
                    run_jobs([job], Prepare, card, text, form, tokenizer, cluster=cluster, step="prepare")
                finally:
                    sys.stdout = printed
                cells.append(f"{rows / (time.perf_counter() - started):,.0f}")
        sizes = [path.stat().st_size for path in (root / "alone").glob("*.arrow")]
        return [*cells, f"{sum(sizes) / rows:,.0f}"]


def grow(root: Path, shards: int) -> None:
    """Make the one prepared shard of a root, and its shard of codes, so many."""
    folders = (Layout(root).codes / "shapes/crop", Layout(root).prepared / "shapes-caption-generate")
    for folder in folders:
        manifest = read_manifest(folder)
        first = manifest.shards[0]
        names = [f"part-{number:05d}{Path(first.path).suffix}" for number in range(shards)]
        for name in names[1:]:
            if not (folder / name).exists():
                os.link(folder / first.path, folder / name)
        lineage = {**manifest.lineage, **({"codes": manifest_sha256(folders[0])} if manifest.lineage else {})}
        copies = tuple(first.model_copy(update={"path": name}) for name in names)
        write_manifest(folder, manifest.model_copy(update={"shards": copies, "lineage": lineage}))


def resident_mib() -> float:
    """Memory of this process alone, in MiB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) / 1024


def opened(root: Path) -> dict[str, float]:
    """Open a part in this process and use it."""
    entry = MixtureEntry(dataset="shapes", task="generation", text="caption", template="generate", weight=1.0)
    tokenizer, identity = TextTokenizer(root / "text"), CodesIdentity(1, 4, *IDENTITY.values())
    MixturePart(entry, Layout(root), tokenizer, identity, 1350)  # what libraries do once
    before, found = resident_mib(), {}
    for name, context in (("half", 65), ("all", 1350)):
        started = time.perf_counter()
        part = MixturePart(entry, Layout(root), tokenizer, identity, context)
        order = SetOrder(part.group_sizes, 0, "benchmark", 0)
        found[name], found[f"{name} rows"] = time.perf_counter() - started, len(part)
    found["memory"] = resident_mib() - before
    places = np.random.default_rng(1).integers(0, 10 * len(part), SEEKS).tolist()
    started = time.perf_counter()
    for place in places:
        order.index(place)
    found["seek"] = (time.perf_counter() - started) / SEEKS
    started = time.perf_counter()
    for place in range(places[0], places[0] + WALKED):
        document = order.index(place)
        part.key(document), part.length(document), part.supervised(document)
    found["lookup"] = (time.perf_counter() - started) / WALKED
    return found | {"total": resident_mib()}


def growth(sizes: list[int]) -> list[list[str]]:
    """The rows of the second table."""
    card = load_card("shapes", ROOT / "datasets")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tokenizer = write_tokenizer(root / "text")
        chosen = write_codes(root, "caption", "generate", SHARD_ROWS, SHARD_ROWS, 1)
        prepared = Layout(root).prepared / "shapes-caption-generate"
        job = prepare_job(card, chosen, Path(chosen.codes), prepared, tokenizer)
        job.add(Prepare(card, "caption", TEMPLATES["generate"], tokenizer)(job.missing()[0]))
        job.finish()
        for size in sizes:
            grow(root, size // SHARD_ROWS)
            command = [sys.executable, __file__, "--open", str(root)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            assert found["all rows"] == size
            rows.append([
                f"{size:,}", f"{found['all']:.2f}", f"{found['half']:.2f} ({found['half rows'] / size:.0%})",
                f"{found['memory']:.1f}", f"{1e3 * found['seek']:.2f}", f"{1e6 * found['lookup']:.0f}",
            ])  # fmt: skip
    return rows


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**4, 10**5, 10**6, 10**7])
    parser.add_argument("--open", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opened(Path(arguments.open))))
        return
    print(f"{machine('cpu')}; rows a second\n")
    head = ["texts", "worker, per core", "job, in its process", "1 worker", "2 workers", "bytes a row"]
    print(table(head, [rates(kind, arguments.rows) for kind in KINDS]), end="\n\n")
    head = ["rows", "s to open, all fit", "half fit", "MiB added", "ms per seek", "us per document"]
    print(table(head, growth(arguments.sizes)))


if __name__ == "__main__":
    main()

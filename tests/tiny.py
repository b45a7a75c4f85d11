"""A tiny experiment root for tests: `micro` with an untrained image tokenizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from unifork.config import Experiment, PreparedSet, load, load_card
from unifork.documents.prepare import Prepare, prepare_job
from unifork.documents.prompts import TEMPLATES
from unifork.documents.text_tokenizer import TextTokenizer, texts_of, train_text_tokenizer
from unifork.experiments import params_text, resolve
from unifork.filters.measure import Measure, measure_job
from unifork.filters.worker import Filter, filter_job
from unifork.image_tokenizer.architecture import Architecture
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.layout import Layout
from unifork.models.warm_start import create_model
from unifork.shards.job import KeptRows
from unifork.shards.manifest import Manifest
from unifork.sources import Materialize, download_job
from unifork.vocabulary import VIEW_OF_TASK

REPOSITORY = Path(__file__).parent.parent
ROWS, SHARD_ROWS = 96, 32
CHANGES = {
    "datasets": {"shapes": {"rows": ROWS, "shard_rows": SHARD_ROWS}},
}


def run_here(jobs, worker):
    """Jobs over shards, done by one worker in this process; their manifests."""
    for job in jobs:
        for task in job.missing():
            job.add(worker(task))
    return [job.finish() for job in jobs]


def filter_here(card, raw, measured, filtered, duplicates=None, noted=lambda worker: worker):
    """The stage filter in this process: what images measure, and which rows are kept; the manifest of these.

    noted: is given each worker and gives back the one that is called.
    """
    run_here([measure_job(card, raw, measured)], noted(Measure(card)))
    (manifest,) = run_here([filter_job(card, measured, filtered, duplicates)], noted(Filter(card)))
    return manifest


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path inside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def start(root: Path, *words: str, cluster: str = "clusters/local.yaml", path="", **options) -> "subprocess.Popen[str]":
    """Start `python -m words` in a root; what it prints is captured. path: a folder of modules beside the project's."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{REPOSITORY}", "UNIFORK_CLUSTER": cluster}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **options}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=root, text=True, **options)


def write_experiment(root: Path, changes: dict | None = None) -> Experiment:
    """`micro` with changes, as the params.yaml of a root that has the project's own files."""
    for name in ("datasets", "experiments", "clusters"):
        if not (root / name).exists():
            shutil.copytree(REPOSITORY / name, root / name)
            if name == "datasets":  # few rows: all are trained on, unless a test wants otherwise
                hold_out(root, None)
    (root / "experiments" / "tiny.yaml").write_text(yaml.safe_dump({"extends": "micro", **CHANGES, **(changes or {})}))
    experiment = resolve("tiny", root / "experiments", root / "datasets")
    (root / "params.yaml").write_text(params_text(experiment))
    return load(Experiment, root / "params.yaml")


def hold_out(root: Path, share: float | None) -> None:
    """Have the card `shapes` hold out a share of its rows."""
    path = root / "datasets" / "shapes.yaml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("held_out:")]
    path.unlink()  # it may be a link to another root's
    path.write_text("\n".join([*lines, *([f"held_out: {share}"] if share else [])]) + "\n")


def fresh_tokenizer(experiment: Experiment, directory: Path) -> ImageTokenizer:
    """Random weights with a codebook of the encoder's own features, so that codes differ."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(Architecture.of(experiment.image_tokenizer))
    size, rows = experiment.image_tokenizer.image_size, experiment.image_tokenizer.codebook_size
    features = tokenizer.encoder(torch.rand(16, 3, size, size) * 2 - 1).flatten(0, 1)
    tokenizer.quantizer.codebook.copy_(features[:rows] * torch.rand(rows, 1))
    tokenizer.save(directory)
    return ImageTokenizer.load(directory)


def build(root: Path, changes: dict | None = None) -> Path:
    """Raw, filtered and coded shards, tokenizers and a fresh model below `root`."""
    experiment = write_experiment(root, changes)
    card = load_card("shapes", root / "datasets")
    raw, measured, filtered = (root / f"data/{stage}/shapes" for stage in ("raw", "measured", "filtered"))
    use = experiment.datasets["shapes"]
    run_here([download_job(card, use.rows, use.shard_rows, 0, raw)], Materialize(card))
    filter_here(card, raw, measured, filtered)
    kept = KeptRows(Layout(root), "shapes")
    images = fresh_tokenizer(experiment, root / "tokenizers/image")
    text = train_text_tokenizer(texts_of(kept, card), experiment.text_tokenizer.vocab_size, root / "tokenizers/text")
    tokenizer = root / "tokenizers/image"
    codes = root / "data/codes/shapes"
    jobs = [encode_job(card, task, kept, codes / use.view, tokenizer) for task, use in card.tasks.items()]
    run_here(jobs, Encode(card, tokenizer, "cpu"))
    prepare(root, experiment)
    write_model(experiment, images, text, root / "models/unifork-init", root)
    return root


def prepare(root: Path, experiment: Experiment) -> None:
    """The documents of all stages of an experiment, or those that are missing."""
    for chosen in experiment.prepared.values():
        prepare_set(root, chosen.dataset, chosen.text, chosen.template)


def prepare_set(root: Path, dataset: str, text: str, template: str) -> Manifest:
    """The documents of one text column for one template."""
    layout, form = Layout(root), TEMPLATES[template]
    codes = layout.codes / dataset / VIEW_OF_TASK[form.task]
    chosen = PreparedSet(dataset=dataset, text=text, template=template, codes=str(codes))
    card = load_card(dataset, layout.cards)
    job = prepare_job(card, chosen, codes, layout.prepared / f"{dataset}-{text}-{template}", layout.text_tokenizer)
    (manifest,) = run_here([job], Prepare(card, text, form, layout.text_tokenizer))
    return manifest


def write_model(experiment: Experiment, images: ImageTokenizer, text: TextTokenizer, folder: Path, root: Path) -> None:
    """Step 0 of the variant `unifork`."""
    shape = images.architecture
    model = create_model(
        experiment.variants["unifork"],
        images.quantizer.codebook,
        shape.depth,
        shape.grid,
        images.encoder_id,
        text.vocab_size,
    )
    model.save_pretrained(folder)
    shutil.copytree(root / "tokenizers/image", folder / "image_tokenizer")
    shutil.copytree(root / "tokenizers/text", folder / "text_tokenizer")


def untrained(root: Path, benchmarks: dict) -> Path:
    """A root without data, where an experiment with some benchmarks asks the model of step 0."""
    experiment = write_experiment(root, {"benchmarks": benchmarks})
    images = fresh_tokenizer(experiment, root / "tokenizers/image")
    texts = ["Is there a red circle in the image? yes, no", "a photo of two blue squares"] * 50
    text = train_text_tokenizer(texts, experiment.text_tokenizer.vocab_size, root / "tokenizers/text")
    write_model(experiment, images, text, root / "models/unifork-init", root)
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("model: models/unifork-s3", "model: models/unifork-init"))
    return root


def copy_of(root: Path, target: Path) -> Path:
    """A private copy of a root: of small files, which tests write anew in place; of others hard links."""

    def copy(file: str, to: str) -> None:
        (shutil.copy2 if os.stat(file).st_size < 1 << 16 else os.link)(file, to)

    shutil.copytree(root, target, copy_function=copy, dirs_exist_ok=True)
    return target


def objects(address: str) -> dict[str, bytes]:
    """What lies below s3://bucket/path, read by another client than the library's."""
    import boto3

    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    found = client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])
    return {
        entry["Key"].removeprefix(prefix + "/"): client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        for entry in found
    }

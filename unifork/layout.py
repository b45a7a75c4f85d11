"""Where everything of an experiment lies: the only place that knows folders.

In: the root of an experiment, the working directory unless said otherwise. Out: paths by what they hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER = "image_tokenizer", "text_tokenizer"
"""Folders inside a model: the tokenizers it was made with."""

STAGE_OF_FOLDER = {
    "raw": "download", "measured": "filter", "signatures": "filter", "filtered": "filter", "codes": "encode",
    "prepared": "prepare", "evals": "items",
}  # fmt: skip
"""Folder below `data`: the stage of `dvc.yaml` that writes it, one entry for each data set (or prepared documents)."""

IN_A_STORE = ("raw", "measured", "filtered", "codes")
"""Folders below `data` whose new shards go to the cluster's store. Signatures are read over and over and stay."""


@dataclass(frozen=True)
class Place:
    """An attribute of `Layout`: a path below its root."""

    path: str

    def __get__(self, layout: "Layout", _: Any) -> Path:
        return layout.root / self.path


@dataclass(frozen=True)
class Places:
    """A method of `Layout`: the path of one of many things, by its name."""

    path: str

    def __get__(self, layout: "Layout", _: Any) -> Callable[[str], Path]:
        return (layout.root / self.path).joinpath


@dataclass(frozen=True)
class Layout:
    """The folders and files of one experiment."""

    root: Path = Path()

    params = Place("params.yaml")
    """What the experiment is, written by `unifork use`."""
    dvc_ignore = Place(".dvcignore")
    """What DVC does not look at."""
    experiments = Place("experiments")
    """The files that `unifork use` reads."""
    cards = Place("datasets")
    """One card for each data set."""
    data = Place("data")
    """All data."""
    raw = Places("data/raw")
    """Of a data set: image-text shards as they were received."""
    measured = Places("data/measured")
    """Of a data set: what its images measure, with all columns but the images."""
    filtered = Places("data/filtered")
    """Of a data set: image-text shards with the rows that the card keeps."""
    signatures = Places("data/signatures")
    """Of a data set: what duplicates are found by."""
    codes = Place("data/codes")
    """Codes of all data sets, a folder each with one folder for each view."""
    prepared = Place("data/prepared")
    """Tokenized documents."""
    fetched = Place("data/fetched")
    """Copies of shards that lie in a store; may be deleted at any time."""
    published = Places("data/published")
    """Of a data set: the local side of a publication that goes elsewhere."""
    published_model = Places("data/published_models")
    """The same of a model."""
    histories = Place("histories")
    """Losses of reference runs, a small file each."""
    image_tokenizer = Place("tokenizers/image")
    """The image tokenizer of the experiment."""
    fetched_tokenizer = Places("tokenizers/fetched")
    """Of a data set: the image tokenizer that came with its codes."""
    text_tokenizer = Place("tokenizers/text")
    """The text tokenizer of the experiment."""
    model = Places("models")
    """A model, `<variant>-init` or `<variant>-<stage>`."""
    run = Places("runs")
    """Checkpoints and history of a run, `<variant>-<stage>`."""
    ray_train = Place("runs/.ray")
    """What Ray Train keeps for itself."""
    evals = Place("datasets/evals")
    """One card for each benchmark."""
    items = Places("data/evals")
    """Of a benchmark: its questions, truths and images."""
    answers = Places("answers")
    """Of `<variant>/<benchmark>`: what the model answered or drew."""
    scores = Places("scores")
    """Of a variant: a folder of scores and verdicts for each benchmark."""
    analysis = Places("scores/analyses")
    """What was found inside the model of a run, `<variant>-<stage>`."""
    reports = Place("reports")
    """The pages of all experiments."""
    report = Places("reports")
    """The page of an experiment."""

    def in_store(self, store: str, folder: Path) -> str | None:
        """Where in a store the shards of a folder go: `data/raw/x` to `<store>/raw/x`; None for one that stays here."""
        if not any(folder.is_relative_to(self.data / name) for name in IN_A_STORE):
            return None
        return f"{store.rstrip('/')}/{folder.relative_to(self.data).as_posix()}"


def command_for(folder: Path) -> str:
    """What makes the missing shards of a folder again."""
    parts = folder.absolute().parts
    for place, stage in STAGE_OF_FOLDER.items():
        if place in parts[:-1] and parts[parts.index(place) - 1] == "data":
            return f"`dvc repro {stage}@{parts[parts.index(place) + 1]}`"
    return "the command that wrote the folder"

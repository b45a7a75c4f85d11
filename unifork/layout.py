"""Where everything of an experiment lies: the only place that knows folders.

In: the root of an experiment, the working directory unless said otherwise. Out: paths by what they hold.
"""

from dataclasses import dataclass
from pathlib import Path

MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER = "image_tokenizer", "text_tokenizer"
"""Folders inside a model: the tokenizers it was made with."""

STAGE_OF_FOLDER = {"raw": "download", "filtered": "filter", "codes": "encode"}
"""Folder below `data`: the stage of `dvc.yaml` that writes it, one entry for each data set."""

IN_A_STORE = ("raw", "filtered", "codes")
"""Folders below `data` whose new shards go to the cluster's store. Signatures are read over and over and stay."""


@dataclass(frozen=True)
class Layout:
    """The folders and files of one experiment."""

    root: Path = Path()

    @property
    def params(self) -> Path:
        """What the experiment is, written by `unifork use`."""
        return self.root / "params.yaml"

    @property
    def experiments(self) -> Path:
        """The files that `unifork use` reads."""
        return self.root / "experiments"

    @property
    def cards(self) -> Path:
        """One card for each data set."""
        return self.root / "datasets"

    @property
    def data(self) -> Path:
        """All data."""
        return self.root / "data"

    def raw(self, dataset: str) -> Path:
        """Image-text shards as they were received."""
        return self.data / "raw" / dataset

    def filtered(self, dataset: str) -> Path:
        """Image-text shards with the rows that the card keeps."""
        return self.data / "filtered" / dataset

    def signatures(self, dataset: str) -> Path:
        """What duplicates are found by."""
        return self.data / "signatures" / dataset

    @property
    def codes(self) -> Path:
        """Codes of all data sets, a folder each with one folder for each view."""
        return self.data / "codes"

    @property
    def prepared(self) -> Path:
        """Tokenised documents."""
        return self.data / "prepared"

    @property
    def fetched(self) -> Path:
        """Copies of shards that lie in a store; may be deleted at any time."""
        return self.data / "fetched"

    def published(self, dataset: str) -> Path:
        """The local side of a publication that goes elsewhere."""
        return self.data / "published" / dataset

    @property
    def image_tokenizer(self) -> Path:
        """The image tokenizer of the experiment."""
        return self.root / "tokenizers" / "image"

    @property
    def text_tokenizer(self) -> Path:
        """The text tokenizer of the experiment."""
        return self.root / "tokenizers" / "text"

    def model(self, name: str) -> Path:
        """A model, `<variant>-init` or `<variant>-<stage>`."""
        return self.root / "models" / name

    def run(self, name: str) -> Path:
        """Checkpoints and history of a run, `<variant>-<stage>`."""
        return self.root / "runs" / name

    @property
    def ray_train(self) -> Path:
        """What Ray Train keeps for itself."""
        return self.root / "runs" / ".ray"

    def scores(self, evaluation: str) -> Path:
        """Outputs and scores of an evaluation, `<variant>-<benchmark>`."""
        return self.root / "scores" / evaluation

    @property
    def reports(self) -> Path:
        """The pages of all experiments."""
        return self.root / "reports"

    def report(self, experiment: str) -> Path:
        """The page of an experiment."""
        return self.reports / experiment

    def in_store(self, store: str, folder: Path) -> str | None:
        """Where in a store the shards of a folder go: `data/raw/x` to `<store>/raw/x`; None for one that stays here."""
        if not any(folder.is_relative_to(self.data / name) for name in IN_A_STORE):
            return None
        return f"{store.rstrip('/')}/{folder.relative_to(self.data).as_posix()}"

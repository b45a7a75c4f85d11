"""`evals/*.yaml`: what a benchmark is, in three parts, one for each program that reads it."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from unifork.config.base import StrictModel, load_named
from unifork.config.experiment import Benchmark, Sampling
from unifork.errors import ConfigError

QUESTION = "{question}"
"""In a prompt form: where the item's question (or the text that an image is generated for) stands."""


class ItemsPart(StrictModel):
    """What `items` reads."""

    suite: str
    """A key of `unifork.evaluation.suites.SUITES`, or `MODULE:OBJECT` of your own code."""
    archive: str | None = None
    """Folder with the files as their makers give them; None for items that are made from the seed."""
    access: str = ""
    """What to put there, and where it comes from."""
    options: dict[str, Any] = {}
    """What this suite needs to know; checked by the suite itself."""
    splits: tuple[str, ...] = ()
    """Splits that are answered and scored; none named: all of them."""
    revision: str = ""
    """Commit, date or version of the files, for the record."""
    rows: PositiveInt | None = None
    """Items that there must be, over the splits named."""
    sha256: dict[str, str] = {}
    """Hashes of files of the archive, by name; another file is refused."""


class AnswerPart(StrictModel):
    """How a model is asked."""

    prompt: str = QUESTION
    """The text that a model is given, with `{question}` where the item's own stands."""
    template: str = "answer"
    """Prompt template around it, a key of `unifork.documents.prompts.TEMPLATES`; its task says what is asked for."""
    max_new_tokens: PositiveInt = 128
    """Longest answer; text is decoded greedily."""
    sampling: Sampling = Sampling()
    """How images are drawn."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number type of the model, which may decide an answer; where it runs is the cluster file's affair."""

    def form(self, question: str) -> str:
        """The prompt of a question."""
        return self.prompt.replace(QUESTION, question)


class ScorePart(StrictModel):
    """How answers are read."""

    rules: tuple[str, ...] = ("official",)
    """Rules of the suite; scores of the first have plain names, those of others end in the rule's name."""


class ShowPart(StrictModel):
    """How a page shows what came out."""

    splits: tuple[str, ...] = ()
    """Splits in the order of columns; others follow by name."""
    scores: tuple[str, ...] = ()
    """Scores in the order of rows; others follow by name."""
    headlines: dict[str, str] = {}
    """Scores of a summary, by name, with a title for people."""
    scales: dict[str, tuple[float, float]] = {}
    """Pattern of names of scores: their worst and best value (`[100, 0]` where lower is better); else 0 to 1."""
    note: str = ""
    """What people must know to read them, in whole sentences."""


class Network(StrictModel):
    """A network that looks at images."""

    kind: str
    """A key of `unifork.evaluation.examining.KINDS`, or `MODULE:OBJECT` of your own code."""
    path: str
    """Folder of its files."""
    access: str = ""
    """What to put there, and where it comes from."""
    sha256: dict[str, str] = {}
    """Files that there must be, with the hash of each or its beginning; nothing for any."""


class _Head(StrictModel):
    name: str
    """The file is called the same."""
    title: str
    """One line for people."""
    homepage: str
    """Where its makers describe it."""
    license: str
    """SPDX identifier, or a short name where none exists."""
    show: ShowPart = ShowPart()


class TextCard(_Head):
    """Benchmarks of text alone, run by lm-evaluation-harness on one branch of a model.

    What decides results has no default: DVC follows these keys in the card, and a key that is not there is none to it.
    """

    tasks: Annotated[dict[str, float], Field(min_length=1)]
    """Tasks (or groups of them) by their names there, each with the accuracy of chance."""
    include_path: str | None
    """Folder with data sets as `<owner>/<name>` and task files of your own, whose paths start here; None: its cache."""
    access: str = "its data"
    """What to put there, and where it comes from."""
    online: bool
    """Whether data sets that are not there may be downloaded."""
    branch: str
    """Branch of the model that reads the text."""
    num_fewshot: NonNegativeInt
    """Solved examples before each question."""
    batch_size: PositiveInt
    """Texts at once."""
    dtype: Literal["float32", "bfloat16"]
    """Number type of the model."""

    @property
    def absent(self) -> str | None:
        """What to put where, if nothing is there."""
        needed = self.include_path and not (Path(self.include_path).is_dir() and any(Path(self.include_path).iterdir()))
        return f"put {self.access} into {self.include_path}, then `unifork use` again" if needed else None


class EvalCard(_Head):
    """One benchmark."""

    items: ItemsPart
    answer: AnswerPart = AnswerPart()
    score: ScorePart = ScorePart()
    networks: dict[str, Network] = {}
    """By what they are for; what they find in images is what rules read."""

    def used(self, benchmark: Benchmark) -> "EvalCard":
        """The card with what an experiment changes."""
        options = {**self.items.options, **benchmark.options}
        sampling = benchmark.sampling or self.answer.sampling
        items, answer = self.items.model_copy(update={"options": options}), {"sampling": sampling}
        return self.model_copy(update={"items": items, "answer": self.answer.model_copy(update=answer)})


def load_eval(name: str, folder: Path | str = "datasets/evals") -> EvalCard:
    """The card of a benchmark. Raises ConfigError when the file and its name disagree."""
    card = load_named(EvalCard, "benchmark", name, Path(folder))
    if QUESTION not in card.answer.prompt:
        raise ConfigError(f"{folder}/{name}.yaml: answer.prompt must contain {QUESTION}")
    return card


def load_text(name: str, folder: Path | str = "datasets/evals") -> TextCard:
    """The card of benchmarks of text. Raises ConfigError when the file and its name disagree."""
    return load_named(TextCard, "benchmark", name, Path(folder) / "text")

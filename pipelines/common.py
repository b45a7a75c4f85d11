"""What the programs share: arguments, folders, configuration."""

from collections.abc import Callable
from pathlib import Path

from unifork import jobs
from unifork.config import Experiment, load_experiment

RAW, FILTERED, CODES = Path("data/raw"), Path("data/filtered"), Path("data/codes")
SIGNATURES = Path("data/signatures")
IMAGE_TOKENIZER, TEXT_TOKENIZER = Path("tokenizers/image"), Path("tokenizers/text")
MODELS, RUNS, SCORES, REPORTS = Path("models"), Path("runs"), Path("scores"), Path("reports")


def experiment() -> Experiment:
    """The experiment of this folder."""
    return load_experiment()


def program(module: str, output: Callable[[str], Path], main: Callable[[str], None], what: str | None) -> None:
    """Run `main(name)` where the cluster file says, alone in its output folder."""
    jobs.program(output, main, what)

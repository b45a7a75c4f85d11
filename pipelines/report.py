"""Everything the experiment left behind, on one page that opens offline: reports/<experiment>/index.html."""

import time
from pathlib import Path

from pipelines.common import CODES, FILTERED, IMAGE_TOKENIZER, MODELS, RAW, REPORTS, RUNS, SCORES, experiment, program
from unifork.layout import MODEL_IMAGE_TOKENIZER
from unifork.report.build import build, loss_pictures
from unifork.report.codec import load_codec
from unifork.report.gather import Layout
from unifork.shards.manifest import write_atomically

CARDS = Path("datasets")


def write(path: Path, data: bytes) -> None:
    """Put a file into place, whole."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def main(_: str) -> None:
    started = time.monotonic()
    params = experiment()
    layout = Layout(CARDS, RAW, FILTERED, CODES, IMAGE_TOKENIZER, MODELS, RUNS, SCORES, MODEL_IMAGE_TOKENIZER)
    page = build(params, layout, load_codec)
    path = REPORTS / params.name / "index.html"
    write(path, page.encode())
    for name, picture in loss_pictures(params, layout).items():
        write(path.with_name("losses") / f"{name}.png", picture)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    program("pipelines.report", lambda _: REPORTS / experiment().name, main, None)

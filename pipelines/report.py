"""Everything the experiment left behind, on one page that opens offline: reports/<experiment>/index.html.

Beside it the losses for DVC: `losses/*.csv` for its plots, `losses.json` with where they end for its metrics.
"""

import time
from functools import partial
from pathlib import Path

from unifork.config import load_experiment
from unifork.jobs import program
from unifork.layout import Layout
from unifork.report.build import build
from unifork.report.codec import load_codec
from unifork.report.plots import loss_files
from unifork.report.training import lines_of
from unifork.shards.manifest import write_atomically

LAYOUT = Layout()


def main(_: str) -> None:
    started = time.monotonic()
    params = load_experiment()
    folder = LAYOUT.report(params.name)
    files = {"index.html": build(params, LAYOUT, load_codec).encode()}
    files |= loss_files(lines_of(params, LAYOUT))
    for name, data in files.items():
        write_atomically(folder / name, partial(Path.write_bytes, data=data))
    page = folder / "index.html"
    print(f"{page}: {page.stat().st_size / 1e6:.2f} MB in {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":  # the name of the experiment is not known before `main` runs
    program(lambda _: LAYOUT.reports, main)

"""`unifork status`: how the jobs and runs of this folder are, from their files alone.

In: manifests, histories, `progress.json`, locks. Out: two tables, or JSON. A program runs where its lock is held. On
another machine a lock may not be seen as held; a program there that left its lock is shown as `unknown`, with the time
of its last sign of life.
"""

import json
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from yaml import YAMLError, safe_load

from unifork.config import Experiment, load, load_experiment, read_yaml
from unifork.layout import STAGE_OF_FOLDER, Layout
from unifork.processes import holder_of, is_held, lock_path
from unifork.reference import among, reference, references
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX, write_json
from unifork.shards.progress import PROGRESS, places, read_progress

Row = dict[str, Any]
SHOWN = read_yaml(Path(__file__).with_suffix(".yaml"))
"""Folders of jobs, and the columns of both tables."""
TAIL = 100
"""Steps at the end of a history in which the last loss of each task is looked for."""


def status(as_json: Annotated[bool, typer.Option("--json", help="one list, for programs")] = False) -> None:
    """Show every job and run of this folder: how far, losses, rate, memory, time left, and why it stopped.

    Reads files alone, so it works from any terminal or machine that sees the folder, while programs go on.
    """
    layout, planned = Layout(), dict[str, Any]()
    with suppress(OSError, YAMLError):
        planned = safe_load(layout.params.read_text())
    rows = [*_jobs(layout, planned), *_runs(layout, planned)]
    print(json.dumps(rows, indent=1) if as_json else _text(rows))


def _jobs(layout: Layout, planned: dict[str, Any]) -> Iterator[Row]:
    """Data sets and documents: folders that are there, and those that the experiment will make."""
    for pattern, named_by in SHOWN["folders"].items():
        place = pattern.partition("/")[0]
        found = {folder for folder in layout.data.glob(pattern) if folder.is_dir() and folder.name[0] != "."}
        begun = found | {folder.parent for folder in found}
        for folder in sorted(found | ({layout.data / place / name for name in planned.get(named_by, ())} - begun)):
            yield _job(folder, STAGE_OF_FOLDER.get(place, "publish"), folder.relative_to(layout.data).as_posix())


def _job(folder: Path, stage: str, name: str) -> Row:
    head = {"stage": stage, "name": name}
    if manifest := read_progress(folder / MANIFEST):  # no lock matters: what is made again has none
        facts = {"total": len(manifest["shards"]), "rows": sum(shard["rows"] for shard in manifest["shards"])}
        return {**head, "done": facts["total"], **facts, **_state([], True, True, facts)}
    locks, beside = zip(*places(folder), strict=True)
    progress = {"done": sum(1 for _ in folder.glob(f"*{RECORD_SUFFIX}")), **read_progress(*beside)}
    return {**head, **progress, **_state(locks, False, folder.exists(), progress)}


def _runs(layout: Layout, planned: dict[str, Any]) -> Iterator[Row]:
    """Training runs: folders that are there, and those that the experiment will make."""
    there = {folder.parent.name for name in (PROGRESS, "log.txt") for folder in layout.run("").glob(f"*/{name}")}
    found = references(layout)
    experiment = load(Experiment, layout.params) if found and planned else None
    for name in sorted({*there, *planned.get("runs", ())}):
        folder, latest = layout.run(name), layout.run(name) / "latest"
        progress = {"done": 0, "total": None, **read_progress(folder / PROGRESS)}
        with suppress(OSError):
            whole = (folder / "history.jsonl").read_bytes().split(b"\n")[:-1]
            progress["done"] = len(whole)
            for row in map(json.loads, whole[-TAIL:]):
                progress |= {key: row[key] for key in ("text_loss", "image_loss", "fill") if row.get(key) is not None}
            if experiment:
                progress["reference"] = among(found, experiment, layout, name, [json.loads(line) for line in whole])
        locks = [lock_path(folder), lock_path(layout.model(name))]
        progress |= _validation(folder / "validation.jsonl")
        progress["checkpoint"] = latest.read_text() if latest.exists() else None
        state = _state(locks, (folder / "finished.json").exists(), name in there, progress)
        yield {"stage": "train", "name": name, **progress, **state}


def record(name: Annotated[str, typer.Argument(help="finished run, for example unifork-s3")]) -> None:
    """Write the losses of a run to histories/, as a reference for runs of the same configuration."""
    from unifork.errors import DataError, one_of
    from unifork.report.reading import read_history
    from unifork.training.export import TRAINING

    layout, experiment = Layout(), load_experiment()
    one_of("run", name, experiment.runs, "params.yaml: runs")
    if not (rows := read_history(layout.model(name) / TRAINING / "history.csv")):
        raise DataError(f"{layout.model(name)}: no history; the run has not finished. `dvc repro train@{name}` goes on")
    own = reference(experiment, layout, name, rows)
    write_json(layout.histories / own.file, own.model_dump(mode="json"))
    print(f"{layout.histories / own.file}: {len(own.losses)} steps, configuration {own.configuration}")


def _validation(path: Path) -> Row:
    """The losses of the newest validation, each a mean over the parts that have it."""
    rows = [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
    newest, means = max((row["finished_steps"] for row in rows), default=0), dict[str, float]()
    for name in ("text_loss", "image_loss"):
        if values := [row[name] for row in rows if row["finished_steps"] == newest and row[name] is not None]:
            means[f"validation_{name}"] = sum(values) / len(values)
    return means


def _state(locks: Sequence[Path], finished: bool, begun: bool, progress: Row) -> Row:
    """running, finished, stopped, waiting or unknown, with the reason; seconds left and since the last sign of life."""
    holders = [(is_held(lock), holder_of(lock)) for lock in locks if lock.exists()]
    elsewhere = [text for _, text in holders if text and not text.endswith(f" on {socket.gethostname()}")]
    state, reason = "waiting", None
    if any(held for held, _ in holders):
        state = "running"
    elif finished:
        state = "finished"
    elif elsewhere:
        state, reason = "unknown", f"the lock of {elsewhere[0]} is not held as far as this machine sees"
    elif begun or holders:
        state = "stopped"
        reason = progress.get("stopped", "without a word, as by SIGKILL or a machine that went down")
    facts: Row = {"state": state, "reason": reason}
    if state in ("running", "unknown") and "written" in progress:
        facts |= {"left": progress.get("seconds_left"), "seen": max(0.0, time.time() - progress["written"])}
    return facts


def _text(rows: list[Row]) -> str:
    """Two tables, and why what stopped did."""
    blocks = []
    for columns, is_run in ((SHOWN["jobs"], False), (SHOWN["runs"], True)):
        table = [[_cell(row, form) for form in columns.values()] for row in rows if (row["stage"] == "train") == is_run]
        widths = [max(map(len, column)) for column in zip(columns, *table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in ([*columns], *table)]
        blocks += ["\n".join(lines)] * bool(table)
    reasons = [f"{row['name']}: {row['reason']}" for row in rows if row["reason"]]
    reasons += [f"{row['name']}: {line}" for row in rows for line in row.get("reference", ())]
    return "\n\n".join([*blocks, *["\n".join(reasons)] * bool(reasons)])


def _cell(row: Row, form: str) -> str:
    """A column's format over what a row knows; a dash where it does not."""
    values = {name: value for name, value in row.items() if value is not None}
    values |= {name: timedelta(seconds=round(row[name])) for name in values.keys() & {"left", "seen"}}
    try:
        return form.format_map({"total": "?", **values})
    except KeyError:
        return "-"

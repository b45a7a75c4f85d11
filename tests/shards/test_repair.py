"""Damaged, vanished, half-written and unwritable: found, said in one line, and mended by running again."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import crashes
import pytest
from tiny import REPOSITORY, bytes_of, filter_here, run_here, start, write_experiment
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import load_card
from unifork.errors import DataError
from unifork.filters.worker import filter_job
from unifork.processes import exclusive
from unifork.shards import manifest as manifests
from unifork.shards.manifest import MANIFEST, RECORD_SUFFIX
from unifork.sources import Materialize, download_job

CARD = load_card("shapes")


def stages(root: Path) -> list[str]:
    """Download and filter; the shards that had to be made."""
    outputs = []

    def noted(worker):
        return lambda task: outputs.append("/".join(task.output.split("/")[-3:])) or worker(task)

    raw, measured, filtered = (root / f"data/{stage}/shapes" for stage in ("raw", "measured", "filtered"))
    run_here([download_job(CARD, 12, 4, 0, raw)], noted(Materialize(CARD)))
    filter_here(CARD, raw, measured, filtered, noted=noted)
    return outputs


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    assert len(stages(root)) == 9
    return root


@pytest.fixture
def root(whole, tmp_path, monkeypatch) -> Path:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verify(*words: str) -> str:
    done = CliRunner().invoke(app, ["verify", *words])
    if isinstance(done.exception, DataError):
        return f"{done.output}error: {done.exception}"
    assert done.exit_code == 0, done.output
    return done.output


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "corrupt shard": (damaged, "part-00001.parquet", "sha256"),
    "truncated shard": (
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        "part-00001.parquet",
        "bytes instead of",
    ),
    "missing shard": (Path.unlink, "part-00001.parquet", "missing"),
    "half-written file": (lambda path: path.write_bytes(b"PAR1"), ".part-00001.parquet.tmp-0a1b2c3d", "killed run"),
    "foreign shard": (lambda path: path.write_bytes(b"PAR1"), "part-00009.parquet", "named by no manifest"),
    "damaged manifest": (lambda path: path.write_text("{"), MANIFEST, "damaged"),
    "damaged record": (lambda path: path.write_text(""), "part-00001.parquet" + RECORD_SUFFIX, "damaged record"),
}


@pytest.mark.parametrize("output", ["raw", "measured", "filtered"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_wrong_is_found_removed_and_made_again(root, damage, output):
    do, name, problem = DAMAGES[damage]
    before, folder = bytes_of(root), f"data/{output}/shapes"
    do(root / folder / name)
    stage = "download" if output == "raw" else "filter"
    printed = verify("data")
    assert f"{folder}/{name}: " in printed
    assert problem in printed
    repro = f"`dvc repro {stage}@shapes`"
    assert f"error: data: 1 faults, named above. `unifork verify --repair data` removes the files, {repro}" in printed
    assert f"now run {repro}" in verify("--repair", "data")
    assert not (root / folder / name).exists()
    assert (root / folder / MANIFEST).exists() != (name in ("part-00001.parquet", MANIFEST))  # which DVC would notice
    outputs = stages(root)
    if name == "part-00001.parquet":
        assert outputs == [f"{output}/shapes/{name}"]
    elif name != MANIFEST:
        assert outputs == []
    assert bytes_of(root) == before
    assert "error" not in verify("data")


def test_a_shard_of_another_size_is_mended_without_repair_too(root):
    before = bytes_of(root)
    victim = root / "data/filtered/shapes/part-00002.parquet"
    victim.write_bytes(victim.read_bytes()[:-1])
    assert stages(root) == ["filtered/shapes/part-00002.parquet"]
    assert bytes_of(root) == before


def test_a_vanished_input_shard_is_named_before_anything_starts(root):
    before = bytes_of(root)
    (root / "data/measured/shapes/part-00001.parquet").unlink()
    (root / "data/filtered/shapes/part-00001.parquet").unlink()
    with pytest.raises(
        DataError,
        match=r"^data/measured/shapes: 1 of 3 shards are not as its manifest says, first part-00001\.parquet: "
        r"missing\. `unifork verify --repair data/measured/shapes` takes them away, then `dvc repro filter@",
    ):
        filter_job(CARD, Path("data/measured/shapes"), Path("data/filtered/shapes"))
    (root / "data/raw/shapes/part-00001.parquet").unlink()
    assert "`dvc repro filter@shapes`, `dvc repro download@shapes`" in verify("data")
    verify("--repair", "data")
    assert stages(root) == [f"{stage}/shapes/part-00001.parquet" for stage in ("raw", "measured", "filtered")]
    assert bytes_of(root) == before


@pytest.mark.parametrize("place", ["path", "uri"])
def test_repair_touches_nothing_outside_its_folder_whatever_a_manifest_names(root, place):
    """Manifests travel with pulls and shared folders."""
    outside = root / "elsewhere/part-00001.parquet"
    outside.parent.mkdir()
    outside.write_bytes(b"of somebody")
    manifest = root / "data/raw/shapes" / MANIFEST
    plain = json.loads(manifest.read_text())
    plain["shards"][1][place] = "../../../elsewhere/part-00001.parquet" if place == "path" else f"file://{outside}"
    manifest.write_text(json.dumps(plain))
    printed = verify("data")
    assert ("a bare file name is expected" if place == "path" else "bytes instead of") in printed
    verify("--repair", "data")
    assert outside.read_bytes() == b"of somebody"


READ_ONLY = "mount --bind . . && mount -o remount,bind,ro . && cd . && exec "


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs a mount namespace of its own",
)
@pytest.mark.slow  # starts whole programs
def test_a_finished_job_on_a_disk_that_takes_nothing_is_finished(whole, experiment):
    shutil.copytree(whole / "data", experiment / "data")

    def on_read_only(*words: str) -> subprocess.CompletedProcess:
        command = READ_ONLY + " ".join([sys.executable, "-m", *words])
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", command], cwd=experiment, env=environment, check=False, capture_output=True,
            text=True,
        )  # fmt: skip

    for stage in ("download", "filter"):
        done = on_read_only(f"pipelines.{stage}", "shapes")
        assert (done.returncode, done.stderr) == (0, "")
        assert "3/3 shards (3 kept from before)" in done.stdout
    (experiment / "data/raw/shapes/part-00001.parquet").unlink()
    done = on_read_only("pipelines.download", "shapes")
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*cannot be written: Read-only file system\. Make room[^\n]*\n", done.stderr)


def test_an_unfinished_folder_is_said_to_be_unfinished(tmp_path):
    assert "has not finished" in verify(str(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_one_line(root, monkeypatch, number):
    before = bytes_of(root)
    (root / "data/raw/shapes/part-00001.parquet").unlink()

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(manifests.os, "replace", refuse)
        with pytest.raises(
            DataError, match=rf"data/raw/shapes/.*: cannot be written: {os.strerror(number)}\. Make room"
        ):
            stages(root)
    assert not list(root.rglob("*.tmp-*"))
    stages(root)
    assert bytes_of(root) == before


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(DataError, match=r"raw\.lock: cannot be written: Permission denied"),
        exclusive(tmp_path / "raw"),
    ):
        pass


def program(root: Path, *words: str, **options) -> tuple[int, str]:
    """Exit code of a program and what it said; of a mistake the one line."""
    process = start(root, *words, **options)
    out, err = process.communicate(timeout=120)
    if process.returncode == 0:
        return 0, out
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return process.returncode, line


@pytest.fixture
def experiment(tmp_path) -> Path:
    """A root in which nothing was made yet, with the card of `whole`."""
    write_experiment(tmp_path, {"datasets": {"shapes": {"rows": 12, "shard_rows": 4}}})
    shutil.copy(REPOSITORY / "datasets/shapes.yaml", tmp_path / "datasets")
    return tmp_path


def test_a_full_disk_stops_the_program_with_one_line_and_room_lets_it_go_on(whole, experiment):
    """The kernel refuses to write beyond some bytes of a file, as it would on a full disk."""
    largest = max((path.stat().st_size, path.name) for path in (whole / "data/raw/shapes").glob("*.parquet"))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest[0] - 1, largest[0] - 1))

    code, line = program(experiment, "pipelines.download", "shapes", preexec_fn=limit)
    assert code == 2
    assert f"{largest[1]}: cannot be written: File too large. Make room" in line
    assert not list(experiment.rglob("*.tmp-*"))
    stages(experiment)
    assert bytes_of(experiment / "data") == bytes_of(whole / "data")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that the kernel keeps from everybody")
def test_a_folder_that_takes_nothing_stops_the_program_with_one_line(experiment):
    raw = experiment / "data/raw/shapes"
    raw.parent.mkdir(parents=True)
    raw.symlink_to("/sys/kernel")
    code, line = program(experiment, "pipelines.download", "shapes")
    assert code == 2
    assert re.search(r"data/raw/shapes.*: cannot be written: .*\. Make room or allow writing", line)


@pytest.mark.slow  # starts whole programs
def test_the_programs_name_what_is_wrong_with_their_input_and_mend_their_output(whole, experiment):
    shutil.copytree(whole / "data", experiment / "data")
    raw, measured = (experiment / f"data/{stage}/shapes/part-00001.parquet" for stage in ("raw", "measured"))
    for spoil, problem in ((Path.unlink, "missing"), (damaged, "sha256")):
        spoil(raw)
        measured.unlink()
        code, line = program(experiment, "pipelines.filter", "shapes")
        assert code == 2
        assert f"part-00001.parquet: {problem}" in line
        repair, stage = re.findall(r"`(.*?)`", line)
        assert stage == "dvc repro download@shapes"
        crashes.run(experiment, ("unifork.cli", *repair.split()[1:]))
        for stage in ("download", "filter"):
            output = crashes.run(experiment, (f"pipelines.{stage}", "shapes"))
            assert "3/3 shards (2 kept from before), 4/4 rows" in output
        assert bytes_of(experiment / "data") == bytes_of(whole / "data")

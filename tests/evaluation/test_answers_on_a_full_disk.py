"""A disk that takes nothing more while answers, scores or a model are written: a line, and with room the same bytes."""

import multiprocessing
import os
import re
from itertools import pairwise

import crashes
import pytest
from forks import SERVER, become
from small_disk import mount, needs_mounts
from tiny import bytes_of, untrained

from unifork.shards.manifest import fault, recorded_shards

PAGE = 4096
DISK = 1 << 20
BENCHMARKS = {"shapes-understanding": {"options": {"samples": 10}}, "shapes-generation": {"options": {"samples": 2}}}
LINE = (
    r"error: (\S+): cannot be written: No space left on device\. Make room or allow writing, then run the same command "
    r"again: what is finished stays\n"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = untrained(tmp_path_factory.mktemp("full"), BENCHMARKS)
    for name in BENCHMARKS:
        crashes.run(root, ("pipelines.items", name))
    return root


def free(disk, pages):
    """Leave some pages of a disk free, filling up the others."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    left = os.statvfs(disk).f_bavail
    ballast.write_bytes(bytes(PAGE * max(0, left - pages)))


def kept(folder):
    """Parts and shards that are finished, by name; all shards must be whole."""
    shards = recorded_shards(folder)
    assert [name for name, shard in shards.items() if fault(folder, shard)] == []
    parts = {path.name for path in folder.glob("part-*.json")}
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return {*shards, *(part for part in parts if shard_of(part) not in shards)}


def shard_of(part):
    """The name of the shard that a part is of."""
    return re.sub(r"\.\d+\.json$", "", part)


def on_a_small_disk(root, disk, program, name, pipe):
    """Run a program on a disk that has more room at every start: exit code, lines, what is kept; all files."""
    folder, runs = root / disk / name, []
    mount(root / disk, DISK)
    while not runs or runs[-1][0]:
        free(root / disk, len(runs) if len(runs) < 6 else int(6 * 1.5 ** (len(runs) - 6)))
        runs.append((*run(root, program, name), kept(folder) if folder.exists() else set()))
    pipe.send((runs, bytes_of(folder)))


def on_a_disk_of_two_files(root, disk, *program_pipe):
    """Run a program where the disk takes itself and one file more: exit code, lines."""
    *program, pipe = program_pipe
    mount(root / disk, f"{DISK},nr_inodes=2")
    pipe.send(run(root, *program))


def run(root, *program):
    """Exit code and lines of a program."""
    os.environ["UNIFORK_CLUSTER"] = "here.yaml"
    printed = root / "printed.txt"
    process = multiprocessing.get_context("fork").Process(target=become, args=(str(root), program, str(printed)))
    process.start()
    process.join()
    return process.exitcode, printed.read_text()


def alone(target, *what):
    """What a function found in a process of its own."""
    here, there = SERVER.Pipe()
    process = SERVER.Process(target=target, args=(*what, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def refused(runs):
    """Where the disk was full in all runs but the last, which ends well."""
    *failed, last = runs
    assert last[0] == 0
    return [place_in(code, printed) for code, printed, _ in failed]


def place_in(code, printed):
    """Where the disk was full, by a line and nothing else."""
    line = re.search(LINE, printed)
    assert code == 2, printed
    assert line, printed
    assert "Traceback" not in printed
    return line[1]


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_full_disk_is_one_line_and_loses_no_part(root, name):
    whole = crashes.run(root, ("pipelines.answer", f"unifork/{name}"))
    assert "kept from before" not in whole
    expected = bytes_of(root / "answers/unifork" / name)
    runs, found = alone(on_a_small_disk, root, "answers", "pipelines.answer", f"unifork/{name}")
    assert found == expected
    places = refused(runs)
    for (*_, before), (*_, after) in pairwise(runs):
        assert [part for part in before if not {part, shard_of(part)} & after] == []
    assert places[0].endswith(f"answers/unifork/{name}.lock")  # full before anything begins
    assert any(place.endswith(".json") for place in places), places
    assert any(place.endswith(".parquet") for place in places), places
    print(f"\n{name}: {len(places)} times full, at {', '.join(dict.fromkeys(os.path.basename(p) for p in places))}")


@pytest.mark.slow
@needs_mounts
def test_scores_on_a_full_disk_are_one_line_too(root):
    for name in BENCHMARKS:
        crashes.run(root, ("pipelines.answer", f"unifork/{name}"))
    crashes.run(root, ("pipelines.score", "unifork"))
    expected = bytes_of(root / "scores/unifork")
    runs, found = alone(on_a_small_disk, root, "scores", "pipelines.score", "unifork")
    assert found == expected
    assert {"unifork.lock", "metrics.json"} <= {os.path.basename(place) for place in refused(runs)}


@pytest.mark.slow
@needs_mounts
def test_a_model_on_a_full_disk_is_one_line_too(root):
    runs, _ = alone(on_a_small_disk, root, "models", "pipelines.init", "unifork")
    places = {os.path.basename(place) for place in refused(runs)}
    assert places == {"unifork-init.lock", "unifork-init"}
    place = place_in(*alone(on_a_disk_of_two_files, root, "models", "pipelines.init", "unifork"))
    assert place.endswith("models/unifork-init")  # which cannot even be made

"""A disk that takes nothing more while answers are written: one line, and with room the same bytes in the end."""

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


def on_a_small_disk(root, name, pipe):
    """Answer with `answers` on a disk that has more room at every start: exit code, lines, what is kept; all files."""
    os.environ["UNIFORK_CLUSTER"] = "here.yaml"
    disk, runs = root / "answers", []
    folder, printed = disk / "unifork" / name, root / "printed.txt"
    mount(disk, DISK)
    while not runs or runs[-1][0]:
        free(disk, len(runs) if len(runs) < 6 else int(6 * 1.5 ** (len(runs) - 6)))
        process = multiprocessing.get_context("fork").Process(
            target=become, args=(str(root), ("pipelines.answer", f"unifork/{name}"), str(printed))
        )
        process.start()
        process.join()
        runs.append((process.exitcode, printed.read_text(), kept(folder) if folder.exists() else set()))
    pipe.send((runs, bytes_of(folder)))


@pytest.mark.slow
@needs_mounts
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_full_disk_is_one_line_and_loses_no_part(root, name):
    whole = crashes.run(root, ("pipelines.answer", f"unifork/{name}"))
    assert "kept from before" not in whole
    expected = bytes_of(root / "answers/unifork" / name)
    here, there = SERVER.Pipe()
    process = SERVER.Process(target=on_a_small_disk, args=(root, name, there))
    process.start()
    there.close()
    runs, found = here.recv()
    process.join()
    assert found == expected
    *failed, last = runs
    places = []
    for code, printed, _ in failed:
        line = re.search(LINE, printed)
        assert code == 2, printed
        assert line, printed
        assert "Traceback" not in printed
        places.append(line[1])
    assert last[0] == 0
    for (*_, before), (*_, after) in pairwise(runs):
        assert [part for part in before if not {part, shard_of(part)} & after] == []
    assert places[0].endswith(f"answers/unifork/{name}.lock")  # full before anything begins
    assert any(place.endswith(".json") for place in places), places
    assert any(place.endswith(".parquet") for place in places), places
    print(f"\n{name}: {len(failed)} times full, at {', '.join(dict.fromkeys(os.path.basename(p) for p in places))}")

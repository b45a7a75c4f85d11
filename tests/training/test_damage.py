"""A run folder that was damaged by hand: repaired with one line, refused with one, or the same bytes in the end."""

import json
import re
import shutil

import pytest
from stage_runs import assert_equal, job, killed, weights
from tiny import copy_of

from unifork.errors import CheckpointError
from unifork.training import stage
from unifork.training.history import Log, read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow

KEY = "unifork-s2-pretrain"


@pytest.fixture(scope="module")
def broken_off(tiny_root, tmp_path_factory):
    """A run of eight steps that was killed with checkpoints of steps 3 and 6."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("broken_off") / "root")
    killed(job(root), "between latest and the metrics", 2)
    assert sorted(path.name for path in (root / "runs" / KEY).glob("step-*")) == ["step-3", "step-6"]
    return root


@pytest.fixture
def stage_job(broken_off, tmp_path):
    root = copy_of(broken_off, tmp_path / "root")
    shutil.rmtree(root / "runs")  # what may be damaged is no link
    shutil.copytree(broken_off / "runs", root / "runs")
    return job(root)


def settle(stage_job):
    """What the lead does first of all; the lines that it logs."""
    log = stage_job.run_folder / "log.txt"
    log.unlink(missing_ok=True)
    stage._make_room(stage_job, stage_job.fingerprint(), Log(stage_job.run_folder, stage_job.key))
    return log.read_text().splitlines() if log.exists() else []


def finish(stage_job, unbroken):
    """Train on to the end, which must be that of the unbroken run."""
    train_stage(stage_job, WorkerContext())
    expected, history = unbroken[KEY]
    assert_equal(weights(stage_job), expected)
    assert read(stage_job.run_folder) == history


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 64
    path.write_bytes(content)


def edit_state(path, **changes):
    plain = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(plain | changes))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def zero_block(path):
    content = bytearray(path.read_bytes())
    content[8192:12288] = bytes(4096)
    path.write_bytes(content)


DAMAGES = {
    **{f"bit at {place}": (lambda p, place=place: flip(p / "__0_0.distcp", place), r"__0_0\.distcp: not the bytes")
       for place in (0.02, 0.1, 0.5, 0.9, 0.999)},
    "cut by a byte": (lambda p: cut(p / "__0_0.distcp"), r"__0_0\.distcp: \d+ bytes instead of \d+"),
    "emptied": (lambda p: (p / "__0_0.distcp").write_bytes(b""), r"__0_0\.distcp: 0 bytes instead of"),
    "deleted": (lambda p: (p / "__0_0.distcp").unlink(), r"__0_0\.distcp: missing"),
    "zeros": (lambda p: zero_block(p / "__0_0.distcp"), r"__0_0\.distcp: not the bytes"),
    "metadata": (lambda p: flip(p / ".metadata", 0.5), r"\.metadata: not the bytes"),
    "metadata deleted": (lambda p: (p / ".metadata").unlink(), r"\.metadata: missing"),
    "history of the checkpoint": (lambda p: cut(p / "history.jsonl"), r"history\.jsonl: \d+ bytes instead"),
    "state deleted": (lambda p: (p / "state.json").unlink(), r"state\.json: no such file"),
    "state empty": (lambda p: (p / "state.json").write_bytes(b""), r"state\.json: not valid JSON"),
    "state cut": (lambda p: cut(p / "state.json") or cut(p / "state.json"), r"state\.json: not valid JSON"),
    "state a list": (lambda p: (p / "state.json").write_text("[]"), r"state\.json: expected an object, found list"),
    "state an empty object": (lambda p: (p / "state.json").write_text("{}"), r"state\.json: steps None; after 6"),
    "state of another format": (lambda p: edit_state(p, format=2), r"state\.json: does not fit its own hash"),
    "state without steps": (lambda p: edit_state(p, steps=None), r"state\.json: steps None; after 6"),
    "state without a track": (lambda p: edit_state(p, steps={}), r"state\.json: steps \{\}; after 6 of 8"),
    "state with another count": (lambda p: edit_state(p, steps={"joint": 7}), r"\{'joint': 7\}; .* are \{'joint': 6\}"),
    "state with another track": (lambda p: edit_state(p, steps={"joint": 6, "x": 0}), r"steps \{'joint': 6, 'x': 0\}"),
    "state with other tensors": (lambda p: edit_state(p, tensors={}), r"state\.json: does not fit its own hash"),
    "state with another fingerprint": (lambda p: edit_state(p, fingerprint="x"), r"does not fit its own hash"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_falls_back_to_the_older_one_with_a_line(stage_job, damage):
    apply, expected = DAMAGES[damage]
    folder = stage_job.run_folder
    apply(folder / "step-6")
    problem, moved, *others = settle(stage_job)
    assert re.search(expected, problem)
    assert problem.endswith("Continuing from the newest whole checkpoint, step-3")
    assert moved.endswith("step-6 not continued from; moved to .step-6.old-1, delete at any time")
    assert others == []
    assert (folder / "latest").read_text() == "step-3"
    assert not (folder / "step-6").exists()
    assert (folder / ".step-6.old-1").exists()
    assert len(read(folder)) == 3
    assert settle(stage_job) == []


def test_after_a_flipped_bit_training_ends_with_the_same_weights_and_history(stage_job, unbroken):
    flip(stage_job.run_folder / "step-6" / "__0_0.distcp", 0.5)
    finish(stage_job, unbroken)
    assert "continuing from step 3 of 8" in (stage_job.run_folder / "log.txt").read_text()


def test_where_no_checkpoint_is_whole_the_error_names_every_damage(stage_job):
    flip(stage_job.run_folder / "step-6" / "__0_0.distcp", 0.5)
    cut(stage_job.run_folder / "step-3" / "state.json")
    cut(stage_job.run_folder / "step-3" / "state.json")
    with pytest.raises(
        CheckpointError, match=r"no whole checkpoint .*step-6/__0_0.*; .*step-3/state\.json: not valid.*Delete"
    ):
        train_stage(stage_job, WorkerContext())
    assert (stage_job.run_folder / "step-6").exists()


LATEST = {
    "missing": (lambda path: path.unlink(), "latest is missing.* step-6$"),
    "empty": (lambda path: path.write_text(""), "latest names '', which is not there.* step-6$"),
    "no checkpoint": (lambda path: path.write_text("step-9"), "latest names 'step-9', which is not there.* step-6$"),
    "a folder elsewhere": (lambda path: path.write_text("../x"), "latest names '../x', which is not there.* step-6$"),
    "no text": (lambda path: path.write_bytes(b"\xff\x00"), "latest names .*, which is not there.* step-6$"),
}


@pytest.mark.parametrize("damage", LATEST)
def test_a_pointer_that_names_nothing_is_replaced_by_the_newest_whole_checkpoint(stage_job, damage):
    apply, expected = LATEST[damage]
    apply(stage_job.run_folder / "latest")
    (line,) = settle(stage_job)
    assert re.search(expected, line)
    assert (stage_job.run_folder / "latest").read_text() == "step-6"
    assert settle(stage_job) == []


@pytest.mark.parametrize("name", ["step-7", "step-99"])
def test_a_checkpoint_under_another_number_is_not_believed(stage_job, name):
    (stage_job.run_folder / "step-6").rename(stage_job.run_folder / name)
    (stage_job.run_folder / "latest").write_text(name)
    (line, _) = settle(stage_job)
    assert re.search(r"steps \{'joint': 6\}; after 7|the stage has 8 steps; was the folder renamed", line)
    assert line.endswith("step-3")


def test_checkpoints_of_a_format_without_hashes_are_moved_aside_with_their_run(stage_job):
    path = stage_job.run_folder / "step-6" / "state.json"
    plain = {key: value for key, value in json.loads(path.read_text()).items() if key != "blake2b"}
    path.write_text(json.dumps(plain | {"format": 2}))
    (line,) = settle(stage_job)
    assert "holds checkpoints of another format (2 instead of 3); moved to unifork-s2-pretrain.old-1" in line


def test_a_pointer_without_any_checkpoint_is_refused(stage_job):
    for name in ("step-3", "step-6"):
        (stage_job.run_folder / name).rename(stage_job.run_folder / f"was-{name}")
    with pytest.raises(CheckpointError, match=r"latest names 'step-6', which is not there\. Delete the folder"):
        settle(stage_job)


def test_going_back_to_an_older_checkpoint_sets_the_newer_ones_aside(stage_job, unbroken):
    """With one checkpoint to keep and a smaller interval, numbers above the resumed one would outlive `latest`."""
    (stage_job.run_folder / "latest").write_text("step-3")
    (line,) = settle(stage_job)
    assert "step-6 not continued from; moved to .step-6.old-1" in line
    again = job(stage_job.layout.root, keep_checkpoints=1, checkpoint_every=2)
    killed(again, "between latest and the metrics", 1)
    assert (again.run_folder / (again.run_folder / "latest").read_text() / "state.json").exists()
    finish(again, unbroken)


HISTORY = {
    "deleted": lambda path: path.unlink(),
    "cut": lambda path: path.write_text(path.read_text()[: len(path.read_text()) // 2]),
    "a line lost": lambda path: path.write_text("".join(path.read_text().splitlines(True)[1:])),
    "a broken line": lambda path: path.write_text(path.read_text().replace('"track"', '"tr', 1)),
    "another number": lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 5')),
}


@pytest.mark.parametrize("damage", HISTORY)
def test_a_history_that_lacks_steps_is_restored_from_the_checkpoint(stage_job, unbroken, damage):
    HISTORY[damage](stage_job.run_folder / "history.jsonl")
    (line,) = settle(stage_job)
    assert "history.jsonl lacked steps of step-6 or had other ones; restored" in line
    assert read(stage_job.run_folder) == unbroken[KEY][1][:6]


def test_steps_after_the_checkpoint_are_cut_without_a_word(stage_job, unbroken):
    with open(stage_job.run_folder / "history.jsonl", "a") as history:
        history.write('{"a line that was cut')
    assert settle(stage_job) == []
    assert read(stage_job.run_folder) == unbroken[KEY][1][:6]


def test_what_stopped_a_run_goes_when_it_ends_well(stage_job, unbroken):
    (stage_job.run_folder / "stopped.json").write_text("{}")
    (stage_job.run_folder / ".step-7.tmp").mkdir()
    finish(stage_job, unbroken)
    assert not (stage_job.run_folder / "stopped.json").exists()
    assert not (stage_job.run_folder / ".step-7.tmp").exists()
    line = re.search(r"first new step [\d.]+ s after the start: (.*)", (stage_job.run_folder / "log.txt").read_text())
    assert [part.rsplit(" ", 1)[0] for part in line[1].split(", ")] == [
        "imports and hashes of the inputs", "checking the checkpoint", "model", "opening documents",
        "reading the checkpoint", "first step",
    ]  # fmt: skip

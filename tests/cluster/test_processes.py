"""A program dies with its parent, and a lock dies with its program; shown with real processes."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from unifork import processes
from unifork.errors import MachineError, UniForkError
from unifork.processes import die_with_parent, exclusive, lock_path

ROOT = Path(__file__).parents[2]

CHILD = """
import sys, time
from unifork.processes import die_with_parent
die_with_parent()
print("child ready", flush=True)
time.sleep(60)
"""

PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''{CHILD}'''], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""

HOLDER = """
import sys, time
from unifork.processes import exclusive
with exclusive(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True, cwd=ROOT)


def first_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_alive(pid: int) -> bool:
    """Whether a process runs; an orphan that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a parent's death is signalled on Linux only")
def test_killed_parent_takes_child_along() -> None:
    parent = start(PARENT)
    child = int(first_line(parent))
    assert is_alive(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(child)


def test_parent_that_is_gone_already_is_noticed() -> None:
    program = "import unifork.processes as p; p._PARENT = -1; p.die_with_parent(); print('survived')"
    process = start(program)
    assert process.communicate()[0] == ""
    assert process.returncode == -signal.SIGKILL


def test_nothing_happens_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    die_with_parent()


def test_lock_of_a_living_process_is_respected_and_a_killed_one_frees_it(tmp_path: Path) -> None:
    folder = tmp_path / "codes" / "shapes"
    holder = start(HOLDER, str(folder))
    assert first_line(holder) == "held"
    message = f"{folder}: being written by process {holder.pid} on "
    with pytest.raises(UniForkError, match=message), exclusive(folder, wait_seconds=0.3):
        pass
    holder.kill()
    with exclusive(folder, wait_seconds=5):  # waits for the orphan's end
        assert lock_path(folder).read_text().startswith(f"process {os.getpid()} on ")
    holder.wait()


def test_the_lock_of_another_machine_is_waited_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file server keeps the locks of a machine that lost power for a while."""
    folder = tmp_path / "run"
    holder = start(HOLDER, str(folder))
    assert first_line(holder) == "held"
    monkeypatch.setattr(processes, "ORPHAN_SECONDS", 0.2)
    with pytest.raises(UniForkError, match=r"after 0\.2 seconds"), exclusive(folder):
        pass
    lock_path(folder).write_text("process 7 on another-machine")
    ends = threading.Timer(1, holder.kill)
    ends.start()
    with exclusive(folder):
        assert lock_path(folder).read_text().startswith(f"process {os.getpid()} on ")
    ends.join()
    holder.wait()


def test_lock_lies_beside_the_folder_and_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with exclusive(folder):
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        with pytest.raises(UniForkError, match=r"run\.lock goes away with it"), exclusive(f"{folder}/", wait_seconds=0):
            pass
    assert list(tmp_path.iterdir()) == []
    with exclusive(folder):
        pass


def test_many_processes_take_turns(tmp_path: Path) -> None:
    program = """
import sys, time
from pathlib import Path
from unifork.processes import exclusive
folder = Path(sys.argv[1])
for _ in range(10):
    with exclusive(folder, wait_seconds=30):
        mark = folder / "inside"
        folder.mkdir(exist_ok=True)
        mark.touch(exist_ok=False)
        time.sleep(0.002)
        mark.unlink()
"""
    processes = [start(program, str(tmp_path / "run")) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(MachineError, match=r"out\.lock: this file system takes no locks \(flock\): No locks available"),
        exclusive(tmp_path / "out"),
    ):
        pass

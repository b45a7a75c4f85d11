"""Programs that kill themselves with SIGKILL at a named point or at a random moment.

The product knows nothing of it: what is called at the point is replaced in the process that dies there. A
`sitecustomize` that calls `arm` does the same to processes which others start, such as Ray's workers.
"""

import os
import re
import signal
import threading
from functools import wraps
from pathlib import Path

import pyarrow.parquet as pq
from forks import SERVER, become

from unifork.config import Card
from unifork.shards.task import ShardTask

SHARD, RECORD, MANIFEST = r"-00001\b.*\.(parquet|arrow)(\.tmp-\w+)?$", r"-00001\b.*\.done$", r"^manifest\.json$"


def opened(number: int) -> str:
    """Where a file descriptor leads."""
    return os.readlink(f"/proc/self/fd/{number}")


POINTS = {
    "in the middle of the shard": (pq.ParquetWriter, "write_table", lambda writer, _: writer.where, SHARD, True),
    "after the temporary file": (os, "fsync", opened, SHARD, False),
    "before the rename": (os, "replace", lambda _, to: to, SHARD, False),
    "after the rename": (os, "replace", lambda _, to: to, SHARD, True),
    "before the record": (os, "replace", lambda _, to: to, RECORD, False),
    "after the record": (os, "replace", lambda _, to: to, RECORD, True),
    "before the manifest": (os, "replace", lambda _, to: to, MANIFEST, False),
    "after the manifest": (os, "replace", lambda _, to: to, MANIFEST, True),
    "before the page": (os, "replace", lambda _, to: to, r"^README\.md$", False),
    "before the checksums": (os, "replace", lambda _, to: to, r"^SHA256SUMS$", False),
    "among the records": (Path, "unlink", lambda path, *_: path, RECORD, True),
}
"""Named points: what is replaced (in two parts), how to tell its file, which file, and whether it is done before."""


def arm(point: str, mark: str = "") -> None:
    """Have this process killed at a point; with a mark, only where that file is not there yet."""
    owner, name, file_of, pattern, after = POINTS[point]
    original = getattr(owner, name)

    @wraps(original)
    def dying(*args, **options):
        found = re.search(pattern, Path(str(file_of(*args))).name.removeprefix("."))
        if found and not after:
            die(mark)
        result = original(*args, **options)
        if found and after:
            die(mark)
        return result

    setattr(owner, name, dying)


def die(mark: str) -> None:
    """Kill this process, leaving a mark; not where another has left it."""
    try:
        if mark:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def _program(root: str, words: tuple[str, ...], point: str | None) -> None:
    os.environ["UNIFORK_CLUSTER"] = "here.yaml"
    if point:
        arm(point)
    become(root, words, "said.txt")


def run(root: Path, words: tuple[str, ...], point: str | None = None) -> str:
    """Run `python -m words` in a root, to its end or to a point where it is killed; what it said."""
    (root / "here.yaml").write_text("name: here\n")
    process = SERVER.Process(target=_program, args=(str(root), words, point))
    process.start()
    process.join()
    output = (root / "said.txt").read_text()
    assert process.exitcode == (-signal.SIGKILL if point else 0), (words, point, output)
    return output


def _timed(seconds: float, work, *args) -> None:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()
    work(*args)


def shard(worker_class: type, card: Card, task: ShardTask) -> None:
    """Make one shard."""
    worker_class(card)(task)


def killed_after(seconds: float, work, *args) -> bool:
    """Call a function in a process that is killed after some seconds; whether that was before its end."""
    process = SERVER.Process(target=_timed, args=(seconds, work, *args))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0

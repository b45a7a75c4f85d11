"""What keeps two programs from writing one folder: dying with the parent, and a lock beside the folder. And `meet`.

In: the folder a program is about to write. Out: nothing; either the program may write, or it is told who does.

Why: `kill -9` of `dvc` leaves the stage it started running, and the next `dvc repro` would start a second
writer beside the orphan. So a stage asks the kernel to be killed with its parent (Linux), and takes a lock that
vanishes with the process, however it ends. The lock lies beside the folder (`<folder>.lock`), since what lies
inside is hashed and cached by DVC.
"""

import ctypes
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

from unifork.errors import MachineError, UniForkError, writing

LEASE_SECONDS = 180.0
"""How long the lock of a lost machine may be held: the lease of an NFS server is about 90 s by default."""
PRINT = partial(print, flush=True)
SUMS = 5
"""That `meet` takes the time of."""
ON = " on "
"""In the lock file, between the process and its machine."""
PR_SET_PDEATHSIG = 1
"""From linux/prctl.h; the signal also needs a parent that is one program, without a shell between."""

_PARENT = os.getppid()
"""The parent when this module was imported: another one later means that it has died since."""


def die_with_parent(signal_number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies. Does nothing outside Linux.

    The kernel forgets the request when the parent is already gone, so the parent is compared afterwards.
    (Strictly it is the parent's *thread* that counts: a parent must start programs from a thread that stays.)
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != _PARENT:
        os.kill(os.getpid(), signal_number)


def lock_path(folder: Path | str) -> Path:
    """Where the lock of a folder lies: beside it, so that it is no part of the folder."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(folder.name + ".lock")


@contextmanager
def exclusive(
    folder: Path | str, wait_seconds: float = 10.0, say: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Be the only program that writes a folder, on all machines that share it where `flock` holds across machines.

    Waits a few seconds, since an orphan may be about to die, then raises UniForkError naming the folder and
    the process that holds it. The operating system frees the lock when the holder ends, even by `kill -9`; that of
    another machine is waited for as long as a file server may keep the lock of a client that died (LEASE_SECONDS).
    say: gets a line where that is long; without it the line is printed.
    """
    path = lock_path(folder)
    if path.parent.exists() and os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        yield  # nobody writes there: a finished folder is read, and who has to write says that he cannot
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    started, elsewhere = time.monotonic(), False
    while (handle := _try_lock(path)) is None:
        holder, before = holder_of(path) or "another process", elsewhere
        elsewhere = ON in holder and not holder.endswith(ON + socket.gethostname())
        patience = max(LEASE_SECONDS, wait_seconds) if elsewhere else wait_seconds
        if elsewhere and not before:
            (say or PRINT)(
                f"{folder}: locked by {holder}; waiting up to {patience:g} s, since that machine may be lost"
            )
        if time.monotonic() - started >= patience:
            raise UniForkError(
                f"{folder}: being written by {holder}, which still lives after {patience:g} seconds. "
                f"Wait for it or stop it, then start again; the lock {path} goes away with it"
            )
        time.sleep(0.1)
    try:
        with writing(path):  # which a full disk refuses first
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()}{ON}{socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held: nobody can lock the file of a dead name
        os.close(handle)


def _try_lock(path: Path) -> int | None:
    """The descriptor of the locked file, or None when another process holds it."""
    with writing(path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(path)):
            return handle
    except (BlockingIOError, FileNotFoundError):  # held; or removed by its holder between our open and our lock
        pass
    except OSError as error:
        os.close(handle)
        raise MachineError(
            f"{path}: this file system takes no locks (flock): {error.strerror}. Mount it with locks, or keep the "
            f"experiment on one that has them (docs/clusters.md)"
        ) from None
    os.close(handle)
    return None


def holder_of(path: Path) -> str:
    """Who wrote a lock file, as far as it says. Reads alone: a look must not hinder who wants the lock."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def is_held(path: Path) -> bool:
    """Whether a lock is held; one left by a dead program is held by nobody. Holds it for a moment itself."""
    try:
        with open(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone while we looked; a file system without locks
        pass
    return False


def meet(rank: int, workers: int, backend: str, folder: str, numbers: int = 1024) -> float:
    """Add numbers up over processes, each of which calls this; here, where starting one imports nothing but torch.

    backend: `gloo`, or `nccl` with a GPU for each. folder: an empty one that all see. Returns GB/s: bytes of the
    numbers by seconds of a sum. Raises RuntimeError for a wrong sum.
    """
    import torch  # noqa: PLC0415

    gpu = backend == "nccl"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=workers, timeout=timedelta(seconds=60)
    )
    value = torch.full((numbers,), rank + 1.0, device=device)
    torch.distributed.all_reduce(value)  # connects
    right, first = bool((value == workers * (workers + 1) / 2).all()), float(value[0])
    started = time.perf_counter()
    for _ in range(SUMS):
        torch.distributed.all_reduce(value)
    float(value[0])  # waits for a device
    seconds = time.perf_counter() - started
    torch.distributed.destroy_process_group()
    if not right:
        raise RuntimeError(f"the sum of 1 to {workers} came out as {first}")
    return SUMS * value.nbytes / seconds / 1e9

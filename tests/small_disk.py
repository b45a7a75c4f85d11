"""A folder on a small disk, in a process that sees it alone."""

import ctypes
import subprocess
from pathlib import Path

import pytest

CLONE_NEWNS = 0x20000


def mounts() -> bool:
    """Whether this process may make a mount namespace."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not mounts(), reason="may not make a mount namespace")


def mount(folder: Path, size: str | int) -> None:
    """Put a folder on an empty disk of some bytes (`10m`), for this process and those it starts."""
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

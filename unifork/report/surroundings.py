"""What a result was made with: library versions, git revision, machine. Nothing in, plain facts out.

No host name, user or absolute path is read: the page is meant to be shown around. Everything here may be
unknown (no git, no /proc), and then says so instead of failing.
"""

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "ray", "dvc", "pyarrow", "pillow", "numpy")
"""Distributions whose versions can change a result."""

UNKNOWN = "not known"


@dataclass(frozen=True)
class Surroundings:
    """Where the page was written; the stages ran here too unless a cluster file sent them elsewhere."""

    versions: dict[str, str]
    revision: str
    cpu: str
    cores: int
    memory: str
    gpus: tuple[str, ...]
    system: str


def surroundings(root: Path) -> Surroundings:
    """The facts of this machine and of the checkout that holds `root`."""
    return Surroundings(
        versions={"Python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        revision=revision(root),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=_memory(),
        gpus=_gpus(),
        system=f"{platform.system()} {platform.machine()}",
    )


def revision(root: Path) -> str:
    """The commit of a checkout and whether its tracked files differ from it, in words."""
    commit = _said("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return "not a git checkout"
    # the lock file is rewritten by the very `dvc repro` that writes this page
    paths = ("--", ":/", ":(exclude,top)dvc.lock")
    changed = _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", *paths)
    if changed is None:
        return commit
    files = len(changed.splitlines())
    return f"{commit} with uncommitted changes in {files} file{'s' * (files != 1)}" if files else f"{commit}, clean"


def _said(*command: str) -> str | None:
    """What a program printed; None when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or UNKNOWN


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return UNKNOWN


def _gpus() -> tuple[str, ...]:
    said = _said("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    return tuple(said.splitlines()) if said else ()

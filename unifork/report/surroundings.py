"""What a result was made with: library versions, git revision, machine. Nothing in, plain facts out.

No host name, user or absolute path is read: the page is meant to be shown around. Where there is no git, no /proc or
no graphics card, that is what it says.
"""

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "ray", "dvc", "pyarrow", "pillow", "numpy")
"""Distributions whose versions can change a result."""


def surroundings(root: Path) -> dict[str, Any]:
    """The facts of this machine, where the page is written, and of the checkout that holds `root`."""
    gpus = _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "revision": revision(root),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "gpus": (gpus or "").splitlines(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def installed() -> dict[str, str]:
    """The distributions that Python imports with their versions, in one spelling, without the build (`+cpu`)."""
    every = reversed([*distributions()])  # the first of a name is imported
    return {found.name.lower().replace("_", "-"): found.version.partition("+")[0] for found in every}


def machine(here: Mapping[str, Any]) -> str:
    """The facts that a record of a run has of its machine, in words."""
    return f"{here['cpu']}, {here['cores']} cores"


def revision(root: Path) -> str:
    """The commit of a checkout and whether its tracked files differ from it, in words."""
    commit = _said("git", "-C", str(root), "rev-parse", "HEAD")
    if commit is None:
        return "not a git checkout"
    paths = ("--", ":/", ":(exclude,top)dvc.lock")  # which the very `dvc repro` that writes this page writes anew
    changed = _said("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", *paths)
    files = len((changed or "").splitlines())
    return f"{commit} with uncommitted changes in {files} file{'s' * (files != 1)}" if files else f"{commit}, clean"


def _said(*command: str) -> str | None:
    """What a program printed; None when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    table = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: *(.*?) *$", table.read_text() if table.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or "not known"

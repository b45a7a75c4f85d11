"""Processes forked from one that has imported what they need, so that a process costs no start.

The server is started by the first process; the environment of that moment is that of all.
"""

import multiprocessing
import os
import runpy
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

LIBRARY = [
    "cli", "documents.prepare", "image_tokenizer.encode", "publish.publication", "sources.web.download",
    "training.stage",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["pytest", "pandas", "pipelines.download", *(f"unifork.{name}" for name in LIBRARY)]
SLOW = [
    "deepspeed", "dvc.cli.parser", "dvc.repo", "dvc.repo.reproduce", "dvc.stage.run", "pipelines.analyze",
    "pipelines.report", "unifork.inference",
]  # fmt: skip
"""What slow tests need, too."""


def preload(*, slow: bool) -> None:
    """Choose what the server imports, before it starts."""
    SERVER.set_forkserver_preload([*PRELOADED, *(SLOW if slow else [])])


def program(root: Path, words: tuple[str, ...], *, context: Any = SERVER, **environment: str) -> tuple[int, str]:
    """`python -m words` in a root, in a forked process: its exit code, and output and errors as they came."""
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(target=_program, args=(str(root), words, f"{folder}/printed", environment))
        process.start()
        process.join()
        return process.exitcode or 0, Path(folder, "printed").read_text()


def _program(root: str, words: tuple[str, ...], printed: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if words[0] == "dvc":
        from dvc.stage import run

        run._run = partial(stage, multiprocessing.get_context("fork"))
    become(root, words, printed)


def stage(context: Any, _: str, command: str, *, cwd: str, env: dict[str, str], **__: object) -> None:
    """What DVC calls with the command of a stage: forked, where a program of its own would import for seconds."""
    from dvc.stage.exceptions import StageCmdFailedError

    python, option, *words = command.split()
    assert (python, option) == ("python", "-m"), command
    code, output = program(Path(cwd), tuple(words), context=context, **env)
    print(output, end="", flush=True)
    if code:
        raise StageCmdFailedError(command, code)


def become(root: str, words: tuple[str, ...], printed: str) -> None:
    """Turn this process into `python -m words` in a root, with what it says in a file."""
    from unifork import processes

    os.chdir(root)
    processes._PARENT = os.getppid()  # imported by the process this one was forked from
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.argv = list(words)
    warnings.filterwarnings("ignore", "'.*' found in sys.modules")  # as what was imported before is
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)

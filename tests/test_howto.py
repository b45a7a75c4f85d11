"""docs/howto.md: ten questions, each with commands that exist, options that they have and files that load."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from dvc.cli import parse_args
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import Cluster, parse, read_yaml
from unifork.experiments import resolve

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/howto.md").read_text()
BLOCK = re.compile(r"^```(console|console elsewhere|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Kind and text of every block of the page, in order."""
    return BLOCK.findall(PAGE)


def files() -> dict[str, str]:
    """The files that the page shows, by the path in their first line."""
    return {text.partition("\n")[0].removeprefix("# "): text for kind, text in blocks() if kind == "yaml"}


def commands() -> list[str]:
    """Every single command, without what the shell does around it."""
    lines = (line for kind, text in blocks() if kind != "yaml" for line in text.splitlines())
    parts = (part for line in lines for part in re.split(r" && |; | & ", line.partition(" # ")[0]))
    return [re.sub(r"^(\w+=\S+ )*", "", part.strip()) for part in parts]


def test_ten_questions_have_commands():
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    assert [section for section in sections if not (section.startswith("How do I") and BLOCK.search(section))] == []
    assert len(sections) == 10


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith(("unifork", "watch"))])
def test_options_exist(command):
    words = shlex.split(command)
    words = words[words.index("unifork") + 1 :]
    done = CliRunner().invoke(app, [*words, "--help"])  # words before it are parsed first
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("dvc")])
def test_dvc_has_these_options(command):
    assert parse_args(shlex.split(command)[1:]).func


def test_no_other_programs_are_needed():
    others = {line.split()[0] for line in commands() if not line.startswith(("unifork", "dvc"))}
    assert others <= {"cp", "export", "git", "kill", "ray", "sleep", "tail", "tensorboard", "wait", "watch"}
    assert importlib.util.find_spec("tensorboard")


@pytest.mark.parametrize("path", files())
def test_files_load(path, tmp_path):
    if path.startswith("clusters/"):
        assert parse(Cluster, yaml.safe_load(files()[path]), path).train.workers == 2
        return
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments")
    for name, text in files().items():  # which may extend each other
        if name.startswith("experiments/"):
            (tmp_path / name).write_text(text)
    assert resolve(Path(path).stem, tmp_path / "experiments", ROOT / "datasets").runs


def test_cluster_files_that_are_named_load():
    named = set(re.findall(r"clusters/[\w-]+\.yaml", PAGE)) - set(files())
    assert named == {"clusters/one-gpu.yaml"}
    assert parse(Cluster, read_yaml(ROOT / "clusters/one-gpu.yaml"), "one-gpu").train.gpus == 1

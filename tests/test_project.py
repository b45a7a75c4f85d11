"""The project's own rules: imports go down, files load, the lock is fit for strangers, the README is true."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from unifork.cli import app
from unifork.config import Card, Experiment, load_card
from unifork.experiments import params_text, resolve

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"errors"},
    {"vocabulary", "layout", "randomness", "registry", "processes", "weights", "stores", "devices", "figures"},
    {"config", "batch", "identity", "images"},
    {"shards", "jobs", "models"},
    {"sources"},
    {"filters"},
    {"image_tokenizer", "documents"},
    {"assembly", "inference", "inspection", "cluster"},
    {"library"},
    {"training", "evaluation"},
    {"shapes", "analysis", "reference"},
    {"report", "planning", "serving"},
    {"publish"},
    {"experiments", "doctor", "nodes"},
    {"commands"},
    {"cli", "pipelines"},
]
"""A module imports only from levels below its own, or from its own package."""
RAY_ALLOWED = {"unifork/cluster.py", "unifork/training/launch.py", "unifork/jobs.py"}


def sources():
    return [p for folder in ("unifork", "pipelines") for p in (ROOT / folder).rglob("*.py")]


def part_of(module: str) -> str:
    names = module.split(".")
    return names[0] if names[0] == "pipelines" or len(names) == 1 else names[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_go_down_only():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    faults = []
    for path in sources():
        part = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if part in ("__init__", "unifork"):
            continue
        for module in imports(path):
            if not module.startswith(("unifork.", "pipelines.")):
                continue
            other = part_of(module)
            if other != part and other in level and level[other] >= level[part]:
                faults.append(f"{path.relative_to(ROOT)} imports {module}")
    assert faults == []


def test_ray_is_imported_in_three_places_only():
    users = {str(p.relative_to(ROOT)) for p in sources() if any(m.partition(".")[0] == "ray" for m in imports(p))}
    assert users <= RAY_ALLOWED


def test_files_beside_the_code_are_installed_with_it():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in (ROOT / "unifork").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    others = [path for path in files if path.suffix != ".py" and not any(map(path.match, settings))]
    assert others == []
    assert (ROOT / "unifork/py.typed").exists()  # people's type checkers read the library


def test_datasets_holds_no_python():
    """Otherwise transformers would take the folder for the library of the same name."""
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_every_file_a_user_edits_loads():
    for path in (ROOT / "datasets").glob("*.yaml"):
        assert isinstance(load_card(path.stem, ROOT / "datasets"), Card)
    for path in (ROOT / "experiments").glob("*.yaml"):
        experiment = resolve(path.stem, ROOT / "experiments", ROOT / "datasets")
        assert experiment.runs
        assert Experiment.model_validate(yaml.safe_load(params_text(experiment))) == experiment


def test_the_committed_params_are_the_demo():
    assert (ROOT / "params.yaml").read_text() == params_text(resolve("demo", ROOT / "experiments", ROOT / "datasets"))


def test_no_file_is_long():
    every = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in every if (n := len(p.read_text().splitlines())) > 400}
    assert long == {}


def test_the_lock_is_fit_for_strangers():
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.!]+", line) for line in lines), "only NAME==VERSION"
    names = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert "torch==2.13.0" in lines
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    locked = [requirement for name in ("demo", "dev", "deepspeed", "lora", "s3", "web") for requirement in extras[name]]
    for requirement in [*project["dependencies"], *locked]:
        assert re.split(r"[\[<>=;]", requirement)[0].lower() in names | {"unifork"}, requirement
    assert int(next(line for line in lines if line.startswith("pandas==")).split("==")[1].split(".")[0]) < 3
    assert "flash-attn" not in names
    assert all("flash-attn" not in " ".join(extra) for name, extra in extras.items() if name != "flash")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_commands_of_the_pages_exist(page):
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"\bmake ([a-z]+)", text):
        assert target in targets
    programs = {path.stem for path in (ROOT / "pipelines").glob("*.py")}
    for program in re.findall(r"python -m pipelines\.(\w+)", text):
        assert program in programs
    commands = set(typer.main.get_command(app).commands)
    for command in re.findall(r"(?:^|`)unifork (\w+)", text, re.MULTILINE):
        assert command in commands
    for path in re.findall(r"\]\(([a-z][\w/.-]+)\)", text):
        assert (ROOT / path).exists(), path

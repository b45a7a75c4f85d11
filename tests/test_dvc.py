"""`dvc.yaml` tells DVC what each program reads: the versions of its code, its parameters, its folders."""

import ast
import shutil
from pathlib import Path

import pytest
import yaml
from versions import COVERS, covered, files

from unifork.config import FilterRule, load_card
from unifork.errors import ConfigError
from unifork.experiments import resolve
from unifork.experiments.followed import followed

ROOT = Path(__file__).parent.parent
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
IMPORTED_BY_NAME = {
    "pipelines/download.py": ["unifork/sources/*.py", "unifork/shapes/source.py"],
    "pipelines/image_tokenizer.py": ["unifork/image_tokenizer/readers.py", "unifork/shapes/detector.py"],
    **{
        f"pipelines/{name}.py": [
            "unifork/evaluation/understanding/*.py",
            "unifork/evaluation/generation/[!n]*.py",  # `examine` alone loads networks
            "unifork/shapes/generation.py",
            "unifork/shapes/understanding.py",
        ]
        for name in ("items", "score")
    },
}
"""What a program imports only when a card or an experiment names it; tables of names import nothing by themselves."""


def stage(name: str) -> dict:
    return STAGES[name].get("do", STAGES[name])


def file_of(module: str) -> Path | None:
    path = ROOT / Path(*module.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.exists():
            return candidate
    return None


def closure(path: Path, seen: set[Path]) -> set[Path]:
    """The project's files that a file imports, directly or not."""
    if path in seen or path == ROOT / "unifork/__init__.py":  # what it imports it does for people's own programs
        return seen
    seen.add(path)
    for named in files(IMPORTED_BY_NAME.get(path.relative_to(ROOT).as_posix(), [])):
        closure(named, seen)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.startswith(("unifork", "pipelines")) and (found := file_of(name)):
                closure(found, seen)
    return seen


def versions_of(name: str) -> dict[str, str]:
    """The version constants among a stage's parameters, with the files they are read from."""
    places = (entry for entry in stage(name)["params"] if isinstance(entry, dict))
    pairs = [(name, file) for place in places for file, names in place.items() for name in names]
    return {name: file for name, file in pairs if name.endswith("_VERSION")}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_follows_the_versions_of_the_code_it_imports(name):
    """Every file that its program imports is covered by one of the stage's versions, and each of them is needed."""
    program = stage(name)["cmd"].split()[2].removeprefix("pipelines.")
    assert stage(name)["cmd"].startswith("python -m pipelines.")
    listed = versions_of(name)
    assert listed == {constant: COVERS[constant][0] for constant in listed}
    imported = closure(ROOT / "pipelines" / f"{program}.py", set())
    needed = set()
    for path in sorted(imported):
        constants = {constant for constant in COVERS if path in covered(constant)}
        assert not constants or constants & set(listed), f"dvc.yaml: {name}: {path.relative_to(ROOT)}: add {constants}"
        if len(constants & set(listed)) == 1:
            needed |= constants & set(listed)
    assert needed == set(listed), f"dvc.yaml: {name}: take out {set(listed) - needed}"


@pytest.mark.parametrize("name", sorted(STAGES))
def test_no_stage_depends_on_files_of_code(name):
    assert not [dep for dep in stage(name)["deps"] if dep.startswith(("unifork", "pipelines"))]


def test_what_a_job_can_go_on_from_is_kept():
    for name in ("download", "filter", "encode", "prepare", "answer"):
        assert all(next(iter(out.values()))["persist"] for out in stage(name)["outs"])


def test_an_unknown_name_in_an_experiment_is_an_error(tmp_path):
    (tmp_path / "wrong.yaml").write_text("extends: demo\nvariants: {unifork: {stages: [s2-pretain]}}\n")
    (tmp_path / "demo.yaml").write_text((ROOT / "experiments/demo.yaml").read_text())
    with pytest.raises(ConfigError, match=r"wrong\.yaml: variants\.unifork\.stages.*'s2-pretain'.*'s2-pretrain'"):
        resolve("wrong", tmp_path, ROOT / "datasets")
    (tmp_path / "loop.yaml").write_text("extends: loop\n")
    with pytest.raises(ConfigError, match="extends itself"):
        resolve("loop", tmp_path, ROOT / "datasets")
    with pytest.raises(ConfigError, match=r"unknown experiment 'dem'.*Did you mean 'demo'"):
        resolve("dem", tmp_path, ROOT / "datasets")


def test_dvc_follows_the_files_that_a_card_names():
    cards = {path.stem: load_card(path.stem, ROOT / "datasets") for path in (ROOT / "datasets").glob("*.yaml")}
    found = {name: followed(card, f"datasets/{name}.yaml") for name, card in cards.items()}
    assert found["sa1b"].source == "archives/sa1b"
    assert found["coyo"].source == "archives/coyo"
    assert found["unsplash"].source == "archives/unsplash"  # named by a glob
    for name, paths in found.items():  # where it names none, the card again: DVC wants a path
        assert paths.others == f"datasets/{name}.yaml"
    assert found["shapes"].source == "datasets/shapes.yaml"
    assert found["emoji"].lists == "datasets/emoji.yaml"
    rules = (
        FilterRule(rule="takedown", options={"file": "lists/takedown.txt"}),
        FilterRule(rule="near_benchmark", options={"files": "lists/benchmarks/*.tar"}),
        FilterRule(rule="duplicates", options={"against": ["coyo"]}),
    )
    strict = followed(cards["coyo"].model_copy(update={"filters": rules}), "datasets/coyo.yaml")
    assert (strict.lists, strict.others) == ("lists", "data/raw")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"files": "$WHERE/a.tar"}, "sa1b"),
        ({"files": "/mnt/a.tar", "captions": "/mnt/b"}, "/mnt"),
        ({"files": "a/b.tar", "captions": "c"}, "one folder"),
        ({"files": "*.tar"}, "one folder"),
        ({"files": "/mnt/a", "captions": "c"}, "one folder"),
    ],
)
def test_one_folder_is_followed_or_none(options, found):
    card = load_card("sa1b", ROOT / "datasets")
    card = card.model_copy(update={"source": card.source.model_copy(update={"options": options})})
    if found == "one folder":
        with pytest.raises(ConfigError, match=r"sa1b: source: .*DVC follows one folder"):
            followed(card, "sa1b")
    else:
        assert followed(card, "sa1b").source == found


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"source": {"kind": "emojis"}}, r"card emoji: source\.kind: .*Did you mean 'emoji'"),
        ({"source": {"kind": "emoji", "options": {"file": "x"}}}, r"card emoji: source\.options: unknown key"),
        (
            {"filters": [{"rule": "min_side", "options": {"pixel": 48}}]},
            r"card emoji: filters\[0\]\.options: .*'pixels'",
        ),
    ],
)
def test_a_wrong_card_is_an_error_before_anything_runs(tmp_path, changed, found):
    shutil.copytree(ROOT / "datasets", tmp_path / "datasets")
    card = yaml.safe_load((ROOT / "datasets/emoji.yaml").read_text())
    (tmp_path / "datasets/emoji.yaml").write_text(yaml.safe_dump({**card, **changed}))
    with pytest.raises(ConfigError, match=found):
        resolve("demo", ROOT / "experiments", tmp_path / "datasets")

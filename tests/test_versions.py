"""One rule for "made by other code": a constant beside the code, in fingerprints and in DVC's parameters."""

import json
import re
import shutil

import pytest
import yaml
from versions import COVERS, DECIDES_NOTHING, RECORDED, ROOT, covered, digest, faults, files, state, version

STAGES_OF = {
    "VOCABULARY_VERSION": "download filter image_tokenizer text_tokenizer encode prepare init train items answer "
    "examine text score analyze report",
    "DOWNLOAD_VERSION": "download filter items examine score report",
    "WEB_VERSION": "download",
    "WORLD_VERSION": "download image_tokenizer items score",
    "FILTER_VERSION": "download filter",
    "MEASURE_VERSION": "filter",
    "SIGNATURES_VERSION": "filter",
    "TOKENIZER_VERSION": "image_tokenizer encode init items answer score analyze report",
    "TEXT_TOKENIZER_VERSION": "text_tokenizer",
    "ENCODE_VERSION": "encode",
    "DOCUMENTS_VERSION": "text_tokenizer prepare init train answer text analyze report",
    "MODEL_VERSION": "init train answer text analyze report",
    "TRAIN_VERSION": "train report",
    "ITEMS_VERSION": "items analyze examine score report",
    "ANSWER_VERSION": "answer report",
    "EXAMINE_VERSION": "examine",
    "SCORE_VERSION": "score report",
    "TEXT_VERSION": "text",
    "ANALYZE_VERSION": "analyze report",
    "REPORT_VERSION": "report",
}
"""What DVC runs again when a constant is raised, beside all that follows from it."""


def test_changed_code_is_recorded_with_its_version():
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    found = list(faults(recorded, state()))
    assert not found, "\n".join(["", *found, "record with: python tests/versions.py"])


def test_what_has_changed_is_said():
    before = {"X_VERSION": {"version": 1, "digest": "a"}, "REPORT_VERSION": {"version": 1, "digest": "a"}}
    now = {"X_VERSION": {"version": 2, "digest": "b"}, "REPORT_VERSION": {"version": 1, "digest": "b"}}
    silent, raised = faults(before, now)
    assert "if results change, raise REPORT_VERSION in unifork/report/build.py" in silent
    assert raised.startswith("X_VERSION: ")
    assert list(faults(before, before)) == []


def test_every_file_has_a_version_or_a_reason_to_need_none():
    every = files(["unifork/**/*.py", "pipelines/*.py"])
    versioned, exempt = {path for name in COVERS for path in covered(name)}, set(files(list(DECIDES_NOTHING)))
    assert [str(path.relative_to(ROOT)) for path in every if path not in versioned | exempt] == []
    assert [str(path.relative_to(ROOT)) for path in versioned & exempt] == []


def test_every_constant_stands_in_the_file_that_it_covers_alone():
    for name, (home, _) in COVERS.items():
        assert version(name) >= 1
        assert sum(ROOT / home in covered(other) for other in COVERS) <= 2, home
    every = "".join(path.read_text() for path in files(["unifork/**/*.py"]))
    assert set(re.findall(r"^([A-Z_]+_VERSION) = \d", every, re.MULTILINE)) == set(COVERS)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("import math\n", "import math  # a comment\n\n\n", False),
        ('"""The order of all', '"""Another docstring of all', False),
        ("TRAIN_VERSION = ", "TRAIN_VERSION = 9", False),
        ("warmup_steps) if", "warmup_steps + 1) if", True),
    ],
)
def test_comments_and_docstrings_change_nothing_and_expressions_do(tmp_path, old, new, changes):
    for path in covered("TRAIN_VERSION"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    before = digest("TRAIN_VERSION", tmp_path)
    changed = [path for path in tmp_path.rglob("*.py") if old in path.read_text()]
    assert changed
    for path in changed:
        path.write_text(path.read_text().replace(old, new))
    assert (digest("TRAIN_VERSION", tmp_path) != before) == changes


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A DVC repository of the demo in which everything was made, from the real `dvc.yaml` and `params.yaml`."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("repository")
    for name in ("dvc.yaml", "params.yaml", "datasets", "unifork"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, root / name)
    images, card = "answers/unifork/shapes-generation", "datasets/evals/README.md"  # which the demo does not use
    entry = {"name": "x", "benchmark": "geneval", "images": images, "networks": card, "out": f"{images}.found"}
    params = yaml.safe_load((root / "params.yaml").read_text())
    text = {"variant": "unifork", "benchmark": "text-0shot", "model": "models/unifork-s3", "follows": card}
    (root / "params.yaml").write_text(
        yaml.safe_dump(params | {"examined": {"x": entry}, "text_runs": {"unifork-text-0shot": text}})
    )
    (root / "data/evals/geneval").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        repo = Repo.init(no_scm=True)
        for stage in repo.index.stages:
            parts = [dep for dep in stage.deps if str(dep).startswith("data/codes/")]  # of what encode makes
            for output in (*stage.outs, *parts):
                path = root / str(output)
                folder = path if not path.suffix else path.parent
                folder.mkdir(parents=True, exist_ok=True)
                (path if path.suffix else path / "made").write_text(str(output))
        repo.commit(force=True)
        repo.close()
        yield root


def changed_stages():
    """What `dvc status` says of each stage: the parameters that have changed."""
    from dvc.repo import Repo

    with Repo() as repo:
        return {
            name: {key for reason in reasons for file in reason["changed deps"].values() for key in file}
            for name, reasons in repo.status().items()
        }


def reached():
    """The stages of `dvc.yaml` that are to be run again: those that have changed, and what follows from them."""
    from dvc.repo import Repo

    changed = set(changed_stages())
    with Repo() as repo:
        graph = {stage.addressing: stage for stage in repo.index.graph}
        follow = {name: repo.index.graph.predecessors(stage) for name, stage in graph.items()}
        waiting = list(changed)
        while waiting:
            found = {stage.addressing for stage in follow[waiting.pop()]} - changed
            changed |= found
            waiting += found
    return {name.partition("@")[0] for name in changed}


@pytest.mark.slow  # for DVC
def test_a_training_seed_makes_runs_again_and_a_data_seed_everything(repository):
    plain = yaml.safe_load((repository / "params.yaml").read_text())
    trained = {"init", "train", "answer", "examine", "text", "score", "analyze", "report"}
    assert reached() == set()
    variants = {name: variant | {"seed": 7} for name, variant in plain["variants"].items()}
    (repository / "params.yaml").write_text(yaml.safe_dump(plain | {"training_seed": 7, "variants": variants}))
    assert reached() == trained
    (repository / "params.yaml").write_text(yaml.safe_dump(plain | {"data_seed": 7}))
    assert reached() == set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    (repository / "params.yaml").write_text(yaml.safe_dump(plain))


@pytest.mark.slow  # for DVC
def test_a_comment_makes_nothing_again_and_a_raised_version_what_follows_it(repository):
    assert changed_stages() == {}
    homes = {ROOT / home for home, _ in COVERS.values()}
    for path in homes:
        copy = repository / path.relative_to(ROOT)
        copy.write_text("# a comment\n" + copy.read_text() + "\nlater = 1\n")
    assert changed_stages() == {}
    for path in homes:
        copy = repository / path.relative_to(ROOT)
        copy.write_text(re.sub(r"^([A-Z_]+_VERSION) = \d+$", r"\1 = 99", copy.read_text(), flags=re.MULTILINE))
    found = {name: set() for name in COVERS}
    for stage, constants in changed_stages().items():
        for name in constants:
            found[name].add(stage.partition("@")[0])
    assert found == {name: set(STAGES_OF.get(name, "").split()) for name in COVERS}


def test_every_stage_follows_the_vocabulary():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert set(STAGES_OF["VOCABULARY_VERSION"].split()) == set(stages)

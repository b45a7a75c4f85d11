"""DVC remotes: what one checkout made, another pulls and uses; a new input shard costs one shard."""

import io
import os
import re
import shutil
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import pytest
import yaml
from forks import SERVER, stage
from tiny import REPOSITORY, bytes_of, fresh_tokenizer, write_experiment, write_model

from unifork.documents.text_tokenizer import TextTokenizer
from unifork.shards.manifest import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")]  # inside DVC
STAGES = ("download@shapes", "filter@shapes", "text_tokenizer")
BENCHMARK = "shapes-understanding"
MADE, EVALUATION = ("image_tokenizer", "init@unifork"), f"answer@unifork-{BENCHMARK}"
ANSWERS = f"answers/unifork/{BENCHMARK}"
FILES = ("lists/urls.tsv", "lists/fetched.tsv")
ROWS, SHARD_ROWS = 24, 8


@pytest.fixture(scope="module")
def dvc(request):
    """Runs a DVC command in a folder, in this process (each of its own would import for seconds), and forks stages."""
    from dvc.cli import main

    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("UNIFORK_CLUSTER", raising=False)
        patched.setattr("dvc.stage.run._run", partial(stage, SERVER))

        def run(folder: Path, *words: str) -> None:
            patched.setenv("PYTHONPATH", str(folder))
            before = os.getcwd()
            try:
                assert main(["--cd", str(folder), *words]) == 0, words
            finally:
                os.chdir(before)

        yield run


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *who, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def origin(tmp_path_factory, dvc, s3_server) -> Path:
    """A checkout that ran some stages, brought two files in, and pushed to a folder and to S3.

    The model that is evaluated is that of step 0, made here in less time than stages would need.
    """
    import boto3

    base = tmp_path_factory.mktemp("remotes")
    root = base / "origin"
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", "unifork", "pipelines"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, root / name)
    changes = {
        "datasets": {"shapes": {"rows": ROWS, "shard_rows": SHARD_ROWS}},
        "benchmarks": {BENCHMARK: {"options": {"samples": 2}}},
    }
    experiment = write_experiment(root, changes)
    model = "models/unifork-init"
    text = (root / "params.yaml").read_text().replace("model: models/unifork-s3", f"model: {model}")
    (root / "params.yaml").write_text(text)
    git(root, "init", "-q")
    (root / "lists").mkdir()
    (root / FILES[0]).write_text("url\tcaption\nhttps://example.org/1.png\ta red circle\n")
    (base / "elsewhere.tsv").write_text("url\tcaption\n")
    dvc(root, "add", "-q", FILES[0])
    dvc(root, "import-url", "-q", str(base / "elsewhere.tsv"), FILES[1])
    dvc(root, "repro", *STAGES)
    words = TextTokenizer(root / "tokenizers/text")
    write_model(experiment, fresh_tokenizer(experiment, root / "tokenizers/image"), words, root / model, root)
    for name in MADE:
        dvc(root, "commit", "-q", "-f", name)
    dvc(root, "repro", EVALUATION)
    boto3.client("s3").create_bucket(Bucket="dvc")
    dvc(root, "remote", "add", "-q", "-d", "disk", str(base / "disk"))
    dvc(root, "remote", "add", "-q", "s3", "s3://dvc/unifork")
    dvc(root, "remote", "modify", "s3", "endpointurl", s3_server)
    for remote in ("disk", "s3"):
        dvc(root, "push", "-q", "-r", remote)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "all")
    return root


@pytest.mark.parametrize("remote", ["disk", "s3"])
def test_another_clone_pulls_and_uses_what_was_made(origin, dvc, tmp_path, capfd, remote):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    assert not (clone / "data").exists()
    dvc(clone, "pull", "-q", "-r", remote, *STAGES, *(f"{file}.dvc" for file in FILES))
    capfd.readouterr()
    for word in ("status", "repro"):
        dvc(clone, word, *STAGES)
        output = capfd.readouterr().out
        assert "up to date" in output
        assert "shards" not in output  # no program ran; what DVC logs goes elsewhere
    pulled = [f"data/{folder.name}" for folder in (clone / "data").iterdir() if folder.is_dir()]
    assert {"data/raw", "data/filtered"} <= set(pulled)
    for folder in (*pulled, "tokenizers/text", "lists"):
        assert bytes_of(clone / folder) == bytes_of(origin / folder)
    assert read_manifest(clone / "data/filtered/shapes").rows == ROWS
    tokenizer = TextTokenizer(clone / "tokenizers/text")
    assert tokenizer.decode(tokenizer.encode("a red circle")) == "a red circle"


def test_another_clone_evaluates_the_model_it_pulled(origin, dvc, tmp_path, capfd):
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "-q", str(origin), str(clone))
    dvc(clone, "pull", "-q", *STAGES, *MADE)
    assert not (clone / ANSWERS).exists()
    capfd.readouterr()
    dvc(clone, "repro", EVALUATION)
    output = capfd.readouterr().out  # of programs; what DVC logs goes elsewhere
    assert {line.partition(":")[0] for line in output.splitlines() if ": " in line} == {
        f"data/evals/{BENCHMARK}",
        ANSWERS,
    }
    answers = bytes_of(clone / ANSWERS)
    assert set(answers) == {"manifest.json", "part-00000.parquet"}
    assert answers == bytes_of(origin / ANSWERS)
    dvc(clone, "status", *STAGES, *MADE, EVALUATION)
    assert "up to date" in capfd.readouterr().out
    assert subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, check=True).stdout == b""


def test_one_more_archive_costs_one_shard(origin, dvc, tmp_path, capfd):
    """Of a set of archives: `dvc repro` sees the new one, and only its shards are made."""
    root = tmp_path / "grown"
    shutil.copytree(origin, root, symlinks=True)
    card = yaml.safe_load((root / "datasets/blip3o_60k.yaml").read_text())
    card |= {"name": "archived", "source": {"kind": "pairs", "options": {"files": "archives/archived/*.tar"}}}
    (root / "datasets/archived.yaml").write_text(yaml.safe_dump(card))
    images = sorted((REPOSITORY / "tests/fixtures/official_tiny/images").glob("img*.png"))

    def archive(number: int) -> None:
        place = root / "archives/archived"
        place.mkdir(parents=True, exist_ok=True)
        with tarfile.open(place / f"{number:03d}.tar", "w") as tar:
            for image in images[2 * number : 2 * number + 2]:
                tar.add(image, image.name)
                text = tarfile.TarInfo(image.with_suffix(".txt").name)
                text.size = 8
                tar.addfile(text, io.BytesIO(b"an image"))

    archive(0)
    archive(1)
    write_experiment(root, {"datasets": {"archived": {"rows": None, "shard_rows": SHARD_ROWS}}})
    dvc(root, "repro", "filter@archived")
    kept = {name: data for name, data in bytes_of(root / "data").items() if re.search(r"archived/part-.*et$", name)}
    assert len(kept) == 6
    capfd.readouterr()
    dvc(root, "repro", "filter@archived")
    assert "shards" not in capfd.readouterr().out  # no program ran
    archive(2)
    dvc(root, "repro", "filter@archived")
    output = capfd.readouterr().out
    assert re.findall(r"(\S+): 3/3 shards \((\d) kept from before\), (\d+)/\d+ rows", output) == [
        ("data/raw/archived", "2", "2"),
        ("data/measured/archived", "2", "2"),
        ("data/filtered/archived", "2", "2"),
    ]
    after = bytes_of(root / "data")
    assert {name: after[name] for name in kept} == kept

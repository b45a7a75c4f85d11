"""What DVC sees of a set: everything, or manifests alone. Bytes on disk; damage is noticed and mended in both ways."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from forks import program
from PIL import Image
from tiny import REPOSITORY, bytes_of, fresh_tokenizer, write_experiment

from unifork.experiments.tracking import write_ignore_rules

pytestmark = pytest.mark.slow
ENCODE = "encode@noise"
IMAGES, SHARD_ROWS = 12, 4


def command(root: Path, *words: str, code: int = 0) -> str:
    """Run `python -m words` in a forked process; what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended, output = program(root, words, PYTHONPATH=str(root), PATH=path, UNIFORK_CLUSTER="clusters/here.yaml")
    assert ended == code, output
    return output


@pytest.fixture(scope="module", params=["manifest", pytest.param("whole", marks=pytest.mark.soak)])
def checkout(request, tmp_path_factory) -> tuple[Path, str]:
    """A checkout with a set of 12 JPEGs of noise, which nothing makes smaller, encoded by `dvc repro`."""
    root = tmp_path_factory.mktemp(request.param)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", "unifork", "pipelines"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, root / name)
    for name in ("datasets", "experiments", "clusters"):
        shutil.copytree(REPOSITORY / name, root / name)
    (root / "clusters/here.yaml").write_text("name: here\n")
    card = yaml.safe_load((root / "datasets/blip3o_60k.yaml").read_text())
    card |= {"name": "noise", "filters": []}
    card["source"] = {"kind": "pairs", "options": {"files": "archives/noise/*.tar"}}
    (root / "datasets/noise.yaml").write_text(yaml.safe_dump(card))
    (root / "archives/noise").mkdir(parents=True)
    random = np.random.default_rng(0)
    with tarfile.open(root / "archives/noise/0.tar", "w") as tar:
        for number in range(IMAGES):
            stream = io.BytesIO()
            pixels = random.integers(0, 256, (512, 512, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(stream, "JPEG", quality=95)
            for ending, data in (("jpg", stream.getvalue()), ("txt", b"noise")):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    use = {"rows": None, "shard_rows": SHARD_ROWS, "track": request.param}
    experiment = write_experiment(root, {"datasets": {"noise": use}})
    write_ignore_rules(experiment, root / ".dvcignore")
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    command(root, "dvc", "init", "-q")
    fresh_tokenizer(experiment, root / "tokenizers/image")
    command(root, "dvc", "repro", "-q", "download@noise", "filter@noise")
    for folder in ("raw", "filtered"):
        (root / "data" / folder).mkdir(exist_ok=True)
    command(root, "dvc", "commit", "-q", "-f", "image_tokenizer")
    command(root, "dvc", "repro", ENCODE)
    return root, request.param


def test_the_bytes_of_images_lie_on_disk_once_where_manifests_are_tracked(checkout):
    root, track = checkout
    raw = sum(len(data) for data in bytes_of(root / "data/raw/noise").values())
    assert raw > IMAGES * 200_000
    everything = sum(len(data) for name in ("data", ".dvc/cache") for data in bytes_of(root / name).values())
    copies = 1 if track == "manifest" else 2  # the other one in DVC's cache
    assert copies * raw < everything < (copies + 0.6) * raw


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "sha256": lambda path: path.write_bytes(path.read_bytes()[:-300] + b"\0" + path.read_bytes()[-299:]),
}


SHORT = (("raw", "missing"),)


@pytest.mark.parametrize(
    ("stage", "problem"),
    [
        pytest.param(stage, problem, marks=() if (stage, problem) in SHORT else pytest.mark.soak)
        for stage in ("raw", "filtered", "codes")
        for problem in DAMAGES
    ],
)
def test_a_damaged_shard_is_noticed_and_mended(checkout, stage, problem):
    root, track = checkout
    before, folder = bytes_of(root / "data"), "codes/noise/crop" if stage == "codes" else f"{stage}/noise"
    victim = root / "data" / folder / "part-00001.parquet"
    victim.chmod(0o644)
    DAMAGES[problem](victim)
    if track == "manifest":
        assert "up to date" in command(root, "dvc", "status", ENCODE)
    if stage != "codes" and problem == "missing":
        line = command(root, "pipelines.encode", "noise", code=2)
        assert line.count("\n") == 1
        assert f"data/{folder}: 1 of 3 shards are not as its manifest says, first part-00001.parquet: missing" in line
    assert f"data/{folder}/part-00001.parquet: {problem}" in command(root, "unifork.cli", "verify", "data", code=2)
    command(root, "unifork.cli", "verify", "--repair", "data")
    output = command(root, "dvc", "repro", ENCODE)
    assert f"data/{folder}: 2/3 shards (2 kept from before)" in output
    assert output.count(" 3/3 shards, ") == 0
    assert bytes_of(root / "data") == before
    assert "all as the manifest says" in command(root, "unifork.cli", "verify", "data")


def test_another_clone_goes_on_from_what_it_pulls_without_making_anything(checkout, tmp_path):
    root, track = checkout
    clone = tmp_path / "clone"
    command(root, "dvc", "remote", "add", "-q", "-d", "-f", "disk", str(tmp_path / "remote"))
    command(root, "dvc", "push", "-q", ENCODE, "download@noise", "filter@noise", "image_tokenizer")
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["add", "-A"], ["commit", "-q", "-m", "all"], ["clone", "-q", ".", str(clone)]):
        subprocess.run(["git", *who, *words], cwd=root, check=True, capture_output=True)
    command(clone, "dvc", "pull", "-q", ENCODE, "download@noise", "filter@noise", "image_tokenizer", "--allow-missing")
    pulled = {name for name in bytes_of(clone / "data") if not name.endswith(".gitignore")}
    assert all(name.endswith("manifest.json") for name in pulled) == (track == "manifest")
    for words in (("--allow-missing", "filter@noise"), ("--single-item", ENCODE)):
        assert "Running stage" not in command(clone, "dvc", "repro", *words)
    if track == "manifest":  # who needs the shards says that they are not here
        line = command(clone, "pipelines.encode", "noise", code=2)
        assert "data/filtered/noise: 3 of 3 shards are not as its manifest says" in line


def test_rules_of_another_experiment_replace_those_of_before(checkout, tmp_path):
    root, _ = checkout
    path = tmp_path / ".dvcignore"
    path.write_text("/mine")  # without an end of its line
    experiment = write_experiment(root, {"datasets": {"noise": {"shard_rows": 4, "track": "manifest"}}})
    write_ignore_rules(experiment, path)
    assert path.read_text().startswith("/mine\n# --- written by `unifork use`")
    assert "!/data/codes/noise/*/manifest.json\n" in path.read_text()
    path.write_text(path.read_text() + "/other\n")
    write_ignore_rules(write_experiment(root, {"datasets": {"noise": {"shard_rows": 4}}}), path)
    assert path.read_text() == "/mine\n/other\n"

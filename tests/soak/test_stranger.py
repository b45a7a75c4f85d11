"""A stranger with nothing but published pages: a new environment, what the pages install, and their lines, run in it.

Takes minutes, a package index and gigabytes; `-s` shows how long and how many. Only torch is held at the release of the
tests, since others can bring CUDA along.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from shlex import quote

import numpy as np
import pytest
from PIL import Image
from tiny import REPOSITORY

from unifork.layout import Layout
from unifork.publish import model
from unifork.publish.card import Offer
from unifork.publish.publication import build

pytestmark = pytest.mark.soak
SOURCE = ["unifork", "pyproject.toml", "README.md", "LICENSE"]
"""What a wheel is built from."""
SIDE = 48


@pytest.fixture(scope="module")
def pages(tiny_root, tmp_path_factory):
    """Publications of codes and of a model, whose pages install a wheel of this library."""
    folder = tmp_path_factory.mktemp("stranger")
    for name in SOURCE:
        (shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy)(REPOSITORY / name, folder / "source" / name)
    pip("wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    (wheel,) = folder.glob("unifork-*.whl")
    offer = Offer(quote(str(wheel)), with_tokenizer=True)
    build("shapes", Layout(tiny_root), folder / "codes", None, offer)
    model.build(tiny_root / "models/unifork-init", Layout(tiny_root), folder / "model", offer)
    return folder


def environment(home: Path, *names: str) -> dict[str, str]:
    """Nothing of the project's; of this process only what the named variables begin with."""
    kept = {name: value for name, value in os.environ.items() if name.lower().startswith(names)}
    return kept | {"PATH": f"{home / 'venv/bin'}{os.pathsep}{os.defpath}", "HOME": str(home)}


def pip(*words):
    subprocess.run([sys.executable, "-m", "pip", "-q", *map(str, words)], check=True)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (page / "README.md").read_text(), re.DOTALL)


def run(words: list[str], folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def home(tmp_path):
    """A folder with a new environment, which is not kept."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    yield tmp_path
    shutil.rmtree(tmp_path / "venv")


def test_codes_become_images_and_a_model_draws_where_only_the_pages_install_anything(pages, home):
    started = time.monotonic()
    (home / "torch.txt").write_text(f"torch=={version('torch').partition('+')[0]}\n")
    network = environment(home, "pip_", "http", "https", "no_proxy", "ssl_")
    network["PIP_CONSTRAINT"] = str(home / "torch.txt")
    for name in ("codes", "model"):
        for lines in blocks(pages / name, "console"):
            run(["sh", "-ec", lines], pages / name, network)
        seconds = time.monotonic() - started
        files = [path for path in (home / "venv").rglob("*") if path.is_file() and not path.is_symlink()]
        packages = len(list((home / "venv").rglob("*.dist-info")))
        print(
            f"{name}: {packages} packages, {sum(path.stat().st_size for path in files) / 1e9:.2f} GB, {seconds:.0f} s"
        )
        alone = environment(home) | {"HF_HUB_OFFLINE": "1"}
        place = run(["python", "-c", "import unifork; print(unifork.__file__)"], home, alone)
        assert Path(place.strip()).is_relative_to(home / "venv")
        for code in blocks(pages / name, "python"):
            run(["python", "-c", code], pages / name, alone)
    with Image.open(pages / "model/drawn.png") as drawn:
        assert drawn.size == (SIDE, SIDE)
    with Image.open(pages / "codes/samples.png") as strip, Image.open(pages / "codes/0-0.png") as first:
        assert np.array_equal(np.asarray(strip)[:, :SIDE], np.asarray(first))
    print(f"{time.monotonic() - started:.0f} s in all")

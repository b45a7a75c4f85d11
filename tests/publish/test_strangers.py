"""What a stranger does with a published page: its lines are run as they stand, with nothing but the publication."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, hf_api
from PIL import Image
from test_publish import HubStub, command
from tiny import REPOSITORY, bytes_of, copy_of

from unifork import __version__
from unifork.config import Experiment, TrainResources, parse
from unifork.errors import CheckpointError, ConfigError, DataError, IdentityError
from unifork.filters.rules import listing
from unifork.layout import Layout
from unifork.publish import model as models
from unifork.publish import stores
from unifork.publish.card import Offer
from unifork.publish.publication import build
from unifork.publish.stores import CHECKSUMS, HubStore, checksums, open_store, published_at, sync
from unifork.shards.job import write_shard
from unifork.shards.manifest import Manifest, read_manifest, write_manifest
from unifork.shards.task import ShardTask
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

KEYS = ["../../../out of here", "/absolute/name", "a/b/c.png", "ключ 鍵 \u202e", "", "a\nb"]
IMAGES = [0, 1, 2, 3, 1, 0]
"""Of the rows with these keys; a page shows the first four."""
KEY = "unifork-s3"


@pytest.fixture(scope="module")
def root(tiny_root, tmp_path_factory) -> Path:
    """A root whose codes have odd keys and rows with any number of images, and in which a stage has run."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("strangers") / "root")
    for view in ("crop", "pad"):
        folder = root / "data/codes/shapes" / view
        manifest = read_manifest(folder)
        table = pq.read_table(folder / manifest.shards[0].path)
        every = table["codes"].combine_chunks().flatten()
        counts = np.array([*IMAGES, *[1] * (len(every) - sum(IMAGES))])
        codes = pa.ListArray.from_arrays(pa.array(np.append(0, counts.cumsum()), pa.int32()), every)
        table = table.slice(0, len(counts)).set_column(
            table.schema.get_field_index("codes"), table.schema.field("codes"), codes
        )
        keys = pa.array([*KEYS, *table["key"].to_pylist()[len(KEYS) :]])
        shutil.rmtree(folder)
        task = ShardTask().placed(None, folder / "part-00000.parquet", None, "x")
        shard = write_shard(
            task, table.set_column(table.schema.get_field_index("key"), table.schema.field("key"), keys), {}
        ).shard
        write_manifest(folder, Manifest.model_validate(manifest.model_dump() | {"shards": [shard.model_dump()]}))
    return root


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory) -> Path:
    """A root with a finished run, scores of its model, and `published`, its publication."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("trained") / "root")
    experiment = yaml.safe_load((root / "params.yaml").read_text())
    stage = experiment["stages"]["s3"]
    stage["sample_prompts"] = ["a red circle", "two blue squares"]
    for track in stage["tracks"].values():
        track |= {"steps": 4, "batch_documents": 8}
    experiment["runs"][KEY]["after"] = "models/unifork-init"
    (root / "params.yaml").unlink()
    (root / "params.yaml").write_text(yaml.safe_dump(experiment))
    resources = TrainResources(threads=1, row_tokens=384)
    plan = parse(Experiment, experiment, "test")
    train_stage(StageJob(key=KEY, experiment=plan, resources=resources, root=str(root)), WorkerContext())
    score = {"value": 0.25, "standard_error": 0.125, "interval": None, "items": 16, "clusters": 16, "chance": 0.125}
    score |= {"rule": "exact", "unread": 0.0, "missing": 0, "items_hash": "a", "model": "b", "decoding": "c", "seed": 0}
    folder = root / "scores/unifork/shapes-generation"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"held_out": {"overall": score, "two_object": score}}))
    before = os.getcwd()
    os.chdir(root)
    words = ("--to", "published", "--license", "cc0-1.0", "--library", "unifork @ git+https://example.org/u.git")
    assert "every file read again" in command("publish", f"models/{KEY}", *words, "--verify")
    os.chdir(before)
    return root


def run_page(folder: Path, home: Path) -> tuple[str, str]:
    """The page's Python, in the folder of the page, by a process that has the library and nothing else; its output."""
    text = (folder / "README.md").read_text()
    library = home / "library"
    library.mkdir(parents=True)
    (library / "unifork").symlink_to(REPOSITORY / "unifork")
    environment = {"PYTHONPATH": str(library), "PATH": "", "HOME": str(home), "HF_HUB_OFFLINE": "1"}
    printed = ""
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        assert len(code.splitlines()) <= 10
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    return text, printed


@pytest.mark.slow  # runs the page
def test_codes_of_any_key_and_number_of_images_are_decoded(root, tmp_path):
    offer = Offer("'unifork @ git+https://example.org/u.git'", with_tokenizer=True)
    folder = tmp_path / "deep/er/out"
    build("shapes", Layout(root), folder, None, offer)
    before = bytes_of(folder)
    assert {name for name in before if name.startswith("tokenizers/")} <= {*checksums(open_store(str(folder)))}
    text, printed = run_page(folder, tmp_path / "home")
    assert "pip install 'unifork @ git+https://example.org/u.git' datasets\n" in text
    assert "It lies here, in `tokenizers/image`." in text
    assert DatasetCard.load(folder / "README.md").data.license == "cc0-1.0"
    drawn = {"1-0.png", "2-0.png", "2-1.png", "3-0.png", "3-1.png", "3-2.png"}
    assert {*bytes_of(folder)} - {*before} == drawn
    assert {path.name for path in tmp_path.iterdir()} == {"deep", "home"}
    assert [*(tmp_path / "deep").rglob("*.png")] == [*folder.rglob("*.png")]
    assert [line.split(" ", 1)[1] for line in printed.splitlines()] == KEYS[:4]
    with Image.open(folder / "samples.png") as strip, Image.open(folder / "1-0.png") as first:
        assert strip.size == (8 * 48, 48)
        assert np.array_equal(np.asarray(strip)[:, :48], np.asarray(first))


def test_pages_without_an_address_of_the_library_have_no_command_that_installs_it(root, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(copy_of(root, tmp_path / "root"))
    command("publish", "shapes", "--to", str(tmp_path / "codes"))
    monkeypatch.chdir(copy_of(trained, tmp_path / "trained"))
    command("publish", f"models/{KEY}", "--to", str(tmp_path / "model"))
    for name, commands in {"codes": ["pip install datasets"], "model": []}.items():
        text = (tmp_path / name / "README.md").read_text()
        assert [line for line in text.splitlines() if line.startswith("pip ")] == commands
        assert text.count(f"\n\nInstall the library from the source of unifork {__version__} first: no address ") == 1


def test_the_page_says_where_the_tokenizer_is(root, tmp_path):
    out = tmp_path / "out"
    layout = Layout(copy_of(root, tmp_path / "root"))
    build("shapes", layout, out, None, Offer("unifork", with_tokenizer=True))
    assert (out / "tokenizers/image/config.json").exists()
    build("shapes", layout, out, None, Offer("unifork", "https://example.org/tokenizer"))
    assert "It is at https://example.org/tokenizer; put it into" in (out / "README.md").read_text()
    assert not (out / "tokenizers/image/config.json").exists()
    assert {*checksums(open_store(str(out))), CHECKSUMS} == {*bytes_of(out)}
    other = json.loads((layout.image_tokenizer / "config.json").read_text()) | {"codebook_id": "another"}
    (layout.image_tokenizer / "config.json").unlink()
    (layout.image_tokenizer / "config.json").write_text(json.dumps(other))
    with pytest.raises(IdentityError, match=r"tokenizers/image: codebook_id another, but the codes of shapes are of"):
        build("shapes", layout, out, None, Offer("unifork", with_tokenizer=True))
    build("shapes", layout, out, None, Offer("unifork"))
    assert "It is not included, and no address was given" in (out / "README.md").read_text()
    assert not (out / "samples.png").exists()


def test_the_tokenizer_comes_along(root, tmp_path, monkeypatch):
    monkeypatch.chdir(copy_of(root, tmp_path / "root"))
    command("publish", "shapes", "--to", "memory://out", "--with-tokenizer", "--verify")
    names = {row["name"] for row in json.loads(command("status", "--json"))}
    assert {name for name in names if name.startswith("published/")} == {
        "published/shapes/crop",
        "published/shapes/pad",
    }
    command("fetch", "memory://out", "theirs")
    assert bytes_of(Path("tokenizers/fetched/theirs")) == bytes_of(Path("tokenizers/image"))
    theirs, ours = (pq.read_table(f"data/codes/{name}/pad/part-00000.parquet") for name in ("theirs", "shapes"))
    assert theirs.to_pylist() == ours.to_pylist()


@pytest.mark.slow  # runs the page
def test_a_model_is_loaded_by_the_lines_of_its_page(trained, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(trained / "published", folder)
    text, printed = run_page(folder, tmp_path / "home")
    with Image.open(folder / "drawn.png") as drawn:
        assert drawn.size == (48, 48)
    assert printed.endswith("\n")
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("cc0-1.0", "unifork", "any-to-any")
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.dataset_type, result.dataset_split, result.metric_type, result.metric_value) == (
        "shapes-generation", "held_out", "overall", 0.25
    )  # fmt: skip
    parts = ["`shared task norm:task`", "| `shapes` | ", "CC0-1.0", "0.250 ± 0.125", "2. two blue squares"]
    parts += [f"| {KEY} | generation | 4 | 8 |", "pip install 'unifork @ git+https://example.org/u.git'"]
    for part in parts:
        assert part in text
    with Image.open(folder / "samples.png") as strip:
        assert strip.size == (2 * 48, 48)
    names = {*bytes_of(trained / "published")}
    assert names == {*checksums(open_store(str(trained / "published"))), CHECKSUMS}
    assert not {name for name in names if "held_out" in name}


def test_a_model_goes_to_a_store_and_back(trained, tmp_path, monkeypatch, bucket):
    root = copy_of(trained, tmp_path / "root")
    monkeypatch.chdir(root)
    address = f"{bucket}/models/x"
    command("publish", f"models/{KEY}", "--to", address, "--verify")
    assert " 0 files uploaded" in command("publish", f"models/{KEY}", "--to", address)
    command("fetch", address, "theirs")
    there = bytes_of(root / "models/theirs")
    assert there == bytes_of(root / f"data/published_models/{KEY}")
    command("fetch", address, "theirs")
    with pytest.raises(ConfigError, match=rf"models/{KEY}: exists and is another model"):
        command("fetch", address, KEY)
    (root / "models/theirs").rename(root / "models/moved")
    command("publish", "models/moved", "--to", "again")  # its page says less: the experiment has no such run
    assert {*bytes_of(root / "again")} == {*there}


def test_fetching_a_model_goes_on_and_trusts_nothing(trained, tmp_path, monkeypatch):
    out, layout = tmp_path / "out", Layout(tmp_path / "here")
    shutil.copytree(trained / "published", out)
    store = open_store(str(out))
    sums = checksums(store)
    victim = out / "model.safetensors"
    whole = victim.read_bytes()
    victim.write_bytes(whole[::-1])
    with pytest.raises(DataError, match=r"model\.safetensors: sha256 .* publish it again"):
        models.fetch(store, sums, "x", layout)
    assert not layout.model("x").exists()
    victim.write_bytes(whole)
    copied = []
    monkeypatch.setattr(
        type(store), "copy", lambda self, name, path: (copied.append(name), shutil.copy(out / name, path))
    )
    models.fetch(store, sums, "x", layout)
    assert "config.json" not in copied  # it was there and right
    assert "model.safetensors" in copied
    assert bytes_of(layout.model("x")) == bytes_of(out)
    for name in ("../outside", "/tmp/outside", "a/../../outside"):
        (out / CHECKSUMS).write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(DataError, match="a path inside the publication is expected"):
            published = published_at(str(out))
            checksums(published)
    (out / CHECKSUMS).write_text(f"{'0' * 64}  something\n")
    with pytest.raises(DataError, match=r"names no config\.json; this is no publication of a model, nor of codes"):
        models.fetch(store, checksums(store), "y", layout)
    with pytest.raises(CheckpointError):
        models.build(tmp_path / "nothing", layout, out, Offer("unifork"))


def test_publishing_a_model_goes_on_where_it_was_killed(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(copy_of(trained, tmp_path / "root"))
    out = tmp_path / "out"
    shutil.copytree(trained / "published", out)
    whole, kept = bytes_of(out), (out / "config.json").stat().st_mtime_ns
    (out / CHECKSUMS).unlink()
    (out / "model.safetensors").write_bytes(b"another")
    (out / "training/history.csv").unlink()
    (out / "training/.history.csv.tmp-1").write_bytes(b"half")
    with pytest.raises(DataError, match="no SHA256SUMS"):
        command("fetch", str(out), "x")
    words = ("--to", str(out), "--license", "cc0-1.0", "--library", "unifork @ git+https://example.org/u.git")
    command("publish", f"models/{KEY}", *words)
    assert bytes_of(out) == whole
    assert (out / "config.json").stat().st_mtime_ns == kept


def test_images_that_were_withdrawn_are_not_shown(root, tmp_path):
    layout, out = Layout(root), tmp_path / "out"
    build("shapes", layout, out, None, Offer("unifork"))
    before = (out / "samples.png").read_bytes()
    Path(tmp_path / "gone").write_text("key shapes/a/b/c.png\n")
    build("shapes", layout, out, listing(str(tmp_path / "gone")), Offer("unifork"))
    with Image.open(out / "samples.png") as after, Image.open(io.BytesIO(before)) as first:
        old, new = np.asarray(first), np.asarray(after)
    assert np.array_equal(new[:, :48], old[:, :48])  # of the row before it
    assert np.array_equal(new[:, 48 : 6 * 48], old[:, 3 * 48 :])  # its two images are gone


def test_a_model_goes_to_a_repository_of_models(trained, monkeypatch):
    assert open_store("hf://user/name", "model").repository == {"repo_id": "user/name", "repo_type": "model"}
    assert open_store("hf://models/user/name").repository == {"repo_id": "user/name", "repo_type": "model"}
    assert open_store("hf://datasets/user/name", "model").repository["repo_type"] == "dataset"
    hub = HubStub("model", "user/name")
    monkeypatch.setattr(stores, "HfApi", lambda: hub)
    monkeypatch.setattr(hf_api, "is_xet_available", lambda: False)  # then a call of upload_folder is one commit
    sync(trained / "published", HubStore("hf://user/name", hub, "user/name", "model"))
    assert hub.files == bytes_of(trained / "published")

"""Codes become a data set for strangers, and the data set becomes codes again."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import CommitOperationDelete, HfApi, hf_api
from huggingface_hub.hf_api import BlobLfsInfo
from tiny import bytes_of, copy_of
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import MixtureEntry, load_card
from unifork.documents.mixture import CodesIdentity, MixturePart
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError
from unifork.filters.rules import listing
from unifork.layout import Layout
from unifork.publish import stores
from unifork.publish.card import size_category
from unifork.publish.stores import CHECKSUMS, HubStore, checksums, open_store, reread, sync
from unifork.publish.takedown import withdrawn_keys
from unifork.shards.job import write_shard
from unifork.shards.manifest import Manifest, read_manifest, write_manifest
from unifork.shards.schema import codes_array, codes_meta
from unifork.shards.task import ShardTask


def command(*words: str) -> str:
    """A command of the program, in this process and folder."""
    done = CliRunner().invoke(app, words)
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def published(tiny_root, tmp_path_factory) -> Path:
    """A root whose shapes were published to `out`."""
    root = copy_of(tiny_root, tmp_path_factory.mktemp("root"))
    before = os.getcwd()
    os.chdir(root)
    command("publish", "shapes", "--to", "out", "--verify")
    os.chdir(before)
    return root


@pytest.fixture
def root(published, tmp_path, monkeypatch) -> Path:
    """A private copy, as the working directory."""
    shutil.copytree(published, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_shards_show_integers_and_say_what_they_are(published):
    names = [p.name for p in sorted((published / "out/crop").glob("*.parquet"))]
    assert names == [f"train-{number:05d}-of-00003.parquet" for number in range(3)]
    path = published / "out/pad" / names[1]
    file = pq.ParquetFile(path)
    assert file.schema_arrow.field("codes").type.value_type.value_type == pa.uint16()
    column = next(
        c
        for c in map(file.metadata.row_group(0).column, range(file.metadata.num_columns))
        if "codes" in c.path_in_schema
    )
    assert column.compression == "ZSTD"
    assert any("DICTIONARY" in name for name in column.encodings)
    meta, about = codes_meta(file.schema_arrow, ""), json.loads(file.schema_arrow.metadata[b"unifork.published"])
    assert (about["dataset"], about["view"], about["license"]) == ("shapes", "pad", "CC0-1.0")
    original = pq.read_table(published / "data/codes/shapes/pad/part-00001.parquet")
    codes_ND = codes_array(original["codes"], tuple(meta["shape"]))
    table = file.read()
    assert np.array_equal(np.array(table["codes"].to_pylist()).reshape(codes_ND.shape), codes_ND)
    assert {len(images) for images in table["codes"].to_pylist()} == {1}
    assert table.drop_columns("codes").equals(original.drop_columns("codes"))


def test_the_page_says_what_a_stranger_needs(published):
    text = (published / "out/README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc0-1.0"
    assert head["size_categories"] == ["n<1K"]
    assert [c["config_name"] for c in head["configs"]] == ["crop", "pad"]
    identity = json.loads((published / "tokenizers/image/config.json").read_text())
    for name in ("codebook_id", "encoder_id"):
        assert f"`{identity[name]}`" in text
    filtered = read_manifest(published / "data/filtered/shapes")
    assert f"| filter | kept | {filtered.rows} |" in text
    for rule in load_card("shapes", published / "datasets").filters:
        assert re.search(rf"\| filter \| `{rule.rule}` \(.*\) \| {filtered.dropped.get(rule.rule, 0)} \|", text)
    for name, rows in filtered.dropped.items():
        assert re.search(rf"\| filter \| `{name}`.* \| {rows} \|", text)


def test_checksums_are_those_of_the_files(published):
    done = subprocess.run(["sha256sum", "-c", "--quiet", CHECKSUMS], cwd=published / "out", check=False)
    assert done.returncode == 0
    assert {*checksums(open_store(str(published / "out"))), CHECKSUMS} == set(bytes_of(published / "out"))


def test_a_stranger_loads_it_and_sees_images(root, monkeypatch, caplog):
    """The ten lines of the page, run as they stand there, in the folder of the page."""
    import datasets  # as here alone: it takes seconds

    monkeypatch.setenv("HF_HOME", str(root / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "hf")
    text = Path("out/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) <= 10
    Path("out/tokenizers").symlink_to(root / "tokenizers")
    monkeypatch.chdir(root / "out")
    exec(compile(code, "README.md", "exec"), {})
    assert {path.name for path in Path().glob("?-?.png")} == {f"{row}-0.png" for row in range(4)}
    both = {name: datasets.load_dataset(str(root / "out"), name, split="train") for name in ("crop", "pad")}
    head = yaml.safe_load(text.split("---\n")[1])
    for info in head["dataset_info"]:
        loaded = both[info["config_name"]]
        assert loaded.features._to_yaml_list() == info["features"]
        assert len(loaded) == info["splits"][0]["num_examples"]
    assert not caplog.records  # the library warns of what it does not understand in the head


def test_it_comes_back_byte_for_byte_and_trains(root):
    shutil.move("data/codes/shapes", "original")
    output = command("fetch", "out", "shapes")
    assert "3/3 shards" in output
    assert bytes_of(Path("data/codes/shapes")) == bytes_of(Path("original"))
    tokenizer = json.loads(Path("tokenizers/image/config.json").read_text())
    manifest = read_manifest(Path("data/codes/shapes/crop"))
    meta = codes_meta(pq.read_schema(Path("data/codes/shapes/crop") / manifest.shards[0].path), "")
    identity = CodesIdentity(*meta["shape"], tokenizer["codebook_id"], tokenizer["encoder_id"])
    entry = MixtureEntry(dataset="shapes", task="generation", text="caption", template="generate", weight=1.0)
    part = MixturePart(entry, Layout(), TextTokenizer(Path("tokenizers/text")), identity, 512)
    assert len(part) == manifest.rows
    assert "(3 kept from before)" in command("fetch", "out", "shapes")


def test_under_another_name_it_brings_its_card(root):
    command("fetch", str(root / "out"), "theirs")
    card = load_card("theirs", Path("datasets"))
    assert card.tasks == load_card("shapes", Path("datasets")).tasks
    assert read_manifest(Path("data/codes/theirs/pad")).dataset == "theirs"


def test_publishing_again_changes_no_byte(root):
    before = bytes_of(Path("out"))
    assert "3/3 shards (3 kept from before)" in command("publish", "shapes", "--to", "out")
    assert bytes_of(Path("out")) == before
    shutil.rmtree("out")
    command("publish", "shapes", "--to", "out")
    assert bytes_of(Path("out")) == before


def test_takedowns_by_key_url_and_hash_touch_only_their_shards(root):
    images = Path("data/measured/shapes")
    shards = [pq.read_table(images / shard.path) for shard in read_manifest(images).shards]
    gone = [shards[0]["key"][2].as_py(), shards[2]["key"][5].as_py()]
    digest = shards[2]["sha256"][5].as_py().upper()
    Path("takedown.txt").write_text(f"# asked for by mail\nkey shapes/{gone[0]}\n\nsha256 {digest}\n")
    before = bytes_of(Path("out"))
    output = command("publish", "shapes", "--to", "out")
    assert "withheld" in output
    assert "3/3 shards (1 kept from before)" in output
    after = bytes_of(Path("out"))
    for view in ("crop", "pad"):
        keys = [k for p in sorted(Path("out", view).glob("*.parquet")) for k in pq.read_table(p)["key"].to_pylist()]
        assert not set(gone) & set(keys)
        assert len(keys) == sum(table.num_rows for table in shards) - 2
        assert after[f"{view}/train-00001-of-00003.parquet"] == before[f"{view}/train-00001-of-00003.parquet"]
    assert not any(key.encode() in data for key in gone for data in after.values())
    command("fetch", "out", "less")
    assert read_manifest(Path("data/codes/less/crop")).dropped["takedown"] == 2
    shutil.rmtree(images)
    with pytest.raises(
        DataError, match=r"measured/shapes: not there, but 1 entries of the takedown list are no keys, first .sha256"
    ):
        command("publish", "shapes", "--to", "out")


def test_urls_and_hosts_are_found_in_the_image_text_shards(tmp_path):
    rows = {
        "a": "https://img.example.org/1.png",
        "b": "http://example.org:81/x?y=1",
        "c": "https://notexample.org/1.png",
        "d": "https://other.net/one.png",
        "e": "https://other.net/two.png",
        "f": "http://[broken",
        "g": None,
    }
    table = pa.table({"key": list(rows), "url": list(rows.values()), "sha256": pa.nulls(len(rows), pa.string())})
    for folder in ("images", "codes"):
        task = ShardTask().placed(None, tmp_path / folder / "part-00000.parquet", None, "")
        shard = write_shard(task, table, {}).shard
        write_manifest(tmp_path / folder, Manifest(kind="x", dataset="set", columns={}, shards=(shard,)))
    (tmp_path / "list").write_text("host EXAMPLE.org\nurl https://other.net/two.png\nkey set/g\nkey another/d\n")
    entries = listing(str(tmp_path / "list"))
    found = withdrawn_keys(entries, "set", tmp_path / "codes", tmp_path / "images")
    assert found == {"part-00000.parquet": ["a", "b", "e", "g"]}
    (tmp_path / "list").write_text("key set/g\nsomething\n")
    with pytest.raises(ConfigError, match=r"list:2: 'something' is no entry; url \| host"):
        listing(str(tmp_path / "list"))


def test_a_shard_of_which_nothing_is_left_is_empty(root):
    first = Path("data/codes/shapes/crop/part-00000.parquet")
    Path("gone.txt").write_text("".join(f"key shapes/{key}\n" for key in pq.read_table(first)["key"].to_pylist()))
    assert "64 rows, 32 withheld" in command("publish", "shapes", "--to", "out", "--takedown", "gone.txt", "--verify")
    command("fetch", "out", "less")
    assert [shard.rows for shard in read_manifest(Path("data/codes/less/crop")).shards] == [0, 32, 32]
    import datasets

    rows = datasets.load_dataset(str(root / "out"), "crop", split="train", cache_dir=str(root / "hf"))
    assert len(rows) == 64


def test_what_is_wrong_is_said(root):
    with pytest.raises(ConfigError, match=r"journeydb.*redistribute_codes: false.*JourneyDB terms.*recipe"):
        command("publish", "journeydb", "--to", "elsewhere")
    with pytest.raises(ConfigError, match="redistribute_codes"):
        command("publish", "laion_en", "--to", "elsewhere")
    assert not Path("elsewhere").exists()
    with pytest.raises(ConfigError, match=r"hf://user/name"):
        open_store("hf://user")
    with pytest.raises(ConfigError, match="nowhere://"):
        open_store("nowhere://bucket")
    with pytest.raises(ConfigError, match="no such file"):
        listing("missing.txt")
    with pytest.raises(DataError, match=r"has not finished"):
        command("publish", "emoji", "--to", "elsewhere")
    with pytest.raises(DataError, match=r"no SHA256SUMS"):
        command("fetch", "elsewhere", "emoji")
    victim = Path("out/crop/train-00001-of-00003.parquet")
    victim.write_bytes(victim.read_bytes()[::-1])
    (fault,) = reread(open_store("out"))
    assert fault.startswith("crop/train-00001-of-00003.parquet: sha256")
    with pytest.raises(DataError, match=r"train-00001.*publish the set again"):
        command("fetch", "out", "broken")
    command("publish", "shapes", "--to", "out", "--verify")


@pytest.mark.parametrize(
    ("rows", "name"), [(0, "n<1K"), (1000, "1K<n<10K"), (90_000_000, "10M<n<100M"), (10**12, "n>1T")]
)
def test_size_categories(rows, name):
    assert size_category(rows) == name


class HubStub(HfApi):
    """Stands for the Hub behind HfApi and HfFileSystem: no test speaks to it. What chooses the files is the library's.

    With `breaks` the connection is lost in the middle of the next commit that adds files.
    """

    def __init__(self, kind="dataset", root="datasets/user/name"):
        super().__init__()
        self.kind, self.root = kind, root
        self.files, self.commits, self.created, self.breaks = {}, [], False, False

    def create_repo(self, repo_id, repo_type, exist_ok):
        assert (repo_id, repo_type, exist_ok) == ("user/name", self.kind, True)
        self.created = True

    def repo_exists(self, repo_id, repo_type):
        assert (repo_id, repo_type) == ("user/name", self.kind)
        return self.created

    def list_repo_files(self, repo_id, **options):
        return sorted(self.files)

    def _validate_yaml(self, content, **options):
        assert content.startswith("---")

    def create_commit(self, repo_id, operations, repo_type, **options):
        assert (self.created, repo_id, repo_type) == (True, "user/name", self.kind)
        self.commits.append([operation.path_in_repo for operation in operations])
        for number, operation in enumerate(operations):
            if isinstance(operation, CommitOperationDelete):
                del self.files[operation.path_in_repo]
                continue
            if self.breaks and number == 3:
                self.breaks = False
                raise ConnectionError("gone")
            self.files[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def invalidate_cache(self):
        pass

    def find(self, root, detail):
        assert self.created, "the file system raises FileNotFoundError"

        def info(name, data):
            lfs = BlobLfsInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest(), pointer_size=1)
            return {"size": len(data), "lfs": lfs if name.endswith(".parquet") else None}

        return {f"{root}/{name}": info(name, data) for name, data in self.files.items()}

    def open(self, path, mode):
        return io.BytesIO(self.files[path.removeprefix(f"{self.root}/")])

    def cat_file(self, path):
        return self.open(path, "rb").read()


@pytest.fixture
def hub(monkeypatch) -> HubStub:
    stub = HubStub()
    monkeypatch.setattr(stores, "HfApi", lambda: stub)
    monkeypatch.setattr(hf_api, "is_xet_available", lambda: False)  # then a call of upload_folder is one commit
    return stub


def test_the_hub_gets_what_differs(published, hub):
    assert isinstance(open_store("hf://user/name"), HubStore)
    store = HubStore("hf://user/name", hub, "datasets/user/name")
    done = sync(published / "out", store)
    assert hub.files == bytes_of(published / "out")
    assert reread(store) == []
    assert [len(commit) for commit in hub.commits] == [len(done.uploaded) - 1, 1]
    assert hub.commits[-1] == [CHECKSUMS]
    assert sync(published / "out", store).uploaded == ()
    assert len(hub.commits) == 2
    victim, stale = "crop/train-00000-of-00003.parquet", "crop/train-00003-of-00004.parquet"
    hub.files |= {victim: b"x", stale: b"of an earlier publication", ".gitattributes": b"theirs"}
    assert [fault.split(":")[0] for fault in reread(store)] == [victim]
    done = sync(published / "out", store)
    assert (done.uploaded, done.removed) == ((victim,), (stale,))
    assert hub.commits[2:] == [[CHECKSUMS], [victim], [stale], [CHECKSUMS]]
    assert hub.files == bytes_of(published / "out") | {".gitattributes": b"theirs"}


def test_an_interrupted_upload_to_the_hub_has_no_checksums(published, hub):
    store = HubStore("hf://user/name", hub, "datasets/user/name")
    hub.breaks = True
    with pytest.raises(DataError, match=r"hf://user/name: ConnectionError: gone\. Run the command again"):
        sync(published / "out", store)
    there = set(hub.files)
    assert len(there) == 3
    assert CHECKSUMS not in there
    assert not there & set(sync(published / "out", store).uploaded)
    assert hub.files == bytes_of(published / "out")

"""`unifork takedown`: a row is gone from every folder of its set, and only its shards are written."""

import pyarrow.parquet as pq
from tiny import copy_of
from typer.testing import CliRunner

from unifork.cli import app
from unifork.layout import Layout
from unifork.shards.job import KeptRows, read_table
from unifork.shards.manifest import present


def test_a_row_is_gone_from_all_finished_shards(tiny_root, tmp_path, monkeypatch):
    root = copy_of(tiny_root, tmp_path / "root")
    monkeypatch.chdir(root)
    row = KeptRows(Layout(), "shapes").table(1).slice(5, 1).to_pylist()[0]
    (root / "gone.txt").write_text(f"sha256 {row['sha256']}\n")
    folders = sorted(path.parent for path in (root / "data").rglob("manifest.json"))
    assert {folder.relative_to(root / "data").parts[0] for folder in folders} == {
        "raw", "measured", "filtered", "codes", "prepared",
    }  # fmt: skip
    before = {folder: present(folder) for folder in folders}
    done = CliRunner().invoke(app, ["takedown", "shapes", "gone.txt"], catch_exceptions=False)
    assert done.output.count(": 1 rows removed") == len(folders)
    assert "unifork publish shapes --to ... --takedown gone.txt" in done.output
    assert "{rule: takedown, options: {file: gone.txt}}" in done.output
    for folder in folders:
        manifest = present(folder)
        assert manifest.rows == before[folder].rows - 1
        keys = [key for shard in manifest.shards for key in read_table(folder, shard)["key"].to_pylist()]
        assert row["key"] not in keys
        changed = [old.path for old, new in zip(before[folder].shards, manifest.shards, strict=True) if old != new]
        assert [name.partition(".")[0] for name in changed] == ["part-00001"]
    images = pq.read_table(root / "data/raw/shapes/part-00001.parquet")["image"].to_pylist()
    assert row["image"] not in images
    again = CliRunner().invoke(app, ["takedown", "shapes", "gone.txt"], catch_exceptions=False)
    assert again.output.count(": 0 rows removed") == len(folders)

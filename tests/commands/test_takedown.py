"""`unifork takedown`: a row is gone from every folder of its set, and only its shards are written."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from forks import program
from PIL import Image
from tiny import bytes_of, copy_of, filter_here, run_here
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import load_card
from unifork.image_tokenizer.encode import Encode, encode_job
from unifork.layout import Layout
from unifork.shards.job import KeptRows, read_table
from unifork.shards.manifest import present
from unifork.sources import Materialize, download_job


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
    assert "entries name no row" not in done.output
    again = CliRunner().invoke(app, ["takedown", "shapes", "gone.txt"], catch_exceptions=False)
    assert again.output.count(": 0 rows removed") == len(folders)
    missed = "1 of 1 entries name no row of shapes, or none any more: sha256 "
    assert f"{missed}{row['sha256']}\n" in again.output


def test_entries_that_name_no_row_are_counted_and_the_first_shown(tiny_root, tmp_path, monkeypatch):
    """An entry beside another that names the same row has named one."""
    root = copy_of(tiny_root, tmp_path / "root")
    monkeypatch.chdir(root)
    row = KeptRows(Layout(), "shapes").table(0).slice(2, 1).to_pylist()[0]
    others = ("another/1", "shapes/-x y", '"shapes/a\\nb"', "shapes/\u202ea", "shapes/z")
    lines = [f"key shapes/{row['key']}", f"sha256 {row['sha256']}", "host nobody.example"]
    lines += [f"key {name}" for name in others]
    (root / "gone.txt").write_text("\n".join([*lines, "url https://a.example/1"]))
    done = CliRunner().invoke(app, ["takedown", "shapes", "gone.txt"], catch_exceptions=False)
    assert "data/raw/shapes: 1 rows removed" in done.output
    (missed,) = [line for line in done.output.splitlines() if "name no row" in line]
    assert missed == (
        "7 of 9 entries name no row of shapes, or none any more: host nobody.example, key another/1, "
        'key shapes/-x y, key "shapes/a\\nb", key shapes/z, ...'
    )


KEYS = ["-rf", "--help", "a b  c", "d/e/-f", "ключ 鍵", "é\u0301\u202e", "#no", '"q"', "new\nline", "$(x)`y`;&"]


@pytest.mark.slow  # seven programs
def test_rows_of_any_key_go_out_come_back_and_are_taken_down(tiny_root, tmp_path):
    root, home = copy_of(tiny_root, tmp_path / "root"), tmp_path / "-an other's home"
    for number, key in enumerate([*KEYS, "kept"]):
        image = root / f"archives/odd/{key}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((48, 48, 3), number * 20, np.uint8)).save(image)
        image.with_suffix(".txt").write_text("a square")
    tasks = {"generation": {"view": "crop", "texts": ["caption"]}}
    about = {
        "title": "odd keys",
        "homepage": "none",
        "license": "CC0-1.0",
        "attribution": "none",
        "redistribute_codes": True,
    }
    source = {"kind": "pairs", "options": {"files": str(root / "archives/odd")}}
    card = {"name": "odd", **about, "source": source, "tasks": tasks}
    (root / "datasets/odd.yaml").write_text(yaml.safe_dump(card))
    loaded, layout = load_card("odd", root / "datasets"), Layout(root)
    run_here([download_job(loaded, 11, 4, 0, layout.raw("odd"))], Materialize(loaded))
    filter_here(loaded, layout.raw("odd"), layout.measured("odd"), layout.filtered("odd"))
    kept, tokenizer = KeptRows(layout, "odd"), root / "tokenizers/image"
    job = encode_job(loaded, "generation", kept, layout.codes / "odd/crop", tokenizer)
    run_here([job], Encode(loaded, tokenizer, "cpu"))
    codes = layout.codes / "odd"
    keys = [
        key for shard in present(codes / "crop").shards for key in read_table(codes / "crop", shard)["key"].to_pylist()
    ]
    assert {key.removeprefix("./") for key in keys} == {*KEYS, "kept"}

    def command(*words):
        code, printed = program(root, ("unifork.cli", *words))
        assert code == 0, printed
        return printed

    assert "11 rows, 0 withheld" in command("publish", "odd", "--to", str(home), "--verify")
    assert ": 11 rows, as " in command("fetch", str(home), "back")
    assert bytes_of(layout.codes / "back") == bytes_of(codes) | {
        "crop/manifest.json": (layout.codes / "back/crop/manifest.json").read_bytes()
    }
    lines = [
        f"key odd/{key}" if key.isprintable() else f"key {json.dumps(f'odd/{key}')}"
        for key in keys
        if "kept" not in key
    ]
    (root / "-gone list.txt").write_text("\n".join(lines))
    listed = ("--takedown", "-gone list.txt")
    assert "1 rows, 10 withheld" in command("publish", "odd", "--to", str(tmp_path / "less"), *listed)
    printed = command("takedown", "odd", "--", "-gone list.txt")
    assert printed.count(": 10 rows removed") == 4
    assert "name no row" not in printed
    again = next(line for line in printed.splitlines() if "unifork publish" in line)
    assert "--takedown './-gone list.txt'`" in again or "--takedown '-gone list.txt'`" in again
    assert "1 rows, 0 withheld" in command("publish", "odd", "--to", str(home), *listed)

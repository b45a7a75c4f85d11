"""Rules keep or drop with a reason; lists of URLs have many spellings; duplicates and withdrawn rows go."""

import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from archive_samples import card_of, download, filtered, gzipped, jpeg, put
from PIL import Image
from test_duplicates import duplicate_card, shards
from tiny import filter_here

from unifork.config import StrictModel
from unifork.errors import ConfigError, DataError
from unifork.filters.rules import Listing, entry_line, judge, listing, rule, rules_of
from unifork.filters.takedown import takedown, withdrawn
from unifork.layout import Layout
from unifork.shards.job import KeptRows, kept_table, write_shard
from unifork.shards.manifest import fault, read_manifest
from unifork.shards.task import ShardTask
from unifork.sources import RowError
from unifork.sources.url_lists import UrlList, canonical, mapped
from unifork.sources.url_lists import rows as url_rows
from unifork.sources.url_lists import slices as url_slices

# ------------------------------------------------------------------------------------------- rules

ROW = {"key": "k", "bytes": 1000, "problem": None, "width": 300, "height": 100, "url": "https://cdn.a.org/x.jpg",
       "sha256": "ab", "caption": "A red kite", "punsafe": "0.4", "pwatermark": "nan", "aesthetic": None}  # fmt: skip


def ruled(name, options):
    scores = ["similarity", "aesthetic", "pwatermark", "punsafe"]
    return card_of("emoji", {}, ["caption"], columns=scores, filters=[{"rule": name, "options": options}])


@pytest.mark.parametrize(
    ("name", "options", "changed", "kept"),
    [
        ("max_aspect", {"ratio": 3.0}, {}, True),
        ("max_aspect", {"ratio": 2.9}, {}, False),
        ("max_pixels", {"most": 29_999}, {}, False),
        ("max_bytes", {"most": 1000}, {}, True),
        ("max_bytes", {"most": 999}, {}, False),
        ("no_chinese", {"column": "caption"}, {"caption": "a 猫"}, False),
        ("latin_letters", {"column": "caption", "least": 0.9}, {}, True),
        ("latin_letters", {"column": "caption", "least": 0.9}, {"caption": "кот cat"}, False),
        ("latin_letters", {"column": "caption", "least": 0.9}, {"caption": "2 + 2 = 4"}, True),
        ("punsafe", {"most": 0.5}, {}, True),
        ("punsafe", {"most": 0.3}, {}, False),
        ("pwatermark", {"most": 0.8}, {}, False),
        ("pwatermark", {"most": 0.8, "keep_missing": True}, {}, True),
        ("aesthetic", {"least": 5.0}, {}, False),
        ("aesthetic", {"least": 5.0}, {"aesthetic": "5.0"}, True),
        ("score", {"column": "punsafe", "least": 0.4, "most": 0.4}, {}, True),
        ("score", {"column": "punsafe", "most": 1}, {"punsafe": "UNLIKELY"}, False),
    ],
)
def test_a_rule_keeps_or_drops(name, options, changed, kept):
    verdict = judge({**ROW, **changed}, ruled(name, options))
    assert verdict is None if kept else verdict[0] == name


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("min_sides", {}, r"filters\[0\]\.rule: unknown filter rule 'min_sides'\. Did you mean 'min_side'\?"),
        ("min_side", {"pixel": 3}, r"filters\[0\]\.options: unknown key 'pixel'\. Did you mean 'pixels'\?"),
        ("min_side", {"pixels": "many"}, r"filters\[0\]\.options\.pixels: .*'many'"),
        ("takedown", {}, r"filters\[0\]\.options\.file: Field required"),
        ("duplicates", {"by": ["md5"]}, r"filters\[0\]\.options\.by\.0: .*'phash'"),
        ("no_chinese", {"column": "captions"}, r"filters\[0\] \(no_chinese\): unknown column 'captions'.*'caption'"),
        ("math:pi", {}, "is a float, not a Rule"),
    ],
)
def test_a_wrong_rule_is_named_before_any_row_is_read(name, options, found):
    with pytest.raises(ConfigError, match=f"card sample: .*{found}"):
        rules_of(ruled(name, options))


def test_a_score_that_the_card_does_not_keep_would_drop_every_row():
    card = card_of("emoji", {}, ["caption"], filters=[{"rule": "similarity", "options": {"least": 0.3}}])
    with pytest.raises(ConfigError, match=r"\(similarity\): unknown column 'similarity'"):
        rules_of(card)


class Letter(StrictModel):
    letter: str


@rule(Letter)
def begins_with(row, options):
    """Keep rows whose caption begins with a letter."""
    return row["caption"].startswith(options.letter)


def test_anybodys_code_is_a_rule():
    name = f"{__name__}:begins_with"
    assert judge(ROW, ruled(name, {"letter": "A"})) is None
    assert judge(ROW, ruled(name, {"letter": "B"}))[0] == name


def test_a_changed_rule_reads_no_image(tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for number in range(24):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (400, 400, 3), dtype=np.uint8)).save(stream, "PNG")
        images.append((f"p{number:02d}", stream.getvalue(), "noise" if number % 2 else "noise again"))
    card = duplicate_card("noise", shards(tmp_path / "noise", images, 2))
    raw, measured, target = tmp_path / "raw", tmp_path / "measured", tmp_path / "filtered"
    download(card, raw, shard_rows=6)
    size = sum(path.stat().st_size for path in raw.glob("*.parquet"))
    before = bytes_read()
    assert filter_here(card, raw, measured, target).rows == 24
    assert bytes_read() - before > size
    rule = {"rule": "text_length", "options": {"column": "caption", "least": 0, "most": 5}}
    before = bytes_read()
    changed = duplicate_card("noise", tmp_path / "noise", rule)
    assert filter_here(changed, raw, measured, target).dropped == {"text_length": 12}
    assert bytes_read() - before < size / 20

    # what later stages read of the card stands in the manifest, by which DVC runs them again; no shard is made again
    names = [(path.name, path.stat().st_mtime_ns) for path in sorted(target.glob("*.parquet"))]
    matte = changed.model_copy(update={"matte": (0, 0, 0), "title": "the same images"})
    assert filter_here(matte, raw, measured, target).lineage["card"]["matte"] == [0, 0, 0]
    assert names == [(path.name, path.stat().st_mtime_ns) for path in sorted(target.glob("*.parquet"))]
    assert "title" not in read_manifest(target).lineage["card"]


def bytes_read() -> int:
    """What this process has read so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


# ----------------------------------------------------------------------------- columns of URL lists

NAN = float("nan")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # laion2B-en-joined after pandas
            {"URL": " http://a/1.jpg ", "TEXT": "A cat", "WIDTH": 300.0, "HEIGHT": NAN, "similarity": 0.31,
             "hash": -3340286428230740519, "punsafe": 0.1, "pwatermark": NAN},
            {"url": "http://a/1.jpg", "caption": "A cat", "width": 300, "height": None, "similarity": 0.31,
             "hash": -3340286428230740519, "punsafe": 0.1, "pwatermark": None},
        ),
        (  # improved aesthetics, and a stray index of pandas
            {"URL": "u", "TEXT": None, "AESTHETIC_SCORE": 6.5, "__index_level_0__": 3},
            {"url": "u", "caption": None, "aesthetic": 6.5},
        ),
        (  # LAION-400M
            {"SAMPLE_ID": 7.0, "URL": "u", "TEXT": "t", "LICENSE": "?", "NSFW": "UNLIKELY", "similarity": "0.3"},
            {"url": "u", "caption": "t", "similarity": 0.3, "nsfw": "UNLIKELY", "license": "?", "id": "7.0"},
        ),
        (  # COYO
            {"id": 841814333321, "url": "u", "text": "t", "width": 5, "height": 6, "image_phash": "eb93dde1",
             "clip_similarity_vitb32": 0.25, "clip_similarity_vitl14": 0.2, "nsfw_score_opennsfw2": 0.01,
             "watermark_score": 0.4, "aesthetic_score_laion_v2": 4.5},
            {"url": "u", "caption": "t", "width": 5, "height": 6, "similarity": 0.25, "aesthetic": 4.5,
             "pwatermark": 0.4, "punsafe": 0.01, "phash": "eb93dde1", "id": "841814333321"},
        ),
        (  # what img2dataset wrote: width is that of the stored image
            {"url": "u", "caption": "c", "width": 256, "height": 256, "original_width": 900, "original_height": None},
            {"url": "u", "caption": "c", "width": 900, "height": 256},
        ),
        (  # both cases in one table, the first is empty
            {"url": None, "URL": "u", "TEXT": b"bytes \xc3\xbc"}, {"url": "u", "caption": "bytes ü"},
        ),
        ({"photo_id": "x", "photo_image_url": "u", "photo_description": "", "ai_description": "a dog",
          "photo_width": "5"}, {"url": "u", "caption": "a dog", "width": 5, "id": "x"}),
    ],
)  # fmt: skip
def test_columns_have_one_name_however_they_are_spelled(row, expected):
    assert canonical(row, mapped(row, "list")) == expected


def test_bytes_that_are_no_text_are_not_mended():
    with pytest.raises(UnicodeDecodeError):
        canonical({"url": "u", "TEXT": b"bytes \xff"}, mapped(["url", "TEXT"], "list"))


def test_a_list_without_urls_says_what_was_looked_for():
    with pytest.raises(ConfigError, match=r"part-0: no column of URLs; known: url, photo_image_url.*found: LINK, TEXT"):
        mapped(["TEXT", "LINK"], "part-0")


def test_url_lists_of_laion_and_unsplash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"URL": f"u{n}" if n != 2 else None, "TEXT": f"t{n}", "WIDTH": n} for n in range(5)]
    (tmp_path / "laion").mkdir()
    name = "part-00000-5114fd87-297e-42b0-9d11-50f1df323dfa-c000.snappy"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"laion/{name}.parquet", row_group_size=2)
    laion, unsplash = UrlList(files="laion"), UrlList(files="unsplash/photos.*")
    found = [row for piece in url_slices(laion, 3) for row in url_rows(laion, piece, 0)]
    keys = [f"{name.partition('.')[0]}/{n:09d}" for n in range(5)]
    assert [row.key if isinstance(row, RowError) else (row["key"], row["caption"], row["width"]) for row in found] == [
        key if n == 2 else (key, f"t{n}", n) for n, key in enumerate(keys)
    ]
    header = "photo_id\tphoto_image_url\tphoto_description\tai_description\n"
    text = header + 'a\tu1\t"two\nlines"\t\nb\tu2\n' + "c\tu3\t\tmade by a program\n"
    for ending, data in (("tsv000", text.encode()), ("csv001", text.encode()), ("tsv002.gz", gzipped(text.encode()))):
        put(tmp_path / f"unsplash/photos.{ending}", data)
    read = [row for piece in url_slices(unsplash, 2) for row in url_rows(unsplash, piece, 0)]
    assert [row.reason if isinstance(row, RowError) else row["caption"] for row in read] == [
        *["broken_line"] * 3, "made by a program",  # a quote is a letter there, and a line a row
    ] * 3  # fmt: skip


# ------------------------------------------------------------------------------------------ takedown


def test_a_takedown_list_acts_in_the_filter_and_on_finished_shards(tmp_path):
    images = [(f"p{n}", jpeg(f"img{n}"), "x") for n in range(6)]
    listed = tmp_path / "takedown.txt"
    put(listed, b"# nobody yet\n")
    rule = {"rule": "takedown", "options": {"file": str(listed)}}
    card = duplicate_card("own", shards(tmp_path / "own", images, 3), rule)
    raw = download(card, tmp_path / "raw")
    before = filtered(card, tmp_path / "raw", tmp_path / "filtered")
    assert len(before.rows) == 6
    untouched = (tmp_path / "filtered/part-00000.parquet").stat()
    sha = raw.rows["2/p5"]["sha256"]
    put(listed, f"key own/1/p2\nsha256 {sha.upper()}\nhost nobody.org\nkey other/1/p3\n".encode())

    again = filtered(card, tmp_path / "raw", tmp_path / "again")
    assert again.manifest.dropped == {"takedown": 2}
    assert sorted(set(before.rows) - set(again.rows)) == ["1/p2", "2/p5"]

    gone = withdrawn(tmp_path / "raw", listing(str(listed)))
    names = ["part-00003.parquet", "part-00005.parquet"] if len(raw.manifest.shards) == 6 else [
        f"part-0000{n}.parquet" for n in (1, 2)
    ]  # fmt: skip
    assert gone == {names[0]: {"1/p2": [("key", "own/1/p2")]}, names[1]: {"2/p5": [("sha256", sha)]}}
    for folder in ("filtered", "raw", "raw-measured"):
        assert takedown(tmp_path / folder, gone) == 2
        manifest = read_manifest(tmp_path / folder)
        assert takedown(tmp_path / folder, gone) == 0
        assert manifest == read_manifest(tmp_path / folder)
        assert manifest.rows == 4
        assert manifest.dropped == {"takedown": 2}
        assert all(fault(tmp_path / folder, shard) is None for shard in manifest.shards)
        assert {path.suffix for path in (tmp_path / folder).iterdir()} <= {".parquet", ".json", ""}
    assert (tmp_path / "filtered/part-00000.parquet").stat().st_mtime_ns == untouched.st_mtime_ns
    download_again = download(card, tmp_path / "raw")
    assert len(download_again.rows) == 4, "a stage that runs again keeps what was taken down away"


@pytest.mark.parametrize(
    "key",
    [
        "a/b c",
        "\u2028 \x85 \x0c",
        "é",
        "e\u0301",
        "\u202eключ 鍵 😀",
        "#no",
        "a\nb",
        " pad ",
        '"q"',
        "nul\0",
        "\ufeff",
        "",
    ],
)
def test_a_list_names_any_key(tmp_path, key):
    """A key is written as it is, or as JSON where a line cannot hold it; editors of Windows add a mark and returns."""
    rows = [{"key": name, "url": "", "sha256": "ab"} for name in (key, f"{key}x", f"x{key}")]
    forms = [json.dumps(f"set/{key}")]
    if "\n" not in key and key == key.strip():
        forms.append(f"set/{key}")
    for text in forms:
        entries = Listing(put(tmp_path / "list", f"\ufeffhost no.example\r\nkey {text}\r\n".encode()))
        assert [bool(entries.match("set", row)) for row in rows] == [True, False, False], text
        (entry,) = entries.match("set", rows[0])
        shown = Listing(put(tmp_path / "shown", f"{(line := entry_line(entry))}\n".encode()))
        assert line.isprintable()
        assert shown.entries == {entry}


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b'\nkey "set/a\n', r"list:2: UTF-8, with quoted values in JSON, is expected"),
        ("key a".encode("utf-16"), "list:0: UTF-8"),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(tmp_path, data, error):
    with pytest.raises(ConfigError, match=error):
        Listing(put(tmp_path / "list", data))


def test_codes_without_a_withdrawn_row_are_still_codes(tiny_root, tmp_path):
    folder = tmp_path / "crop"
    shutil.copytree(tiny_root / "data/codes/shapes/crop", folder)
    shard = read_manifest(folder).shards[1]
    before = pq.read_table(folder / shard.path)
    gone = before["key"].to_pylist()[3]
    assert takedown(folder, {shard.path: [gone, "no such key"]}) == 1
    after = pq.read_table(folder / shard.path)
    assert read_manifest(folder).rows == read_manifest(tiny_root / "data/codes/shapes/crop").rows - 1
    assert after.schema.equals(before.schema, check_metadata=True)
    assert after.to_pylist() == [row for row in before.to_pylist() if row["key"] != gone]


@pytest.mark.parametrize(
    ("url", "hit"),
    [
        ("https://cdn.bad.org/x.jpg", ["host bad.org"]),
        ("http://BAD.org:81/", ["host bad.org"]),
        ("https://notbad.org/x.jpg", []),
        ("https://a.org/x?y=1", ["url https://a.org/x?y=1"]),
        ("https://a.org/x", []),
        ("http://[broken", []),
        ("", []),
    ],
)
def test_hosts_and_urls_of_a_list(tmp_path, url, hit):
    entries = Listing(put(tmp_path / "list", b"host Bad.org\nurl https://a.org/x?y=1\n\n"))
    found = entries.match("set", {"key": "k", "url": url, "sha256": "ab"})
    assert [entry_line(entry) for entry in found] == hit
    with pytest.raises(ConfigError, match=r"list:2: 'urls http://a' is no entry"):
        Listing(put(tmp_path / "list", b"# ok\nurls http://a\n"))


def test_kept_rows_have_their_own_images_or_are_refused(tiny_root, tmp_path):
    rows = KeptRows(Layout(tiny_root), "shapes")
    table = rows.table(1)
    assert table["sha256"].to_pylist() == [hashlib.sha256(image).hexdigest() for image in table["image"].to_pylist()]
    assert rows.image(1, table["key"][3].as_py()) == table["image"][3].as_py()
    assert rows.image(1, "no such key") is None
    raw = pq.read_table(rows.raw / rows.raw_shards[1].path)
    less = raw.filter(pc.not_equal(raw["key"], table["key"][3].as_py()))
    task = ShardTask().placed(None, tmp_path / rows.shards[1].path, None, "made")
    with pytest.raises(DataError, match=r"not the rows that .*filter again"):
        kept_table(tmp_path, write_shard(task, less, {}).shard, rows.filtered, rows.shards[1])

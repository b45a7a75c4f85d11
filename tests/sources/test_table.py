"""Tables with images: each layout that people have gives the same rows, and what is wrong costs its row alone."""

import csv
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import PNG, accounted, card_of, download, gzipped, jpeg, jsonl, put, tarred

from unifork.errors import ConfigError
from unifork.sources import plan, rows_of

IMAGES = {f"b{number}": data for number, data in enumerate([jpeg("img0"), PNG["img1"], PNG["img2"], jpeg("img3")])}
TEXTS = ["one, two", 'a "quoted" text', "on two\nlines", "café"]
ROWS = [
    {"id": name, "file_name": f"{name}.jpg", "text": text, "score": 0.5}
    for name, text in zip(IMAGES, TEXTS, strict=True)
]


def folder(at):
    for name, data in IMAGES.items():
        put(at / f"set/images/{name}.jpg", data)


def text_table(rows, delimiter=","):
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def csv_and_folder(at):
    folder(at)
    put(at / "set/list.csv", text_table(ROWS))
    return {"files": "set/list.csv", "root": "set/images", "image": "file_name"}


def tsv_and_folder(at):
    folder(at)
    lines = ["\t".join(ROWS[0]), *("\t".join(map(str, row.values())).replace("\n", " ") for row in ROWS)]
    put(at / "set/list.tsv.gz", gzipped("\n".join(lines).encode()))
    return {"files": "set/*.tsv.gz", "root": "set/images", "image": "file_name"}


def jsonl_beside_its_images(at):
    folder(at)
    put(at / "set/images/metadata.jsonl", jsonl(ROWS))
    return {"files": "set/images", "image": "file_name"}  # paths start where the file lies


def parquet(at, image):
    rows = [{**row, "image": image(name, data)} for row, (name, data) in zip(ROWS, IMAGES.items(), strict=True)]
    (at / "set").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), at / "set/train-00000-of-00001.parquet", row_group_size=3)
    return {"files": "set"}


def hub_structs(at):
    return parquet(at, lambda name, data: {"bytes": data, "path": f"{name}.jpg"})


def plain_bytes(at):
    return parquet(at, lambda _, data: data)


def parquet_of_paths(at):
    folder(at)
    return {**parquet(at, lambda name, _: f"{name}.jpg"), "root": "set/images"}


def hub_paths(at):
    folder(at)
    return {**parquet(at, lambda name, _: {"bytes": None, "path": f"{name}.jpg"}), "root": "set/images"}


LAYOUTS = [
    csv_and_folder,
    tsv_and_folder,
    jsonl_beside_its_images,
    hub_structs,
    plain_bytes,
    parquet_of_paths,
    hub_paths,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(at, layout):
    options = {**layout(at), "texts": {"caption": "text"}, "keep": {"score": "score"}, "key": "id"}
    found = download(card_of("table", options, ["caption"], columns=["score"]), at / "raw", shard_rows=3)
    assert found.rejects == []
    texts = [text.replace("\n", " ") if layout is tsv_and_folder else text for text in TEXTS]
    rows = {key: (row["image"], row["caption"], row["score"]) for key, row in found.rows.items()}
    assert rows == {name: (IMAGES[name], text, "0.5") for name, text in zip(IMAGES, texts, strict=True)}
    numbered = {name: value for name, value in options.items() if name != "key"}
    (first, *_), *_ = accounted(card_of("table", numbered, ["caption"])).items()
    assert first.endswith("/000000000")


@pytest.mark.parametrize("layout", [csv_and_folder, jsonl_beside_its_images])
def test_an_edit_of_the_same_length_is_noticed(at, layout):
    card = card_of("table", {**layout(at), "texts": {"caption": "text"}}, ["caption"])
    download(card, at / "raw")
    (path,) = [path for path in (at / "set").rglob("*") if path.suffix in (".csv", ".jsonl")]
    path.write_bytes(path.read_bytes().replace(b"one, two", b"two, one"))
    assert "two, one" in [row["caption"] for row in download(card, at / "raw").rows.values()]


def test_what_is_wrong_costs_its_row(at):
    folder(at)
    put(at / "outside.jpg", jpeg("img0"))
    (at / "set/images/link.jpg").symlink_to(at / "outside.jpg")
    put(at / "set/images/large.jpg", b"")
    with open(at / "set/images/large.jpg", "r+b") as file:
        file.truncate(33 << 20)
    rows = {
        "b0.jpg": "ok", "gone.jpg": "missing_image", "../../outside.jpg": "path_outside", "link.jpg": "path_outside",
        str(at / "outside.jpg"): "path_outside", "large.jpg": "too_large", "": "no_image",
        "https://x.example/a.jpg": "no_image",
    }  # fmt: skip
    body = b"image,text\n" + b"".join(f"{path},x\n".encode() for path in rows) + b"b0.jpg\nb1.jpg,\n"
    put(at / "set/list.csv", body)
    options = {"files": "set/list.csv", "root": "set/images", "texts": {"caption": "text"}}
    found = accounted(card_of("table", options, ["caption"]))
    expected = [*rows.values(), "broken_line", "missing_caption"]
    assert [found[f"list/{number:09d}"] for number in range(len(expected))] == expected


def test_bytes_have_bounds_and_a_cut_table_is_one_error(at):
    images = [IMAGES["b0"], bytes(33 << 20), None, b""]
    table = pa.table({"image": images, "text": ["x"] * 4, "id": ["a", "b", "c", None]})
    (at / "set").mkdir()
    pq.write_table(table, at / "set/a.parquet")
    whole = (at / "set/a.parquet").read_bytes()
    put(at / "set/b.parquet", whole[:-100])
    options = {"files": "set", "texts": {"caption": "text"}}
    assert accounted(card_of("table", options, ["caption"])) == {
        "a/000000000": "ok", "a/000000001": "too_large", "a/000000002": "no_image", "a/000000003": "no_image",
        "b/000000000": "broken_list",
    }  # fmt: skip


def test_keys_are_named_once_and_never_empty(at):
    folder(at)
    lines = [{"image": "b0.jpg", "text": "x", "id": key} for key in (7, 7, None, "../up", float("nan"))]
    put(at / "set/list.jsonl", jsonl(lines))
    options = {"files": "set/list.jsonl", "root": "set/images", "texts": {"caption": "text"}, "key": "id"}
    card = card_of("table", options, ["caption"])
    found = [
        row if isinstance(row, dict) else row.reason for task in plan(card, None, 9, 0) for row in rows_of(card, task)
    ]
    assert sorted(str(row["key"]) if isinstance(row, dict) else row for row in found) == [
        "7", "duplicate_key", "no_key", "no_key", "path_outside",
    ]  # fmt: skip


@pytest.mark.parametrize("column", ["img", "txt"])
def test_a_column_that_is_not_there_is_a_mistake_in_the_card(at, column):
    put(at / "a.csv", b"image,text\nx,y\n")
    options = {"files": "a.csv", "image": "image", "texts": {"caption": "text"}}
    options |= {"image": column} if column == "img" else {"texts": {"caption": column}}
    with pytest.raises(ConfigError, match=rf"card sample: a\.csv: unknown column '{column}'"):
        plan(card_of("table", options, ["caption"]), None, 2, 0)


def test_what_is_no_text_is_no_caption(at):
    """Lists and structs are quarantined, an element of one is named by its number; bytes are text in UTF-8."""
    values = [["one", "two"], {"a": "b"}, b"caf\xc3\xa9", b"\xff", " \n", 7, True]
    (at / "set").mkdir()
    for number, value in enumerate(values):
        pq.write_table(pa.table({"image": [IMAGES["b0"]], "text": [value]}), at / f"set/{number}.parquet")
    card = card_of("table", {"files": "set", "texts": {"caption": "text"}}, ["caption"])
    found = download(card, at / "raw")
    assert {row["caption"] for row in found.rows.values()} == {"café", "7", "true"}
    reasons = ["broken_text", "broken_text", "broken_text", "missing_caption"]
    assert [reason for _, reason in found.rejects] == reasons
    assert "`text.0`: first of a list" in found.details["0/000000000"]
    options = {"files": "set/0.parquet", "texts": {"caption": "text.1", "first": "text.0", "none": "text.2"}}
    (row,) = download(card_of("table", options, ["caption", "first", "none"]), at / "two").rows.values()
    assert (row["caption"], row["first"], row["none"]) == ("two", "one", None)


def test_turns_have_two_spellings_and_are_texts(at):
    put(at / "set/a.jpg", IMAGES["b0"])
    parts = [{"type": "text", "text": "It?"}]
    rows = [
        [{"role": "user", "content": "It?"}],
        [{"from": "human", "value": "It?"}],
        [{"role": "user", "content": parts}],
    ]
    put(at / "set/l.jsonl", jsonl([{"image": "a.jpg", "messages": turns} for turns in rows]))
    found = download(
        card_of("table", {"files": "set", "texts": {"conversations": "messages"}}, ["conversations"]), at / "raw"
    )
    assert [row["conversations"] for row in found.rows.values()] == [[{"role": "user", "text": "It?"}]] * 2
    assert found.rejects == [("l/000000002", "broken_dialogue")]


def test_names_of_columns_may_hold_dots(at):
    put(at / "set/images/b0.jpg", IMAGES["b0"])
    rows = {"img.path": ["b0.jpg"], "txt.caption": ["x"], "meta": [{"txt": "y"}]}
    (at / "set").mkdir(exist_ok=True)
    pq.write_table(pa.table(rows), at / "set/a.parquet")
    put(at / "set/b.csv", b"img.path,txt.caption,meta\nb0.jpg,x,\n")
    options = {"files": "set", "root": "set/images", "image": "img.path", "texts": {"caption": "txt.caption"}}
    card = card_of("table", {**options, "keep": {"more": "meta.txt"}}, ["caption"], columns=["more"])
    found = download(card, at / "raw")
    assert {key: (row["caption"], row["more"]) for key, row in found.rows.items()} == {
        "a/000000000": ("x", "y"), "b/000000000": ("x", None),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["A.PARQUET", "A.CSV", "A.TSV.GZ", "A.JSONL.GZ", "A.JSON", "A.JSONL.TGZ"])
def test_endings_in_capitals_are_read_alike(at, name):
    put(at / "set/b0.JPG", IMAGES["b0"])
    row, out = {"image": "b0.JPG", "text": "x"}, io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row]), out)
    data = {
        ".PARQUET": out.getvalue(), ".CSV": text_table([row]), ".TSV.GZ": gzipped(text_table([row], "\t")),
        ".JSONL.GZ": gzipped(jsonl([row])), ".JSON": json.dumps([row]).encode(),
        ".JSONL.TGZ": tarred([("a.jsonl", jsonl([row]))], "w:gz"),
    }  # fmt: skip
    put(at / "set" / name, data[name.removeprefix("A")])
    card = card_of("table", {"files": "set", "texts": {"caption": "text"}}, ["caption"])
    assert accounted(card) == {"A/000000000": "ok"}


def test_rows_of_files_with_dots_in_their_names_have_different_keys(at):
    for name in ("a.1.csv", "a.2.csv", "a.2.tsv000", "b.snappy.parquet.csv"):
        put(at / "set" / name, b"url,text\nhttps://x.example/1.jpg,x\n")
    options = {"files": "set/*", "image": "url", "texts": {"caption": "text"}, "fetch": {}}
    urls = card_of("url_list", {"files": "set/*"}, ["caption"])
    keys = ["a.1/000000000", "a.2/000000000", "a.2.tsv000/000000000", "b.snappy.parquet/000000000"]
    assert sorted(accounted(urls)) == sorted(keys)
    put(at / "set/a.1.csv.gz", gzipped(b"url,text\nhttps://x.example/1.jpg,x\n"))
    for card in (urls, card_of("table", {**options, "files": "set/*.[cg][sz]*"}, ["caption"])):
        with pytest.raises(ConfigError, match=r"a\.1\.csv and a\.1\.csv\.gz: their rows would have the same keys"):
            plan(card, None, 2, 0)


def test_addresses_are_read_as_rows_to_fetch(at):
    links = ["https://x.example/1.jpg", "https://x.example/2.jpg"]
    put(
        at / "a.jsonl",
        jsonl([*({"link": link, "text": "x"} for link in links), {"text": "x"}, {"link": [], "text": "x"}]),
    )
    card = card_of(
        "table", {"files": "a.jsonl", "image": "link", "texts": {"caption": "text"}, "fetch": {}}, ["caption"]
    )
    rows = [row for task in plan(card, None, 9, 0) for row in rows_of(card, task)]
    assert sorted(row["url"] for row in rows if isinstance(row, dict)) == links
    assert [row.reason for row in rows if not isinstance(row, dict)] == ["no_url", "no_url"]
    assert json.dumps([row for row in rows if isinstance(row, dict)])  # plain values, no image among them

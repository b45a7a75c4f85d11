"""Lists and tables of strangers: every entry is in a class and counted, in bounded memory."""

import io
import json
import os
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import (
    JPEG,
    accounted,
    card_of,
    download,
    gzipped,
    jsonl,
    put,
    tarred,
    zeros,
)

from unifork.errors import ConfigError
from unifork.sources import RowError, plan, rows_of

# ------------------------------------------------------------------------------------------ lists


def a_list(lists="sets", images="images", **more):
    return card_of("table", {"files": lists, "root": images, "texts": {"caption": "c"}, **more}, ["caption"])


def test_lines_of_lists(at, little_memory):
    put(at / "images/a.jpg", JPEG)
    lines = {
        b'{"image": "a.jpg", "c": "x"}': "ok", b'{"image": "a.jpg", "c": "\\ud83d"}': "broken_text",
        b'{"image": "a.jpg", "c": "\\ud83d\\ude00"}': "ok", b'{"image": "a.jpg", "c": "caf\xe9"}': "broken_text",
        b'{"image": "\\udfff.jpg", "c": "x"}': "broken_text", b"[" * 100_000: "broken_line",
        b'{"c":' * 100_000: "broken_line", b"": "broken_line", b"null": "broken_line",
        b'{"image": "a.jpg", "c": "' + b"x" * (17 << 20) + b'"}': "broken_line",
        b'{"image": "' + b"x" * 5000 + b'", "c": "x"}': "missing_image",
        b'{"image": "' + b"x/" * 5000 + b'", "c": "x"}': "missing_image",
        b'{"image": "\\u0000", "c": "x"}': "missing_image", b'{"image": ".", "c": "x"}': "not_a_file",
        b'{"image": "/etc/hostname", "c": "x"}': "path_outside", b'{"image": {"a": 1}, "c": "x"}': "no_image",
        b'{"image": [["a.jpg"]], "c": "x"}': "no_image", b'{"image": "a.jpg", "c": NaN}': "missing_caption",
        b'{"image": "a.jpg", "c": ' + b"9" * 5000 + b"}": "broken_line",
        b'{"image": "a.jpg", "c": [1, {"d": "\\udc00"}]}': "broken_text",
    }  # fmt: skip
    put(at / "sets/l.jsonl", b"\n".join(lines))
    for shard_rows in (1, 7, 100):
        result = download(a_list(), at / f"raw-{shard_rows}", shard_rows=shard_rows)
        found = dict(result.rejects) | dict.fromkeys(result.rows, "ok")
        assert [found[f"l/{number:09d}"] for number in range(len(lines))] == list(lines.values())


@pytest.mark.slow
def test_damaged_lists_cost_themselves_alone(at):
    put(at / "images/a.jpg", JPEG)
    letters = random.Random(0)
    lines = jsonl([{"image": "a.jpg", "c": f"{letters.random()}"} for _ in range(4000)])
    inner = tarred([("l.jsonl", lines)])
    for name, data in {
        "good.jsonl": lines[: lines.index(b"\n") + 1], "cut.jsonl.gz": gzipped(lines)[:-2000], "empty.jsonl": b"",
        "cut2.jsonl.tgz": gzipped(inner)[:-2000],
        "two.jsonl.tgz": tarred([("a.jsonl", lines), ("b.jsonl", lines)], "w:gz"),
        "noise.jsonl.gz": b"not gzip", "noise2.jsonl.tgz": b"not gzip", "none.jsonl.tgz": b"", "none2.json": b"",
        "page.json": b"<html>", "flipped.jsonl.gz": gzipped(lines)[:20000] + b"\0\0\0" + gzipped(lines)[20003:],
    }.items():  # fmt: skip
        put(at / "sets" / name, data)
    found = accounted(a_list(), 500)
    assert found["good/000000000"] == "ok"
    kept = [key for key, reason in found.items() if reason == "ok"]
    for name in ("cut", "cut2", "flipped"):
        assert 400 < sum(key.startswith(f"{name}/") for key in kept) < 4000
    assert set(found.values()) == {"ok", "broken_list", "broken_line"}  # the latter of what unpacks to noise
    for name in ("two", "noise", "noise2", "none", "none2", "page"):
        assert found[f"{name}/000000000"] == "broken_list"
    result = download(a_list(), at / "raw", shard_rows=500)
    assert "one jsonl file is expected" in result.details["two/000000000"]


def test_a_list_that_unpacks_to_gigabytes_is_one_broken_line(at, little_memory):
    put(at / "images/a.jpg", JPEG)
    zeros(at / "sets/l.jsonl.gz", b'{"image": "a.jpg", "c": "x"}\n', 160 << 20, b'\n{"image": "a.jpg", "c": "x"}\n')
    assert accounted(a_list()) == {"l/000000000": "ok", "l/000000001": "broken_line", "l/000000002": "ok"}


@pytest.mark.parametrize(
    ("change", "error"),
    [({"repeat_time": repeat}, rf"meta\.json': x\.repeat_time: .*{repeat}.* at least 0") for repeat in ("often", -1)]
    + [({"repeat_time": float("nan")}, r"x\.repeat_time: nan"), ({"repeat_time": float("inf")}, "x.repeat_time: inf")]
    + [({"repeat_time": None}, r"x\.repeat_time: None"), ({"repeat_time": [1]}, r"x\.repeat_time: \[1\]")]
    + [({"annotation": "folder.jsonl"}, r"meta\.json': x\.annotation: 'folder\.jsonl' is a folder")]
    + [({"annotation": "nowhere.jsonl"}, "'nowhere.jsonl': no such file"), ({"root": "x" * 5000}, "no such file")]
    + [({"root": 5}, "root, annotation, repeat_time.* is expected; TypeError"), ({"annotation": "\0"}, "no such file")]
    + [({"annotation": "\ud83d"}, "no such file or folder")],
)
def test_a_meta_file_says_what_is_wrong_with_it(at, change, error):
    put(at / "images/a.jpg", JPEG)
    put(at / "folder.jsonl/x", b"")
    put(at / "l.jsonl", jsonl([{"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}]))
    put(at / "meta.json", json.dumps({"x": {"root": "images", "annotation": "l.jsonl", **change}}).encode())
    with pytest.raises(ConfigError, match=error):
        plan(card_of("table_meta", {"meta": "meta.json"}, ["conversations"]), None, 5, 0)


def test_a_meta_file_without_lists_or_with_a_name_twice(at):
    put(at / "images/a.jpg", JPEG)
    put(at / "l.jsonl", jsonl([{"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}] * 3))
    card = card_of("table_meta", {"meta": "meta.json"}, ["conversations"])
    entry = b'{"root": "images", "annotation": "l.jsonl"}'
    put(at / "meta.json", b'{"x": %s, "y": %s, "x": %s}' % (entry, entry, entry))
    found = accounted(card, 2)
    assert [sum(key.startswith(name) and reason == why for key, reason in found.items()) for name, why in (
        ("x/", "ok"), ("y/", "ok"), ("x#again", "duplicate_key"))] == [3, 3, 3]  # fmt: skip
    for nothing, error in ((b"{}", "finds nothing"), (b"[]", "finds nothing"), (b"5", "TypeError"), (b"[" * 100_000,
                           "RecursionError"), (b'{"x"', "JSONDecodeError"),
                           (b"\xff", "UnicodeDecodeError")):  # fmt: skip
        put(at / "meta.json", nothing)
        with pytest.raises(ConfigError, match=error):
            plan(card, None, 5, 0)


# ----------------------------------------------------------------------------------------- tables


def table(**columns):
    return card_of("url_list", {"files": "sets", "columns": columns}, ["caption"])


ROWS = [(f"http://h.example/{number}.png", f"text {number}") for number in range(12)]


def written(ending: str, changes: dict[int, str], encoding: str = "utf-8", text_first: bool = False) -> bytes:
    """Twelve rows and a header, one line each; some lines are changed."""
    mark = "\t" if ending == "tsv" else ","
    lines = [mark.join(reversed(row) if text_first else row) for row in [("url", "text"), *ROWS]]
    for number, line in changes.items():
        lines[number + 1] = line
    return ("\n".join(lines) + "\n").encode(encoding, "surrogateescape")


@pytest.mark.parametrize("text_first", [False, True])
def test_a_quote_that_stands_alone_costs_its_row(at, text_first):
    quoted = ROWS[7][0], '"seven inches'
    swapped = ROWS[7][0], 'seven "inches'
    good = ROWS[3][0], '"two\nlines, and a ""quote"""'
    order = (lambda row: ",".join(reversed(row))) if text_first else ",".join
    for broken, reason in ((quoted, "broken_line"), (swapped, "ok")):
        put(at / "sets/l.csv", written("csv", {7: order(broken), 3: order(good)}, text_first=text_first))
        for shard_rows in (1, 5, 100):
            found = accounted(table(), shard_rows)
            assert [found[f"l/{number:09d}"] for number in range(12)] == ["ok"] * 7 + [reason] + ["ok"] * 4
    rows = [row for task in plan(table(), None, 100, 0) for row in rows_of(table(), task)]
    assert rows[3]["caption"] == 'two\nlines, and a "quote"'
    assert (rows[8]["url"], rows[8]["caption"]) == ROWS[8]
    put(at / "sets/l.csv", written("csv", {2: order(quoted), 7: order(quoted), 8: order(quoted), 11: order(quoted)},
                                   text_first=text_first))  # fmt: skip
    assert list(accounted(table()).values()).count("broken_line") == 4
    put(at / "sets/l.csv", b"")
    os.remove(at / "sets/l.csv")
    put(at / "sets/l.tsv", written("tsv", {7: "\t".join(quoted), 3: 'http://h.example/"\t"'}))
    rows = [row for task in plan(table(), None, 100, 0) for row in rows_of(table(), task)]
    assert [(row["url"], row["caption"]) for row in rows[7:9]] == [quoted, ROWS[8]]
    assert len(rows) == 12


def test_long_fields_and_lines_and_other_letters(at, little_memory):
    changes = {1: f"{ROWS[1][0]},{'x' * 70_000}", 2: f"{ROWS[2][0]},{'x' * 200_000}", 4: f"{ROWS[4][0]},caf\udce9",
               5: f"{ROWS[5][0]}\udce9,x", 6: f"{ROWS[6][0]},{'x' * (17 << 20)}", 8: ",no url", 9: "a,b,c", 10: "",
               11: f'{ROWS[11][0]},"' + ("x" * 49 + "\n") * 4_000}  # fmt: skip
    put(at / "sets/l.csv", written("csv", changes))
    found = accounted(table(), 200_000)
    shown = [found[f"l/{number:09d}"] for number in range(12)]
    assert shown == ["ok", "broken_line", "broken_line", "ok", "broken_text", "broken_text", "broken_line", "ok",
                     "no_url", "broken_line", "broken_line", "broken_line"]  # fmt: skip
    assert len(found) == 12 + 4_001 - 1
    os.remove(at / "sets/l.csv")
    zeros(at / "sets/l.csv.gz", written("csv", {}), 64 << 20, b"\n" + written("csv", {}))
    assert list(accounted(table(), 100).values()) == ["ok"] * 25 + ["broken_line"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_marks_at_the_beginning_of_a_table(at, encoding, ending):
    data = written(ending, {3: "\t".join(("http://h.example/", "drei ü"))} if ending == "tsv" else {}, encoding)
    if encoding.endswith("e"):
        data = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}[encoding] + data
    put(at / f"sets/l.{ending}", data)
    rows = [row for task in plan(table(), None, 5, 0) for row in rows_of(table(), task)]
    assert [(row["url"], row["caption"]) for row in rows if row["key"] != "l/000000003"] == [
        row for number, row in enumerate(ROWS) if number != 3
    ]


def test_damaged_tables_cost_themselves_alone(at):
    def parquet(number=2000, **how):
        out = io.BytesIO()
        columns = {
            "url": [f"http://h.example/{i}" for i in range(number)],
            "text": [f"{i * 77777}" for i in range(number)],
        }
        pq.write_table(pa.table(columns), out, row_group_size=500, use_dictionary=False, compression="zstd", **how)
        return out.getvalue()

    whole = parquet(data_page_size=1 << 20)
    group = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(1).column(1)
    place = group.data_page_offset
    text = written("csv", {})
    for name, data in {
        "good.parquet": parquet(3), "short.parquet": whole[:5], "empty.parquet": b"",
        "footer.parquet": whole[:-20] + whole[-8:],
        "page.parquet": b"<html>", "lying.parquet": whole[:-8] + b"\xff\xff\xff\x7fPAR1", "cut.parquet": whole[:-3000],
        "flip.parquet": whole[:place] + bytes(b ^ 0xFF for b in whole[place : place + 60]) + whole[place + 60 :],
        "cut2.csv.gz": gzipped(text)[:-20], "noise.csv.gz": b"no gzip", "none.csv": b"",
        "noise2.csv": b"\xfe\x9c\x00\xff",
        "none2.tsv.gz": b"", "odd.csv": text.decode().encode("utf-16")[:-1],
    }.items():  # fmt: skip
        put(at / "sets" / name, data)
    found = accounted(table(), 700)
    count = {name: [reason for key, reason in found.items() if key.startswith(f"{name}/")] for name in (
        "good", "short", "empty", "footer", "page", "lying", "flip", "noise", "noise2", "none", "none2")}  # fmt: skip
    assert count["good"] == ["ok"] * 3
    for name in ("short", "empty", "footer", "page", "lying", "noise", "noise2", "none", "none2"):
        assert count[name] == ["broken_list"], name
    assert (count["flip"].count("ok"), count["flip"].count("broken_list")) == (1500, 500), "one row group is lost"
    with pytest.raises(ConfigError, match=r"none2?\.csv|noise2?\.csv|other\.csv: no column of URLs"):
        put(at / "sets/other.csv", b"a,b\n1,2\n")
        accounted(table())


def test_texts_and_keys_of_parquet(at):
    raw = pa.array([b"x", b"caf\xe9", b"\xed\xa0\xbd", b"x", None, b"x", b"x", b"x", b"x"])
    columns = {
        "url": pa.array(
            [b"http://h/", b"http://h/", b"http://h/", b"http://h/\xff", b"http://h/", None] + [b"http://h/"] * 3
        ),
        "text": raw,
        "id": pa.array([b"a", b"b", b"c", b"d", None, b"f", b" ", b"a", b"../x"]),
    }
    expected = [
        "ok",
        "broken_text",
        "broken_text",
        "broken_text",
        "no_key",
        "no_url",
        "no_key",
        "duplicate_key",
        "path_outside",
    ]
    for kind in (pa.binary(), pa.string(), pa.large_string()):
        arrays = {}
        for name, column in columns.items():
            binary = column.cast(pa.large_binary() if kind == pa.large_string() else pa.binary())
            arrays[name] = binary if kind == pa.binary() else pa.Array.from_buffers(kind, len(binary), binary.buffers())
        put(at / "sets/placeholder.txt", b"")
        pq.write_table(pa.table(arrays), at / "sets/l.parquet")
        card = table(key="id")
        rows = [row for task in plan(card, None, 100, 0) for row in rows_of(card, task)]
        assert [row.reason if isinstance(row, RowError) else "ok" for row in rows] == expected
        assert [row.key if isinstance(row, RowError) else row["key"] for row in rows] == [
            "a", "l/000000001", "l/000000002", "l/000000003", "l/000000004", "l/000000005", "l/000000006", "a", "../x",
        ]  # fmt: skip
    put(at / "sets/l.parquet", b"")
    os.remove(at / "sets/l.parquet")
    pq.write_table(
        pa.table({"url": pa.array([], pa.string()), "text": pa.array([], pa.string())}), at / "sets/l.parquet"
    )
    put(at / "sets/l.csv", b"url,text\n")
    with pytest.raises(ConfigError, match="a 'url_list' source finds nothing"):
        plan(table(), None, 5, 0)

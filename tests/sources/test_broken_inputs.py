"""What strangers send: every entry is in a class and counted, in bounded memory, and nothing outside is touched."""

import errno
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import (
    PNG,
    accounted,
    card_of,
    download,
    filtered,
    gzipped,
    jpeg,
    jsonl,
    links,
    put,
    sparse_tar,
    tarred,
)
from PIL import Image
from tiny import REPOSITORY

from unifork.config.card import Shrink
from unifork.errors import ConfigError, MachineError
from unifork.image_tokenizer.views import crop_view, pad_view
from unifork.shards.task import Slice
from unifork.sources import Materialize, RowError, Source, SourceOptions, download_job, image_row, plan, rows_of
from unifork.sources import archives as archives_module
from unifork.sources.paths import ChangedFile
from unifork.sources.web.client import Refused
from unifork.sources.web.download import inspect

JPEG = jpeg("img0")


@pytest.fixture
def at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def little_memory():
    """Python may hold little more than the largest thing that is read at once."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 130e6, f"{peak / 1e6:.0f} MB"


def pairs(**options):
    return card_of("pairs", {"files": "sets", **options}, ["caption"])


# ---------------------------------------------------------------------------------- archives, folders


def test_links_and_what_is_no_file_in_a_tar(at):
    members = [
        ("a.jpg", JPEG), ("a.txt", b"a"),
        ("hard.jpg", (tarfile.LNKTYPE, "a.jpg")), ("hard.txt", (tarfile.LNKTYPE, "./a.txt")),
        ("again.jpg", (tarfile.LNKTYPE, "hard.jpg")), ("again.txt", b"a link to a link"),
        ("soft.jpg", (tarfile.SYMTYPE, "a.jpg")), ("soft.txt", (tarfile.SYMTYPE, "/etc/hostname")),
        ("late.jpg", (tarfile.LNKTYPE, "later.jpg")), ("late.txt", b"x"), ("later.jpg", JPEG), ("later.txt", b"x"),
        ("fifo.jpg", (tarfile.FIFOTYPE, "")), ("fifo.txt", b"x"), ("device.jpg", (tarfile.CHRTYPE, "")),
        ("folder.jpg", (tarfile.DIRTYPE, "")), ("outside.jpg", (tarfile.LNKTYPE, "../../a.jpg")), ("other", b"x"),
        ("self.jpg", (tarfile.LNKTYPE, "self.jpg")),
    ]  # fmt: skip
    for mode in ("w", "w:gz"):
        put(at / "sets" / f"s.tar{'.gz' if ':' in mode else ''}", links(members, mode))
        found = accounted(pairs())
        assert found == {
            "s/a": "ok", "s/hard": "ok", "s/again": "ok", "s/soft": "not_a_file", "s/late": "not_a_file",
            "s/later": "ok", "s/fifo": "not_a_file", "s/device": "not_a_file", "s/outside": "not_a_file",
            "s/self": "not_a_file",
        }  # fmt: skip
        os.remove(next((at / "sets").iterdir()))
    put(at / "sets/s.tar", links(members))
    result = download(pairs(), at / "raw", shard_rows=100)
    assert result.rows["s/hard"]["image"] == result.rows["s/again"]["image"] == JPEG
    assert (result.rows["s/hard"]["caption"], result.rows["s/again"]["caption"]) == ("a", "a link to a link")
    assert "is a link to '/etc/hostname'" in str(result.details) or "is a link to 'a.jpg'" in result.details["s/soft"]


def test_names_that_are_no_text_or_lead_outside(at):
    names = ["good", "../up", "/abs", "a/../../b", "caf\udce9", "./dot", "nested/deep"]
    put(at / "sets/s.tar", tarred([(f"{name}{ending}", data) for name in names
                                   for ending, data in ((".jpg", JPEG), (".txt", b"x"))]))  # fmt: skip
    found = accounted(pairs())
    assert found == {
        "s/good": "ok", "s/../up": "path_outside", "s//abs": "path_outside", "s/a/../../b": "path_outside",
        "s/caf\udce9": "broken_name", "s/dot": "ok", "s/nested/deep": "ok",
    }  # fmt: skip
    result = download(pairs(), at / "raw")
    assert ("s/caf\\udce9", "broken_name") in result.rejects
    assert sorted(result.rows) == ["s/dot", "s/good", "s/nested/deep"]
    folder = at / "folder"
    for name in (b"caf\xe9", b"good"):
        put(folder / "x" / "placeholder", b"")
        for ending, data in ((b".jpg", JPEG), (b".txt", b"x")):
            with open(os.path.join(os.fsencode(folder / "x"), name + ending), "wb") as file:
                file.write(data)
    assert accounted(pairs(files="folder")) == {"x/good": "ok", "x/caf\udce9": "broken_name"}


def test_links_out_of_a_folder_are_not_followed(at):
    put(at / "secret.txt", b"secret")
    put(at / "secret.jpg", JPEG)
    put(at / "elsewhere/inner.jpg", JPEG)
    for name in "abcdef":
        put(at / f"sets/x/{name}.jpg", JPEG)
        put(at / f"sets/x/{name}.txt", b"x")
    for name, target in {"a.txt": "/etc/hostname", "b.txt": "../../secret.txt", "c.jpg": at / "secret.jpg",
                         "d.jpg": "a.jpg", "e.jpg": "nowhere.jpg"}.items():  # fmt: skip
        os.remove(at / "sets/x" / name)
        os.symlink(target, at / "sets/x" / name)
    os.remove(at / "sets/x/f.jpg")
    os.mkfifo(at / "sets/x/f.jpg")
    os.symlink(at / "elsewhere", at / "sets/x/linked")
    found = accounted(pairs(), 100)
    assert found == {
        "x/a": "path_outside", "x/b": "path_outside", "x/c": "path_outside", "x/d": "ok", "x/e": "not_a_file",
        "x/f": "not_a_file", "x": "not_a_file",
    }  # fmt: skip
    os.symlink(at / "secret.txt", put(at / "texts/a.txt", b"").with_name("d.txt"))
    card = pairs(captions="texts")
    assert {key: reason for key, reason in accounted(card, 100).items() if key == "x/d"} == {"x/d": "path_outside"}
    entries = [
        {"image": name, "c": "x"} for name in ("a.jpg", "c.jpg", "d.jpg", "linked/inner.jpg", "f.jpg", "x" * 5000)
    ]
    put(at / "list.jsonl", jsonl(entries))
    listed = card_of("listed", {"lists": "list.jsonl", "images": "sets/x", "texts": {"caption": "c"}}, ["caption"])
    assert [accounted(listed)[f"list/{number:09d}"] for number in range(len(entries))] == [
        "ok", "path_outside", "ok", "path_outside", "not_a_file", "missing_image",
    ]  # fmt: skip


def test_members_have_bounds(at, little_memory):
    big, long = bytes(33 << 20), b"x" * (2 << 20)
    put(at / "sets/a.tar.gz", tarred([("a.jpg", big), ("a.txt", b"x"), ("b.jpg", JPEG), ("b.txt", long),
                                      ("c.jpg", JPEG), ("c.txt", b"x")], "w:gz"))  # fmt: skip
    put(at / "sets/b.tar", sparse_tar("a.jpg", 6 << 30))
    assert len((at / "sets/b.tar").read_bytes()) == 10_240
    assert accounted(pairs()) == {"a/a": "too_large", "a/b": "too_large", "a/c": "ok", "b/a": "too_large"}
    for name, data in (("a.jpg", big), ("a.txt", b"x"), ("b.jpg", JPEG), ("b.txt", long)):
        put(at / "folders/x" / name, data)
    assert accounted(pairs(files="folders")) == {"x/a": "too_large", "x/b": "too_large"}
    put(at / "texts/b.txt", long)
    assert accounted(pairs(files="folders", captions="texts"))["x/b"] == "too_large"


def zeros(path, begin: bytes, size: int, end: bytes = b"") -> None:
    """A compressed file of almost nothing but zeros."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(begin)
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
        file.write(end)


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_what_unpacks_to_gigabytes_is_not_held_in_memory(at, kind, little_memory):
    """Neither as a member nor as the name or the attributes of one."""
    end = tarred([("b.jpg", JPEG), ("b.txt", b"x")])
    zeros(at / "sets/a.tar.gz", header("a.jpg", 160 << 20, kind), 160 << 20, end)
    put(at / "sets/c.tar", end)
    found = accounted(pairs())
    lost = {"a/a": "too_large", "a/b": "ok"} if kind == tarfile.REGTYPE else {"a.tar.gz": "broken_archive"}
    assert found == {**lost, "c/b": "ok"}


def test_damaged_archives_cost_themselves_alone(at):
    whole = tarred([("a.jpg", JPEG), ("a.txt", b"x"), ("b.jpg", JPEG), ("b.txt", b"x")])
    noise = random.Random(0).randbytes(5000)
    for name, data in {"empty.tar": b"", "noise.tar": noise, "short.tgz": gzipped(whole)[:-100], "good.tar": whole,
                       "flipped.tgz": gzipped(whole)[:200] + b"\0" * 30 + gzipped(whole)[230:],
                       "page.tar": b"<html>Not found</html>", "zero.tar": bytes(10240)}.items():  # fmt: skip
        put(at / "sets" / name, data)
    os.symlink("nowhere", at / "sets/gone.tar")
    found = accounted(pairs())
    assert {key for key, reason in found.items() if reason == "ok"} >= {"good/a", "good/b"}
    assert {key for key, reason in found.items() if reason == "broken_archive"} >= {
        "empty.tar", "noise.tar", "short.tgz", "flipped.tgz", "page.tar", "gone.tar",
    }  # fmt: skip
    assert set(found.values()) == {"ok", "broken_archive"}
    put(at / "texts.tgz", gzipped(tarred([(f"{name}.txt", b"t" * 5000) for name in "ab"]))[:-60])
    found = accounted(pairs(captions="texts.tgz"))
    assert found["good/b"] == "missing_caption"


def test_class_tars_that_come_twice_and_a_tar_of_tars_that_breaks_off_are_counted(at):
    put(at / "prompts.yaml", b"names: [tench, kite]\ntemplates: ['a {}.']\n")
    put(at / "order.txt", b"n1 a\nn2 b\n")
    card = card_of("imagenet", {"path": "train.tar", "prompts": "prompts.yaml", "synsets": "order.txt"}, ["class_name"])
    first, second = (tarred([(f"n{n}_1.JPEG", jpeg(f"img{n}"))]) for n in (1, 2))
    put(at / "train.tar", tarred([("n1.tar", first), ("n2.tar", second), ("n1.tar", second), ("n1.tar", second)]))
    result = download(card, at / "raw", shard_rows=9)
    assert {key: row["class_name"] for key, row in result.rows.items()} == {"n1/n1_1": "tench", "n2/n2_1": "kite"}
    assert result.rejects == [("n1", "duplicate_key")] * 2
    put(
        at / "train.tar",
        tarred([("n1.tar", first), ("a/n1.tar", second), ("n2.tar", second)])[: 1200 + len(first) + len(second)],
    )
    found = accounted(card, 9)
    assert found == {"n1/n1_1": "ok", "n1/n2_1": "ok", "train.tar": "broken_archive"}
    put(at / "train.tar", links([("n1.tar", first), ("n2.tar", second), ("n2.tar.jpg", (tarfile.SYMTYPE, "n1.tar"))]))
    assert accounted(card, 9) == {"n1/n1_1": "ok", "n2/n2_1": "ok"}


# ------------------------------------------------------------------------------------------ lists


def a_list(lists="sets", images="images", **more):
    return card_of("listed", {"lists": lists, "images": images, "texts": {"caption": "c"}, **more}, ["caption"])


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
        b'{"image": [["a.jpg"]], "c": "x"}': "no_image", b'{"image": "a.jpg", "c": NaN}': "ok",
        b'{"image": "a.jpg", "c": ' + b"9" * 5000 + b"}": "broken_line",
        b'{"image": "a.jpg", "c": [1, {"d": "\\udc00"}]}': "broken_text",
    }  # fmt: skip
    put(at / "sets/l.jsonl", b"\n".join(lines))
    for shard_rows in (1, 7, 100):
        result = download(a_list(), at / f"raw-{shard_rows}", shard_rows=shard_rows)
        found = dict(result.rejects) | dict.fromkeys(result.rows, "ok")
        assert [found[f"l/{number:09d}"] for number in range(len(lines))] == list(lines.values())


def test_damaged_lists_cost_themselves_alone(at):
    put(at / "images/a.jpg", JPEG)
    letters = random.Random(0)
    lines = jsonl([{"image": "a.jpg", "c": f"{letters.random()}"} for _ in range(4000)])
    inner = tarred([("l.jsonl", lines)])
    for name, data in {
        "good.jsonl": lines[: lines.index(b"\n") + 1], "cut.jsonl.gz": gzipped(lines)[:-2000], "empty.jsonl": b"",
        "cut2.jsonl.tgz": gzipped(inner)[:-2000],
        "two.jsonl.tgz": tarred([("a.jsonl", lines), ("b.jsonl", lines)], "w:gz"),
        "noise.jsonl.gz": b"not gzip", "noise.jsonl.tgz": b"not gzip", "none.jsonl.tgz": b"", "none.json": b"",
        "page.json": b"<html>", "flipped.jsonl.gz": gzipped(lines)[:20000] + b"\0\0\0" + gzipped(lines)[20003:],
    }.items():  # fmt: skip
        put(at / "sets" / name, data)
    found = accounted(a_list(), 500)
    assert found["good/000000000"] == "ok"
    kept = [key for key, reason in found.items() if reason == "ok"]
    for name in ("cut", "cut2", "flipped"):
        assert 400 < sum(key.startswith(f"{name}/") for key in kept) < 4000
    assert set(found.values()) == {"ok", "broken_list", "broken_line"}  # the latter of what unpacks to noise
    for name in ("two", "noise", "none", "page"):
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
        plan(card_of("listed_meta", {"meta": "meta.json"}, ["conversations"]), None, 5, 0)


def test_a_meta_file_without_lists_or_with_a_name_twice(at):
    put(at / "images/a.jpg", JPEG)
    put(at / "l.jsonl", jsonl([{"image": "a.jpg", "conversations": [{"from": "human", "value": "x"}]}] * 3))
    card = card_of("listed_meta", {"meta": "meta.json"}, ["conversations"])
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
               11: f'{ROWS[11][0]},"' + "x\n" * 100_000}  # fmt: skip
    put(at / "sets/l.csv", written("csv", changes))
    found = accounted(table(), 200_000)
    shown = [found[f"l/{number:09d}"] for number in range(12)]
    assert shown == ["ok", "broken_line", "broken_line", "ok", "broken_text", "broken_text", "broken_line", "ok",
                     "no_url", "broken_line", "broken_line", "broken_line"]  # fmt: skip
    assert len(found) == 12 + 100_001 - 1
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
        "cut.csv.gz": gzipped(text)[:-20], "noise.csv.gz": b"no gzip", "none.csv": b"",
        "noise.csv": b"\xfe\x9c\x00\xff",
        "none.tsv.gz": b"", "odd.csv": text.decode().encode("utf-16")[:-1],
    }.items():  # fmt: skip
        put(at / "sets" / name, data)
    found = accounted(table(), 700)
    count = {name: [reason for key, reason in found.items() if key.startswith(f"{name}/")] for name in (
        "good", "short", "empty", "footer", "page", "lying", "flip", "noise", "none")}  # fmt: skip
    assert count["good"] == ["ok"] * 3
    for name in ("short", "empty", "footer", "page", "lying", "noise", "none"):
        assert count[name] == ["broken_list"], name
    assert (count["flip"].count("ok"), count["flip"].count("broken_list")) == (1500, 500), "one row group is lost"
    with pytest.raises(ConfigError, match=r"none\.csv|noise\.csv|other\.csv: no column of URLs"):
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


# -------------------------------------------------------------------------------------- all kinds


def source_of_rows(make):
    return Source(SourceOptions, lambda options, shard_rows: iter([Slice(0, 6)]), make)


def named(key):
    return image_row(key, JPEG, caption="x")


def breaks(options, piece, seed):
    yield named("a")
    yield RowError("mine/000000003", "no_image", "x")
    raise KeyError("what nobody thought of")


def ends(options, piece, seed):
    yield from map(named, "ab")


def strange(options, piece, seed):
    yield from (named("a"), None, {"image": b""}, named(" "), named("\ud83d"), {**named("b"), "caption": 5})


def repeats(options, piece, seed):
    yield from map(named, ("a", "a", "/b", "b/../c", "d", "d"))


def refuses(options, piece, seed):
    raise ConfigError("no such thing")


def disk(options, piece, seed):
    yield named("a")
    raise OSError(errno.EIO, "Input/output error")


def changed(options, piece, seed):
    raise ChangedFile("another file")


SOURCES = {name: source_of_rows(globals()[name]) for name in (
    "breaks", "ends", "strange", "repeats", "refuses", "disk", "changed")}  # fmt: skip
BREAKS, ENDS, STRANGE, REPEATS, REFUSES, DISK, CHANGED = SOURCES.values()


@pytest.mark.parametrize(
    ("name", "kept", "rejects"),
    [
        ("BREAKS", ["a"], [("mine/000000003", "no_image"),
                           *((f"sample/00000000{n}", "broken_list") for n in (2, 3, 4, 5))]),
        ("ENDS", ["a", "b"], [(f"sample/00000000{n}", "broken_list") for n in (2, 3, 4, 5)]),
        ("STRANGE", ["a"], [("\\ud83d", "broken_name"), ("b", "unexpected"), ("sample/000000001", "unexpected"),
                            ("sample/000000002", "no_key"), ("sample/000000003", "no_key")]),
        ("REPEATS", ["a", "d"], [("/b", "path_outside"), ("a", "duplicate_key"), ("b/../c", "path_outside"),
                                 ("d", "duplicate_key")]),
    ],
)  # fmt: skip
def test_whatever_a_source_does_its_entries_are_counted(at, name, kept, rejects):
    result = download(card_of(f"{__name__}:{name}", {}, ["caption"]), at / "raw", shard_rows=6)
    assert (sorted(result.rows), result.rejects) == (kept, rejects)
    if name == "BREAKS":
        assert result.details["sample/000000005"] == "KeyError: 'what nobody thought of'"


@pytest.mark.parametrize(
    ("name", "error"), [("REFUSES", ConfigError), ("DISK", MachineError), ("CHANGED", ChangedFile)]
)
def test_what_no_input_is_to_blame_for_ends_the_work(at, name, error):
    card = card_of(f"{__name__}:{name}", {}, ["caption"])
    (task,) = plan(card, None, 6, 0)
    with pytest.raises(error):
        Materialize(card)(task)


def test_a_disk_that_fails_under_an_archive_drops_no_row(at, monkeypatch):
    put(at / "sets/s.tar", tarred([("a.jpg", JPEG), ("a.txt", b"x")]))
    (task,) = plan(pairs(), None, 5, 0)

    def failing(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(archives_module, "_read", failing)
    with pytest.raises(MachineError, match=r"Stale file handle: it cannot be read. Mend the disk"):
        list(rows_of(pairs(), task))


def test_no_program_is_started_for_what_is_called_an_image(at):
    """Pillow runs Ghostscript for an EPS, whatever it is called."""
    put(at / "bin/gs", b"#!/bin/sh\ntouch %s\n" % os.fsencode(at / "started")).chmod(0o755)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    put(at / "sets/s.tar", tarred([("a.jpg", eps), ("a.txt", b"x"), ("b.jpg", JPEG), ("b.txt", b"x")]))
    code = "from archive_samples import *; import sys\nfrom pathlib import Path\n" \
           "from unifork.sources.web.client import Refused\nfrom unifork.sources.web.download import inspect\n" \
           "card = card_of('pairs', {'files': 'sets'}, ['caption'], shrink={'longest_side': 5})\n" \
           "download(card, Path('shrunk'))\n" \
           "card = card_of('pairs', {'files': 'sets'}, ['caption'])\ndownload(card, Path('raw'))\n" \
           "result = filtered(card, Path('raw'), Path('kept'))\nprint(result.manifest.dropped)\n" \
           f"try: inspect({eps!r}, 100)\nexcept Refused as refused: print(refused.reason)\n"  # fmt: skip
    environment = os.environ | {"PATH": f"{at / 'bin'}:{os.environ['PATH']}",
                                "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["{'not_an_image': 1}", "not_an_image"], done.stderr
    assert not (at / "started").exists()


# -------------------------------------------------------------------------- images, and shrinking them


def saved(image: Image.Image, kind: str, **how) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def scanned(scans: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = saved(Image.open(io.BytesIO(PNG["img0"])).convert("RGB"), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def test_images_that_cost_much_or_cannot_be_viewed_are_kept_and_named_by_the_filter(at):
    """At download nothing is decoded of what lies here; of the web everything but what is too thin."""
    thin = saved(Image.new("L", (1, 3000)), "GIF")
    images = {"good": JPEG, "thin": thin, "scans": scanned(500), "few": scanned(5), "empty": b"", "page": b"<html>",
              "short": JPEG[: len(JPEG) // 2]}  # fmt: skip
    put(at / "sets/s.tar", tarred([(f"{name}{ending}", data) for name, image in images.items()
                                   for ending, data in ((".jpg", image), (".txt", b"x"))]))  # fmt: skip
    raw = download(pairs(), at / "raw", shard_rows=100)
    assert {key.removeprefix("s/"): row["image"] for key, row in raw.rows.items()} == images
    result = filtered(pairs(), at / "raw", at / "kept")
    reasons = {"s/thin": "too_thin", "s/scans": "too_many_scans", "s/empty": "empty", "s/page": "not_an_image",
               "s/short": "undecodable"}  # fmt: skip
    assert (dict(result.rejects), sorted(result.rows)) == (reasons, ["s/few", "s/good"])
    for key, reason in {**reasons, "s/thin": None, "s/good": None}.items():
        image = images[key.removeprefix("s/")]
        if reason is None:
            assert inspect(image, 10**6)["image"] == image
        else:
            with pytest.raises(Refused, match=reason):
                inspect(image, 10**6)


@pytest.mark.parametrize("kind", ["jpeg", "webp", "png"])
def test_larger_images_are_shrunk_where_the_card_says_so(at, kind):
    colors = Image.linear_gradient("L").resize((200, 100))
    alpha = Image.merge("RGBA", (colors, colors, colors, Image.linear_gradient("L").resize((200, 100))))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    images = {
        "small": saved(colors.resize((64, 30)), "PNG"),
        "large": saved(colors.convert("RGB"), "JPEG", exif=rotated), "alpha": saved(alpha, "PNG"),
        "palette": saved(colors.convert("P"), "GIF"), "cmyk": saved(colors.convert("CMYK"), "JPEG"),
        "gray16": saved(colors.convert("I;16"), "PNG"), "tall": saved(colors.resize((30, 200)), "PNG"),
        "broken": saved(Image.effect_noise((200, 100), 64), "PNG")[:2000],
        "thin": saved(Image.new("L", (1, 3000)), "GIF"),
    }  # fmt: skip
    put(at / "sets/s.tar", tarred([(f"{name}{ending}", data) for name, image in images.items()
                                   for ending, data in ((".jpg", image), (".txt", b"x"))]))  # fmt: skip
    longest = 64
    card = card_of("pairs", {"files": "sets"}, ["caption"], matte=(10, 20, 30),
                   shrink={"longest_side": longest, "format": kind})  # fmt: skip
    result = download(card, at / "raw", shard_rows=100)
    reasons = {"s/broken": "undecodable", "s/thin": "too_thin"}
    assert dict(result.rejects) == reasons
    for key, row in result.rows.items():
        received = images[key.removeprefix("s/")]
        assert row["sha256"] == hashlib.sha256(received).hexdigest()
        image = Image.open(io.BytesIO(row["image"]))
        assert (row["width"], row["height"]) == image.size
        if max(Image.open(io.BytesIO(received)).size) <= longest:
            assert row["image"] == received
            continue
        assert (image.format, max(image.size)) == (kind.upper(), longest)
        assert not image.getexif()
        before = Image.open(io.BytesIO(received))
        assert abs(image.width / image.height - before.width / before.height) < 0.3
        for view in (crop_view, pad_view):
            difference = view(image, 16, card.matte).astype(int) - view(before, 16, card.matte)
            assert abs(difference).mean() < 8
    again = download(card, at / "again", shard_rows=100)
    assert [shard.sha256 for shard in again.manifest.shards] == [shard.sha256 for shard in result.manifest.shards]
    plain, other = (card.model_copy(update={"shrink": shrink}) for shrink in (None, Shrink(longest_side=longest)))
    inputs = {download(each, at / f"raw{number}", shard_rows=100).manifest.shards[0].inputs
              for number, each in enumerate((plain, other, card))}  # fmt: skip
    assert len(inputs) == (2 if kind == "jpeg" else 3)
    made_with = [download_job(each, None, 5, 0, at / "x").made_with for each in (plain, card)]
    assert ["shrink" in each for each in made_with] == [False, True]
    assert filtered(card, at / "raw", at / "kept").manifest.dropped.keys() == set()

"""Archives and folders of strangers: every entry is in a class and counted, in bounded memory."""

import os
import random
import tarfile

import pytest
from archive_samples import (
    JPEG,
    accounted,
    card_of,
    download,
    gzipped,
    jpeg,
    jsonl,
    links,
    pairs,
    put,
    sparse_tar,
    tarred,
    zeros,
)

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
    listed = card_of("table", {"files": "list.jsonl", "root": "sets/x", "texts": {"caption": "c"}}, ["caption"])
    assert [accounted(listed)[f"list/{number:09d}"] for number in range(len(entries))] == [
        "ok", "path_outside", "ok", "path_outside", "not_a_file", "missing_image",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_names_with_dots_are_pairs_and_further_fields_are_none(at, form):
    members = [
        ("IMG.2021.1.jpg", JPEG), ("IMG.2021.1.txt", b"\xef\xbb\xbfone"), ("IMG.2021.2.jpg", JPEG),
        ("IMG.2021.2.txt", b"two"), ("IMG.2021.3.jpg", JPEG), ("b.jpg", JPEG), ("b.txt", b"b"), ("b.old.txt", b"x"),
        ("c.image.jpg", JPEG), ("c.txt", b"c"), ("c.seg.png", JPEG), ("d.more.txt", b"d"),
    ]  # fmt: skip
    if form == "tar":
        put(at / "sets/t.1.tar", tarred(members))
    for name, data in members if form == "folder" else ():
        put(at / "sets" / name, data)
    found = download(pairs(), at / "raw")
    place = "t.1/" if form == "tar" else ""
    captions = {"IMG.2021.1": "one", "IMG.2021.2": "two", "b": "b", "c": "c"}
    assert {key: row["caption"] for key, row in found.rows.items()} == {place + key: captions[key] for key in captions}
    assert found.rejects == [
        (place + "IMG.2021.3", "missing_caption"), (place + "c", "duplicate_key"), (place + "d.more", "missing_image"),
    ]  # fmt: skip
    assert found.details[place + "IMG.2021.3"] == "an image of that name, but no .txt"


def test_what_begins_with_a_dot_is_no_data_and_linked_folders_are_not_followed(at):
    for folder in ("sets/a", "sets/.trash", "sets/a/.cache", "elsewhere"):
        put(at / folder / "x.jpg", JPEG)
        put(at / folder / "x.txt", b"x")
    (at / "sets/b").symlink_to(at / "elsewhere")
    assert accounted(pairs()) == {"a/x": "ok", "b": "not_a_file"}
    (at / "named").symlink_to(at / "sets")  # what a card names may be a link
    assert accounted(pairs(files="named")) == {"a/x": "ok", "b": "not_a_file"}
    put(
        at / "tars/t.tar", tarred([("./.c/x.jpg", JPEG), ("./c/._x.jpg", JPEG), ("./c/x.jpg", JPEG), ("c/x.txt", b"x")])
    )
    assert accounted(pairs(files="tars")) == {"t/c/x": "ok"}


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

"""Each source on small files in the exact layout of its publisher, quirks included. Nothing is lost uncounted."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from archive_samples import PNG, card_of, download, filtered, gzipped, jpeg, jsonl, put, tarred
from test_image_lists import dialogue

from unifork.config import load_card
from unifork.errors import ConfigError
from unifork.shards.task import Slice
from unifork.sources import RowError, Source, SourceOptions, plan, rows_of, source_of
from unifork.sources.imagenet import sentences

DATASETS = Path(__file__).parent.parent.parent / "datasets"


# ------------------------------------------------------------------------------- pairs of one name


def test_webdataset_tars_keep_every_sample_whatever_the_order_of_members(at):
    put(at / "wds/dalle3/shards-00001.tar", tarred([
        ("./b.txt", b"second, text first"), ("a.jpg", jpeg("img0")), ("b.jpg", PNG["img1"]), ("a.txt", b" a cat \n"),
        ("._a.jpg", b"left by macOS"), ("c.jpg", jpeg("img2")), ("d.txt", b"no image"), ("a.txt", b"again"),
        ("e.JPG", jpeg("img3")), ("e.txt", b""), ("f.jpg", jpeg("img4")), ("f.txt", b"\xff\xfe"), ("a.json", b"{}"),
    ]))  # fmt: skip
    put(at / "wds/geneval_train/shards-00001.tar", tarred([("a.jpg", jpeg("img5")), ("a.txt", b"two dogs")]))
    card = card_of("pairs", {"files": "wds"}, ["caption"])
    result = download(card, at / "raw")
    place = "dalle3/shards-00001"
    assert {key: row["caption"] for key, row in result.rows.items()} == {
        f"{place}/a": "a cat", f"{place}/b": "second, text first", f"{place}/e": "",
        "geneval_train/shards-00001/a": "two dogs",
    }  # fmt: skip
    assert result.rejects == [
        (f"{place}/a", "duplicate_key"), (f"{place}/c", "missing_caption"),
        (f"{place}/d", "missing_image"), (f"{place}/f", "broken_text"),
    ]  # fmt: skip
    assert result.rows[f"{place}/b"]["image"] == PNG["img1"], "a PNG that is called jpg stays as it is"
    assert filtered(card, at / "raw", at / "filtered").manifest.dropped == {"no_text": 1}


@pytest.mark.parametrize("captions", ["folder", "tar.gz"])
@pytest.mark.parametrize("images", ["tar", "folder"])
def test_sa1b_joins_captions_that_lie_apart_by_name(at, captions, images):
    members = [(f"sa_{n}.jpg", jpeg(f"img{n}")) for n in range(5)] + [("sa_0.json", b'{"annotations": []}')]
    texts = [(f"captions/sa_{n}.txt", f"The image features {n}.".encode()) for n in (0, 1, 3, 4, 77)]
    if images == "tar":
        put(at / "sa/sa_000000.tar", tarred(members[:3] + members[-1:]))
        put(at / "sa/sa_000001.tar", tarred(members[3:5]))
    else:
        for number, (name, data) in enumerate(members):
            put(at / f"sa/sa_00000{int(number > 2)}" / name, data)
    if captions == "folder":
        for name, data in texts:
            put(at / name, data)
    else:
        put(at / "SA1B_caption.tar.gz", tarred(texts, "w:gz"))
    where = "captions" if captions == "folder" else "SA1B_caption.tar.gz"
    result = download(card_of("pairs", {"files": "sa", "captions": where}, ["caption"]), at / "raw")
    found = {key.rpartition("/")[2]: row["caption"] for key, row in result.rows.items()}
    assert found == {f"sa_{n}": f"The image features {n}." for n in (0, 1, 3, 4)}
    assert result.rejects == [("sa_000000/sa_2", "missing_caption")]


def test_a_tar_that_breaks_off_keeps_what_came_before(at):
    pairs = [[(f"{number}.txt", b"x"), (f"{number}.jpg", jpeg(f"img{number}"))] for number in range(7)]
    data = tarred([member for pair in pairs for member in pair])
    packed = gzipped(data)
    at_a_header = data.index(b"5.txt") + 100
    for name, cut in (
        ("plain.tar", data[: len(data) // 2]), ("header.tar", data[:at_a_header]),
        ("damaged.tar", data[:at_a_header] + b"?" * 50 + data[at_a_header + 50 :]),
        ("packed.tar.gz", packed[: len(packed) // 2]),
    ):  # fmt: skip
        put(at / name / name, cut)
        result = download(card_of("pairs", {"files": name}, ["caption"]), at / f"raw-{name}")
        assert len(result.rows) >= 1
        assert "broken_archive" in {reason for _, reason in result.rejects}


# ------------------------------------------------------------------------------------ texts alone


def test_a_corpus_of_lists_and_tables(at):
    texts = [f"Text {number}." for number in range(7)]
    put(at / "corpus/a.jsonl", jsonl([{"text": texts[0]}, b"{broken", {"text": None}, {"text": texts[1], "n": 5}]))
    put(at / "corpus/b.jsonl.gz", gzipped(jsonl([{"text": texts[2]}])))
    put(at / "corpus/c.json", json.dumps([{"text": texts[3]}, {"text": "\ud83d"}]).encode())
    table = pa.table({"text": [*texts[4:], None], "n": [1, 2, 3, 4]})
    pq.write_table(table, at / "corpus/d.parquet", row_group_size=2)
    put(at / "corpus/e.parquet", b"PAR1 broken")
    options = {"files": "corpus", "texts": {"text": "text"}, "keep": {"n": "n"}}
    card = card_of("table", {"image": None, **options}, ["text"], text_only="keep", columns=["n"])
    with pytest.raises(ConfigError, match=r"d\.parquet: unknown column 'm'"):
        download(
            card_of("table", {"image": None, **options} | {"keep": {"m": "m"}}, ["text"], text_only="keep"), at / "raw"
        )
    result = download(card, at / "raw")
    assert {key: row["text"] for key, row in result.rows.items()} == {
        "a/000000000": texts[0], "a/000000003": texts[1], "b/000000000": texts[2], "c/000000000": texts[3],
        **{f"d/{number:09d}": texts[4 + number] for number in range(3)},
    }  # fmt: skip
    assert [result.rows[key]["n"] for key in ("a/000000003", "d/000000001")] == ["5", "2"]
    assert {row["image"] for row in result.rows.values()} == {None}
    assert result.rejects == [
        ("a/000000001", "broken_line"), ("a/000000002", "missing_caption"), ("c/000000001", "broken_text"),
        ("d/000000003", "missing_caption"), ("e/000000000", "broken_list"),
    ]  # fmt: skip
    measured = filtered(card, at / "raw", at / "filtered")
    assert measured.rows.keys() == result.rows.keys()


def test_dialogues_of_a_table_are_translated(at):
    pq.write_table(pa.table({"conversations": [dialogue("Q", "A"), dialogue("Q")]}), at / "sft.parquet")
    options = {"files": "sft.parquet", "texts": {"conversations": "conversations"}}
    result = download(card_of("table", {"image": None, **options}, ["conversations"], text_only="keep"), at / "raw")
    assert result.rows["sft/000000000"]["conversations"] == [
        {"role": "user", "text": "Q"}, {"role": "assistant", "text": "A"},
    ]  # fmt: skip


def test_a_corpus_whose_card_drops_texts_is_refused(at):
    put(at / "a.jsonl", jsonl([{"text": "x"}]))
    with pytest.raises(ConfigError, match="card sample: text_only: no row of its source has an image; say text_"):
        source_of(card_of("table", {"image": None, "files": "a.jsonl", "texts": {"text": "text"}}, ["text"]))


# --------------------------------------------------------------------------------------- all kinds


def test_a_new_set_with_a_known_kind_is_one_file(at):
    card = yaml.safe_load((DATASETS / "llava.yaml").read_text())
    card |= {"name": "mine", "source": {"kind": "pairs", "options": {"files": "$IMAGES/*.tar"}},
             "tasks": {"generation": {"view": "crop", "texts": ["caption"]}}}  # fmt: skip
    shutil.copytree(DATASETS, at / "datasets")
    (at / "datasets/mine.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(ConfigError, match=r"card mine: .*the environment variable IMAGES is not set"):
        download(load_card("mine"), at / "raw")


def test_rows_limits_what_is_read_and_a_file_at_the_end_adds_its_shard_alone(at):
    for number in range(3):
        put(at / f"wds/{number}.tar", tarred([("a.jpg", jpeg(f"img{number}")), ("a.txt", b"x")]))
    card = card_of("pairs", {"files": "wds"}, ["caption"])
    assert len(download(card, at / "two", rows=2).manifest.shards) == 2
    before = download(card, at / "raw").manifest
    put(at / "wds/3.tar", tarred([("a.jpg", jpeg("img3")), ("a.txt", b"x")]))
    job = download(card, at / "raw").manifest
    assert [s.inputs for s in job.shards[:3]] == [s.inputs for s in before.shards]
    assert len(job.shards) == 4


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY"])
def test_what_variables_hold_reaches_no_file_and_no_message(at, monkeypatch, capsys, name):
    put(at / "private-7731/wds/a.tar", tarred([("a.jpg", jpeg("img0")), ("a.txt", b"x")]))
    monkeypatch.setenv("IMAGES", "private-7731")
    monkeypatch.setenv(name, "private-7731")
    download(card_of("pairs", {"files": "${IMAGES}/wds", "access": "ask"}, ["caption"]), at / "raw")
    with pytest.raises(ConfigError, match=f"must not hold .{name}") as refused:
        download(card_of("pairs", {"files": f"${name}/wds"}, ["caption"]), at / "raw2")
    contents = [path.read_bytes() for path in (at / "raw").rglob("*") if path.is_file()]
    assert contents
    assert not any(b"7731" in data for data in contents)
    assert "7731" not in str(refused.value) + "".join(capsys.readouterr())


def test_options_are_checked_and_missing_files_say_where_they_are(at):
    with pytest.raises(ConfigError, match=r"card sample: .*nowhere.*no such file.*Where it is: ask the makers"):
        download(card_of("pairs", {"files": "nowhere", "access": "ask the makers"}, ["caption"]), at / "raw")
    unknown = r"card sample: source\.options: unknown key 'file'\. Did you mean 'files'\? Known: access, captions"
    with pytest.raises(ConfigError, match=unknown):
        source_of(card_of("pairs", {"files": ".", "file": "x"}, ["caption"]))
    with pytest.raises(ConfigError, match=r"card sample: source\.options\.files: Field required"):
        source_of(card_of("pairs", {}, ["caption"]))
    with pytest.raises(ConfigError, match=r"unknown kind of source 'pair'\. Did you mean 'pairs'\?.*it is: ask them"):
        source_of(card_of("pair", {"access": "ask them"}, ["caption"]))


def test_how_a_person_gets_the_files_is_part_of_no_fingerprint():
    options = [source_of(card_of("pairs", {"files": "x", **more}, ["caption"]))[1] for more in ({}, {"access": "ask"})]
    assert options[0].fingerprint() == options[1].fingerprint()


@pytest.mark.parametrize(
    ("kind", "options", "name", "reader"),
    [
        ("pairs", {"files": "a.parquet"}, "a.parquet", "read by table"),
        ("pairs", {"files": "folder"}, "folder/a.jsonl", "read by table"),
        ("table", {"files": "*.tar", "root": ".", "texts": {"caption": "c"}}, "a.tar", "read by pairs"),
    ],
)
def test_a_file_of_another_kind_says_who_reads_it(at, kind, options, name, reader):
    put(at / name, b"x")
    with pytest.raises(ConfigError, match=rf"card sample: {Path(name).name}: this kind reads \.\w+, .*{reader}"):
        plan(card_of(kind, options, ["caption"]), None, 2, 0)


def test_a_source_without_entries_is_an_error(at):
    put(at / "a.jsonl", b"")
    card = card_of("table", {"files": "a.jsonl", "root": ".", "texts": {"caption": "c"}}, ["caption"])
    with pytest.raises(ConfigError, match="card sample: a 'table' source finds nothing"):
        plan(card, None, 2, 0)


def test_another_seed_makes_only_what_depends_on_it_anew(at):
    put(at / "wds/a.tar", tarred([("a.jpg", jpeg("img0")), ("a.txt", b"x")]))
    pairs, world = card_of("pairs", {"files": "wds"}, ["caption"]), load_card("shapes", DATASETS)
    assert plan(pairs, None, 2, 1) == plan(pairs, None, 2, 2)
    assert plan(world, 5, 2, 1) != plan(world, 5, 2, 2)
    assert [task.rows for task in plan(world, 5, 2, 1)] == [2, 2, 1]
    with pytest.raises(ConfigError, match=r"card shapes: .* endless; say how many rows"):
        plan(world, None, 2, 1)


class Numbers(SourceOptions):
    first: int = 0


NUMBERS = Source(
    Numbers,
    lambda options, shard_rows: iter([Slice(options.first, options.first + shard_rows)]),
    lambda options, piece, seed: (
        RowError(str(number), "no_image", "a number") for number in range(piece.start, piece.stop)
    ),
)


def test_anybodys_code_is_a_source(at):
    card = card_of(f"{__name__}:NUMBERS", {"first": 3}, ["caption"])
    (task,) = plan(card, None, 2, 0)
    assert [fault.key for fault in rows_of(card, task)] == ["3", "4"]
    with pytest.raises(ConfigError, match="is a function, not a Source"):
        source_of(card_of(f"{__name__}:jsonl", {}, ["caption"]))


def test_openais_sentences_are_part_of_the_package():
    shipped = sentences(None)
    assert (len(shipped.names), len(set(shipped.templates))) == (1000, 80)
    assert (shipped.names[0], shipped.names[999]) == ("tench", "toilet paper")


def test_wrong_sentences_are_named(at):
    put(at / "prompts.yaml", b"names: [tench]\ntemplates: ['a photo of {c}.']\n")
    with pytest.raises(ConfigError, match=r"prompts\.yaml: templates\.0: .*a photo of \{c\}"):
        sentences("prompts.yaml")

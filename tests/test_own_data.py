"""`docs/own-data.md`: its layouts are read by the commands of the page, and its example goes to a report."""

import csv
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from archive_samples import PNG, jpeg, jsonl, put, tarred
from test_end_to_end import checkout, run  # noqa: F401  a fixture
from typer.testing import CliRunner

from pipelines import image_tokenizer
from unifork.cli import app
from unifork.config import load_card
from unifork.errors import ConfigError, DataError
from unifork.experiments import names, resolve, use
from unifork.sources import RowError, plan, rows_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/own-data.md").read_text()
COMMANDS = re.findall(r"^\|.*`unifork (new birds --from .*)` \|$", PAGE, re.MULTILINE)
ROWS = [
    {"image": f"{number:03d}.jpg", "text": text}
    for number, text in enumerate(["a bird", "a \"red\" bird, small", "two birds", "no birds"])
]  # fmt: skip
DATA = [jpeg(f"img{number}") for number in range(4)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The project's experiments and cards, and the same rows in every layout."""
    for folder in ("experiments", "datasets", "clusters"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    archives = tmp_path / "archives"
    table = io.StringIO()
    writer = csv.DictWriter(table, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
    put(archives / "csv/birds.csv", table.getvalue().encode())
    put(archives / "jsonl/metadata.jsonl", jsonl(ROWS))
    links = "".join(f"{n},https://birds.example/{n}.jpg,a bird\n" for n in range(4))
    put(archives / "urls/list.csv", f"id,link,title\n{links}".encode())
    members = []
    for row, data in zip(ROWS, DATA, strict=True):
        put(archives / "csv/images" / row["image"], data)
        put(archives / "jsonl" / row["image"], data)
        files = [(row["image"], data), (row["image"].replace(".jpg", ".txt"), row["text"].encode())]
        for name, content in files:
            put(archives / "pairs" / name, content)
        members += files
    put(archives / "tars/000.tar", tarred(members))
    structs = [{"bytes": data, "path": row["image"]} for row, data in zip(ROWS, DATA, strict=True)]
    (archives / "hub/data").mkdir(parents=True)
    columns = {"id": [1, 2, 3, 4], "image": structs, "text": [row["text"] for row in ROWS]}
    pq.write_table(pa.table(columns), archives / "hub/data/train-00000-of-00001.parquet")
    return tmp_path


def new(*words):
    done = CliRunner().invoke(app, ["new", *words])
    if done.exception:
        raise done.exception
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_each_layout_of_the_page_is_read(here, command):
    text = new(*command.replace("'", "").split()[1:])
    assert re.search(r"^4 entries; the first:$", text, re.MULTILINE)
    size = r"https://birds.example/\d.jpg" if "urls" in command else r"\d+ x \d+"
    assert len(re.findall(rf"^  \S+  {size}  '.*'$", text, re.MULTILINE)) == 3
    assert re.search(r"^training .*: 1\.300 k steps, .* text tokens", text, re.MULTILINE)
    assert "next: unifork use birds && dvc repro" in text
    card = load_card("birds")
    rows = [row for task in plan(card, None, 500, 0) for row in rows_of(card, task)]
    assert not [row for row in rows if isinstance(row, RowError)]
    assert {row["caption"] for row in rows} == ({"a bird"} if "urls" in command else {row["text"] for row in ROWS})
    if "urls" not in command:
        assert sorted(row["image"] for row in rows) == sorted(DATA)
    experiment = resolve("birds")
    assert (list(experiment.datasets), experiment.benchmarks) == (["birds"], {})
    assert len(experiment.runs) == 3


def test_the_page_names_every_layout():
    assert len(COMMANDS) == 6


@pytest.mark.parametrize("name", ["on", "null", "a-b"])
def test_a_name_that_yaml_reads_otherwise_is_refused(here, name):
    with pytest.raises(ConfigError, match=f"'{name}': letters, digits and _ are expected"):
        new(name, "--from", "archives/csv")


@pytest.mark.parametrize("like", ["demo", "micro"])
def test_what_is_written_can_be_used_and_is_never_overwritten(here, like):
    new("birds", "--from", "archives/csv", "--like", like)
    assert use("birds").name == "birds"
    assert names()["birds"].startswith("birds, 4 rows: a first experiment")
    with pytest.raises(ConfigError, match=r"datasets/birds\.yaml is there already; nothing is overwritten"):
        new("birds", "--from", "archives/pairs")


def test_dialogues_are_read_by_understanding_alone(here):
    turns = [{"from": "human", "value": "<image>\nIt?"}, {"from": "gpt", "value": "A bird."}]
    put(
        here / "archives/jsonl/dialogues.jsonl",
        jsonl([{"image": row["image"], "conversations": turns} for row in ROWS]),
    )
    assert "'<image> It? / A bird.'" in new("talk", "--from", "archives/jsonl/dialogues.jsonl", "--like", "micro")
    tracks = use("talk").stages["s3"].tracks
    assert list(tracks) == ["understanding"]


def test_equal_names_beside_several_tables_are_their_own_images(here):
    """The Hub's imagefolder: a table in each folder of a split, whose paths start there."""
    for split, data in zip(("test", "train"), DATA, strict=False):
        put(here / "archives/splits" / split / "0.jpg", data)
        put(here / "archives/splits" / split / "metadata.csv", f"file_name,text\n0.jpg,{split} 0\n".encode())
    new("birds", "--from", "archives/splits")
    card = load_card("birds")
    rows = [row for task in plan(card, None, 500, 0) for row in rows_of(card, task)]
    assert {row["caption"]: row["image"] for row in rows} == {"test 0": DATA[0], "train 0": DATA[1]}
    for split in ("test", "train"):  # and where they lie beside each table, nothing says whose they are
        (here / "archives/splits" / split / "images").mkdir()
        (here / "archives/splits" / split / "0.jpg").rename(here / "archives/splits" / split / "images/0.jpg")
    with pytest.raises(ConfigError, match=r"no image '0\.jpg' below archives/splits/test, archives/splits, "):
        new("more", "--from", "archives/splits")


@pytest.mark.parametrize(
    "text", ["\ud83d half", "nul\0 \u2028 \x85 \x9b: [a, b] # 'c' \U0001f600", "\n", "long " * 50, '"on"', "- yes"]
)
def test_whatever_the_first_texts_are_two_files_are_written(here, text):
    rows = [{"image": "000.jpg", "text": text}, {"image": "001.jpg", "text": "two"}, {"image": "none.jpg", "text": "x"}]
    put(here / "archives/jsonl/odd.jsonl", jsonl(rows))
    out = new("birds", "--from", "archives/jsonl/odd.jsonl", "--like", "micro")
    lost = 1 + (text[0] in "\ud83d\n")
    assert f"left out of the first 3: 1 {'missing_image' if lost == 1 else ''}" in out
    prompts = [*([text] if lost == 1 and len(text) < 200 else []), "two"]
    assert list(use("birds").stages["s3"].sample_prompts) == prompts


def test_empty_texts_beside_images_are_shown(here):
    put(here / "archives/pairs/000.txt", b"")
    assert "  000  40 x 40  ''" in re.sub(r"\d+ x \d+", "40 x 40", new("birds", "--from", "archives/pairs"))


def test_several_captions_of_an_image_and_columns_with_dots_and_other_urls(here):
    links = "".join(f"https://p.example/{n},https://i.example/{n}.jpg?w=1,a bird\n" for n in range(2))
    put(here / "archives/urls/more.csv", f"page,src.url,meta.title\n{links}".encode())
    new("links", "--from", "archives/urls/more.csv", "--text", "meta.title")
    options = load_card("links").source.options
    assert (options["image"], options["texts"]) == ("src.url", {"caption": "meta.title"})
    put(here / "archives/jsonl/lists.jsonl", jsonl([{"image": "000.jpg", "captions": ["a bird", "one bird"]}]))
    assert "'a bird'" in new("lists", "--from", "archives/jsonl/lists.jsonl", "--text", "captions")
    assert load_card("lists").source.options["texts"] == {"caption": "captions.0"}


@pytest.mark.parametrize("form", ["from", "role"])
def test_rows_of_a_mix_of_dialogues_are_all_kept(here, form):
    keys = {"from": ("from", "value"), "role": ("role", "content")}[form]
    turns = [[dict(zip(keys, turn, strict=True)) for turn in (("user", f"{mark}It?"), ("assistant", "A bird."))]
             for mark in ("", "<image>", "<image><image>")]  # fmt: skip
    images = [None, "000.jpg", ["000.jpg", "001.jpg"]]
    rows = [{"image": image, "messages": talk} for image, talk in zip(images, turns, strict=True)]
    put(here / "archives/jsonl/mix.jsonl", jsonl(rows))
    out = new("talk", "--from", "archives/jsonl/mix.jsonl", "--like", "micro")
    assert "  mix/000000000  no image  'It? / A bird.'" in out
    assert "left out" not in out


@pytest.mark.parametrize(
    ("files", "words", "message"),
    [
        ("archives/none", (), "'archives/none': no such file or folder"),
        ("archives/notext", (), "the first entries are no rows: missing_caption: an image of that name, but no .txt"),
        ("archives/numbers.csv", (), "no column of images; found: a, b. Name it: --image COLUMN"),
        ("archives/csv", ("--text", "txet"), "unknown column 'txet'. Did you mean 'text'"),
        ("archives/lost.csv", (), r"no image '/x/1.jpg' below archives, .*paths are relative to a folder"),
        ("archives/csv", ("--like", "paper"), "unknown experiment 'paper'. Known: demo, micro"),
        ("loose.csv", (), "DVC follows one folder"),
        ("archives/empty.csv", (), "empty.csv: it cannot be read: ValueError: empty, a line with the names"),
        ("archives/header.csv", (), "no column of images; found: no rows"),
        ("archives/latin.csv", (), "latin.csv: it cannot be read: ValueError: broken_line: 3 fields, 2 are expected"),
        ("archives/birds.zip", (), r"birds.zip: a folder or a file with one of \.parquet, .*\.tar\.gz is expected"),
        ("archives/texts.jsonl", (), r"no column of images; found: text\. .*texts alone need a card: docs/data\.md"),
    ],
)
def test_what_cannot_be_read_is_said_and_nothing_is_written(here, files, words, message):
    put(here / "archives/notext/a.jpg", DATA[0])
    put(here / "archives/empty.csv", b"")
    put(here / "archives/header.csv", b"image,text\n")
    put(here / "archives/numbers.csv", b"a,b\n1,2\n")
    put(here / "archives/latin.csv", b"image,text\n000.jpg,a bird,caf\xe9\n")
    put(here / "archives/birds.zip", b"PK")
    put(here / "archives/texts.jsonl", jsonl([{"text": "a text"}]))
    put(here / "archives/lost.csv", b"image,text\n/x/1.jpg,a bird\n")
    put(here / "loose.csv", b"image,text\nimages/1.png,a bird\n")
    put(here / "images/1.png", PNG["img1"])
    with pytest.raises(ConfigError, match=message):
        new("birds", "--from", files, *words)
    assert not (here / "datasets/birds.yaml").exists()
    assert not (here / "experiments/birds.yaml").exists()


def test_a_set_of_few_different_images_is_told_what_to_change(here, monkeypatch):
    new("birds", "--from", "archives/csv", "--like", "micro")
    use("birds")
    monkeypatch.setattr(image_tokenizer, "sample_sets", lambda *_: {"birds/crop": np.zeros((1, 48, 48, 3), np.uint8)})
    with pytest.raises(DataError, match=r"birds/crop has 1 different images .*held_out_images takes 1 of them: lower"):
        image_tokenizer.main("")


@pytest.mark.cluster
@pytest.mark.pages
def test_the_example_goes_from_files_to_a_report(checkout):  # noqa: F811
    script, commands = re.findall(r"```(?:python|console)\n(.*?)```", PAGE, re.DOTALL)[:2]
    micro = checkout / "experiments/micro.yaml"
    steps = "steps: 40, quantize_from_step: 15"
    assert steps in micro.read_text()
    micro.write_text(micro.read_text().replace(steps, "steps: 6, quantize_from_step: 3"))
    (checkout / "flags.py").write_text(script)
    run(checkout, "python", "flags.py")
    for command in commands.splitlines():
        run(checkout, *command.replace("unifork ", "python -m unifork.cli ", 1).split())
    page = (checkout / "reports/flags/index.html").read_text()
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert "not there yet" not in text
    assert re.search(r"unifork, s3: flags-caption-caption [\d.]+ \d+ [\d.]+ ± [\d.]+ [\d.]+ ± [\d.]+", text)
    assert re.search(r"unifork, s3: flags-caption-generate [\d.]+ - - -", text)

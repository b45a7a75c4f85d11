"""The whole page: what it says, that it needs nothing else, that it is there at any time, and what it refuses."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from report_samples import NASTY, FakeCodec, alignment, experiment, layout, write_all

from unifork.config import AnalyzedRun
from unifork.errors import UniForkError
from unifork.report.build import build
from unifork.report.tables import data_uri
from unifork.shards.manifest import write_json

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements, resources and visible text of a page; refuses tags that are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.resources, self.images, self.links, self.text = [], [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.text += " "
        if tag not in VOID:
            self.open.append(tag)
        if tag == "a":
            self.links.append(values)
        if tag == "img":
            self.images.append(values)
        if tag in ("img", "script", "link", "iframe", "object", "source"):
            self.resources += [values[name] for name in ("src", "href", "data", "srcset") if name in values]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def words(page):
    return re.sub(r"\s+", " ", Page(page).text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    plan = experiment()
    return build(plan, write_all(root, plan), FakeCodec), root


@pytest.fixture
def no_curves(monkeypatch):
    """Pages without the plots of training, which take most of the time."""
    monkeypatch.setattr("unifork.report.build.training_plots", lambda lines, groups: [])


def test_it_says_what_was_run_and_what_came_out(whole):
    text = words(whole[0])
    assert "tiny" in text
    assert "shared*1 task*1 norm:task" in text
    assert "0.750 ± 0.062" in text
    assert "0.250 ± 0.062" in text
    assert "seen: overall 0.750 ± 0.062 0.125 2" in text  # value, error, chance, items
    assert "seed 5" in text
    assert "Trained until 2023-11-14; training took 3 min (" in text  # two stages of 90 s
    assert "unifork use tiny && dvc repro" in text
    assert "not a git checkout" in text


def test_it_shows_what_held_out_rows_gave(whole):
    text = words(whole[0])
    assert "fork, s1: world-caption-caption 2 0.500 ± 0.350 0.625 ± 0.125" in text
    assert f"fork, s1: row-0 world-caption-caption a dot ✗ {NASTY}" in text
    assert "a held-out star" in text
    titles = {image["alt"] for image in Page(whole[0]).images}
    ranges = "fork: 3 to 3; fork, held out: world-caption-caption: 2 to 1.7"
    assert f"Text loss over 9 steps. {ranges}" in titles
    assert "a held-out star, held out" in titles
    assert "a held-out star, fork, s1, drawn" in titles


def test_it_shows_the_data_with_drops_and_quarantine(whole):
    text = words(whole[0])
    assert "empty: 1, min_side: 1, undecodable: 1" in text
    assert "world: filter lost 28.6% of 7 rows to content (1 empty, 1 undecodable)" in text
    assert "CC-BY-4.0" in text
    assert "may not be published" in text
    assert "encode, pad not there yet" in text
    assert "dtype float32" in text
    assert "bad-1" in text
    assert "cannot be shown" in text
    assert "7 × world: too long" in text


def test_it_shows_the_tokenizer(whole):
    text = words(whole[0])
    assert "27.2" in text
    assert "7.2, 7.2" in text
    assert "world/crop 4 of 4 1.000" in text
    assert "world/pad 4 of 4 1.000" in text
    alts = {image["alt"] for image in Page(whole[0]).images}
    assert {"one, as received", "one, crop view", "one, crop view, decoded from codes"} <= alts


def test_it_shows_training_and_samples(whole):
    page = Page(whole[0])
    alts = [image["alt"] for image in page.images]
    assert "a red circle, fork, s1" in alts
    assert alts.count("a red circle, fork, s3") == 2  # on the first screen, too
    losses = ("Text loss", "Image loss", "Image loss by code depth")
    for title in (*losses, "Gradient norm", "Learning rate", "Tokens per step", "Fill of rows"):
        assert sum(alt.startswith(f"{title} over ") for alt in alts) == 1
    text = words(whole[0])
    assert "fork: generation branch 8 trained trained" in text
    assert "fork: understanding branch 6 frozen frozen" in text
    assert "those of the last attempt" in text
    assert "4321 - 0.75 GiB" in text


def test_its_numbers_can_be_taken_away(whole):
    links = {values["download"]: values["href"] for values in Page(whole[0]).links if "download" in values}
    taken = {name: base64.b64decode(link.partition(",")[2]).decode() for name, link in links.items()}
    scores = json.loads(taken["scores.json"])
    assert scores["shapes-generation"]["fork"]["seen"]["overall"]["value"] == 0.75
    assert taken["Image loss.csv"].splitlines()[:3] == ["variant,of,step,value", "fork,,1,2", "fork,,2,2"]
    assert "fork,held out: world-caption-caption,3,1.7" in taken["Text loss.csv"]


def test_it_shows_samples_with_verdicts(whole):
    text = words(whole[0])
    assert "a cross an image ✓" in text
    assert f"{NASTY} an image ✗ no <i>" in text
    assert "Is there a cross? yes ✓ yes" in text
    assert "the image 0/seen/0" in [image["alt"] for image in Page(whole[0]).images]


def test_it_needs_no_network_and_no_other_file(whole):
    page = Page(whole[0])
    assert page.resources
    assert all(resource.startswith("data:") for resource in page.resources)
    assert not {"script", "iframe", "object", "base"} & set(page.tags)
    styles = "".join(re.findall(r"<style>.*?</style>", whole[0], re.DOTALL))
    assert "@import" not in styles
    assert "url(" not in styles
    drawings = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", whole[0])
    for drawing in drawings:
        svg = base64.b64decode(drawing).decode()
        assert not re.search(r"(href|src)=\"(?!#)", svg)
        assert "currentColor" in svg
    assert len(drawings) == 7
    assert len(whole[0]) < 1_000_000


def test_every_text_is_escaped(whole):
    assert "<script" not in whole[0]
    assert "<i>" not in whole[0].replace("</i>", "").replace('<i style="', "")
    assert NASTY in Page(whole[0]).text


def test_every_image_has_a_text(whole):
    assert all(image["alt"] for image in Page(whole[0]).images)


def test_no_folder_of_this_machine_is_told(whole):
    assert str(whole[1]) not in whole[0]


def test_equal_results_give_equal_bytes(whole, tmp_path):
    plan = experiment()
    assert build(plan, write_all(tmp_path, plan), FakeCodec) == whole[0]


def test_before_anything_has_run(tmp_path):
    page = build(experiment(), layout(tmp_path), FakeCodec)
    text = words(page)
    assert text.count("not there yet") > 10
    assert "not known yet" in text
    assert "not measured" in text


@pytest.mark.usefixtures("no_curves")
def test_without_benchmarks_held_out_rows_are_its_numbers(tmp_path):
    plan = experiment().model_copy(update={"benchmarks": {}, "evaluations": {}})
    stages = {name: stage.model_copy(update={"sample_prompts": ()}) for name, stage in plan.stages.items()}
    plan = plan.model_copy(update={"stages": stages})
    where = write_all(tmp_path, plan)
    page = build(plan, where, FakeCodec)
    assert "No benchmarks and no held-out rows" in words(page)
    card = tmp_path / "datasets/world.yaml"
    card.write_text(card.read_text() + "held_out: 0.5\n")
    page = build(plan, where, FakeCodec)
    text = words(page)
    assert "fork, s1: world-caption-generate 2.700 - - -" in text
    assert "fork, s1: world-caption-caption 1.700 2 0.500 ± 0.350 0.625 ± 0.125" in text
    assert [image["alt"] for image in Page(page).images][:2] == ["a held-out star, held out", f"{NASTY}, held out"]
    for part in ("Headline scores", "First images", "Benchmarks", "Images for held-out prompts"):
        assert f"{part}: not there yet" not in text
    (where.model("fork-s1") / "training/held_out.json").unlink()
    assert "Held-out rows: not there yet" in words(build(plan, where, FakeCodec))


@pytest.mark.usefixtures("no_curves")
def test_a_variant_that_has_not_run_stands_beside_one_that_has(tmp_path):
    plan = experiment(("dense", "fork"))
    text = words(build(plan, write_all(tmp_path, plan, "fork"), FakeCodec))
    assert "dense shared*1 task*1 norm:task not known yet 0 of 2 not measured" in text
    assert "2 of 2 3 min" in text
    assert "Scores of dense on shapes-generation: not there yet" in text
    assert "seen: Images from text, mean of the six kinds not there yet 0.750" in text
    assert "dense, s1 not there yet" in text


@pytest.mark.usefixtures("no_curves")
def test_variants_are_compared_on_the_same_items(tmp_path):
    plan = experiment(("dense", "fork"))
    where = write_all(tmp_path, plan, "dense")
    assert write_all(tmp_path, plan, "fork") == where
    verdicts = where.scores("fork") / "shapes-understanding" / "verdicts.jsonl"
    verdicts.write_text(verdicts.read_text().replace('"right": 0.0', '"right": 1.0'))
    text = words(build(plan, where, FakeCodec))
    assert "fork less dense" in text
    assert re.search(r"seen: yes no accuracy 0.750 ± 0.062 0.750 ± 0.062 0.125 2 0.500 \(-?[\d.]+ to [\d.]+\), p", text)
    assert f"Is there a cross? no ✗ {NASTY} ✓ {NASTY}" in text
    verdicts.write_text(verdicts.read_text().replace('"id": "1"', '"id": "0"'))
    assert "No difference: fork less dense" in words(build(plan, where, FakeCodec))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("missing", ["models/fork-s3", "runs", "tokenizers", "data/filtered", "scores", "data/raw"])
def test_any_stage_may_be_missing(whole, tmp_path, missing):
    plan = experiment()
    where = write_all(tmp_path, plan)
    shutil.rmtree(tmp_path / missing)
    assert build(plan, where, FakeCodec) != whole[0]


@pytest.mark.parametrize(
    "file",
    [
        "data/filtered/world/manifest.json",
        "data/filtered/world/part-00000.parquet",
        "data/filtered/world/quarantine/part-00000.parquet",
        "tokenizers/image/report.json",
        "models/fork-s1/training/summary.json",
        "models/fork-s1/training/history.csv",
        "models/fork-s1/training/samples.npz",
        "runs/fork-s1/finished.json",
        "scores/fork/shapes-generation/metrics.json",
        "scores/fork/shapes-generation/verdicts.jsonl",
        "answers/fork/shapes-generation/part-00000.parquet",
        "data/evals/shapes-understanding/manifest.json",
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, file):
    plan = experiment()
    where = write_all(tmp_path, plan)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.raises(UniForkError, match=re.escape(path.name)):
        build(plan, where, FakeCodec)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("tokenizers/image/report.json", "psnr_db"),
        ("models/fork-s1/training/summary.json", "documents"),
        ("models/fork-s1/training/summary.json", "trained"),
        ("runs/fork-s1/finished.json", "seconds"),
        ("scores/fork/shapes-generation/metrics.json", "chance"),
        ("scores/fork/shapes-generation/verdicts.jsonl", "faults"),
        ("scores/fork/shapes-understanding/verdicts.jsonl", "truth"),
    ],
)
def test_files_that_lack_a_value_are_refused_by_name(tmp_path, file, key):
    plan = experiment()
    where = write_all(tmp_path, plan)
    path = tmp_path / file
    path.write_text(path.read_text().replace(f'"{key}"', '"other"'))
    with pytest.raises(UniForkError, match=f"{re.escape(path.name)}: damaged: .*{key}"):
        build(plan, where, FakeCodec)


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(("file", "column"), [("history", "track"), ("history", "tokens"), ("validation", "part")])
def test_tables_that_lack_a_column_are_refused_by_name(tmp_path, file, column):
    plan = experiment()
    where = write_all(tmp_path, plan)
    path = tmp_path / f"models/fork-s1/training/{file}.csv"
    path.write_text(path.read_text().replace(column, "other", 1))
    with pytest.raises(UniForkError, match=f"{file}.csv: damaged: .*{column}: Field required"):
        build(plan, where, FakeCodec)


@pytest.mark.usefixtures("no_curves")
def test_a_benchmark_without_verdicts_has_no_samples(tmp_path):
    plan = experiment()
    where = write_all(tmp_path, plan)
    (where.scores("fork") / "shapes-generation" / "verdicts.jsonl").unlink()
    text = words(build(plan, where, FakeCodec))
    assert "Is there a cross?" in text
    assert "an image ✓" not in text


def test_a_verdict_without_its_image_is_refused(tmp_path):
    plan = experiment()
    where = write_all(tmp_path, plan)
    verdicts = where.scores("fork") / "shapes-generation" / "verdicts.jsonl"
    verdicts.write_text(verdicts.read_text().replace('"id": "1"', '"id": "7"'))
    with pytest.raises(UniForkError, match="shapes-generation: no image of 7"):
        build(plan, where, FakeCodec)


def test_it_shows_alignment_where_it_was_analyzed(tmp_path):
    plan = experiment().model_copy(
        update={"analyzed": {"fork-s3": AnalyzedRun(kinds=("alignment",), start="m", prompts="")}}
    )
    where = layout(tmp_path)
    assert "Alignment by layer" not in build(experiment(), where, None)
    assert "Alignment by layer after" not in build(plan, where, None)
    names = ("standard_error", "chance", "chance_low", "chance_high")
    scores = {"generation": [0.5, 0.25], "understanding": [0.5, 0.75]}
    curves = {task: {"score": score, **{key: [0.0, 0.0] for key in names}} for task, score in scores.items()}
    write_json(where.analysis("fork-s3") / "alignment.json", alignment(curves))
    (where.analysis("fork-s3") / "alignment.svg").write_text("<svg/>")
    page = build(plan, where, None)
    assert "after fork-s3, from the first to the last: generation 0.50 to 0.25; understanding 0.50 to 0.75." in page
    assert data_uri("image/svg+xml", b"<svg/>") in page

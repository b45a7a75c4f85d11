"""Official files with photos go through the three programs: items, answers of a tiny model, scores."""

import json
import shutil
from hashlib import sha256

import pytest
import yaml
from benchmark_files import COLORS, NAMES, OFFICIAL, ROOT, hub, photo
from tiny import untrained

from pipelines import answer, items, score
from unifork.config import load_eval
from unifork.evaluation.answers import read_answers
from unifork.evaluation.items import read_items
from unifork.images import measure, open_image
from unifork.layout import Layout
from unifork.library import Model
from unifork.shards.job import read_table
from unifork.shards.manifest import read_manifest

FIRST = {"pope": "pope", "mme": "existence", "seed": "accuracy", "vqav2": "accuracy", "gqa": "accuracy",
         "mmbench_dev": "circular"}  # fmt: skip
ASKED = {"pope": 18, "mme": 12, "seed": 7, "vqav2": 8, "gqa": 8, "mmbench_dev": 9}
"""Questions of the small files; videos of SEED-Bench and what is not balanced in GQA are left out."""


def place(root, name, archive):
    """A card whose files lie elsewhere and may have any number of rows."""
    plain = yaml.safe_load((ROOT / f"datasets/evals/{name.removesuffix('_hub')}.yaml").read_text())
    plain["items"] |= {"archive": str(archive.relative_to(root)), "rows": None}
    (root / f"datasets/evals/{name}.yaml").write_text(yaml.safe_dump(plain | {"name": name}, sort_keys=False))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Items, answers and scores of all benchmarks, of their makers' files and of the Hub's tables."""
    root = tmp_path_factory.mktemp("photos")
    shutil.copytree(ROOT / "datasets", root / "datasets")
    benchmarks = {"shapes-generation": None, "shapes-understanding": None}
    for name in NAMES:
        files, tables = root / f"archives/evals/{name}", root / f"archives/hub/{name}"
        OFFICIAL[name](files)
        hub(name, tables, files)
        place(root, name, files)
        place(root, f"{name}_hub", tables)
        benchmarks |= {name: {}, f"{name}_hub": {}}
    (root / "here.yaml").write_text("name: here\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # where cards are looked for
        patch.setenv("UNIFORK_CLUSTER", "here.yaml")
        untrained(root, benchmarks)
        for name, use in benchmarks.items():
            if use is not None:
                items.main(name)
                answer.main(f"unifork/{name}")
        score.main("unifork")
    return root


def rows_of(folder):
    return [row for shard in read_manifest(folder).shards for row in read_table(folder, shard).to_pylist()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_photos_of_official_files_are_answered_and_scored(root, name):
    layout = Layout(root)
    cuts = {sha256(photo(color)).hexdigest(): photo(color) for color in COLORS}
    rows = rows_of(layout.items(name))
    held = {row["sha256"]: row["bytes"] for row in rows if row["bytes"]}
    assert {row["sha256"] for row in rows} == held.keys() <= cuts.keys()
    assert all(cuts[digest] == data for digest, data in held.items())
    assert all(open_image(data).format == "JPEG" and min(measure(data)[:2]) >= 150 for data in held.values())
    answers = {row["id"]: row for row in rows_of(layout.answers("unifork") / name)}
    questions = read_items(layout.items(name))
    assert answers.keys() == {item.id for item in questions}
    card = load_eval(name, root / "datasets/evals")
    assert all(answers[item.id]["prompt"] == card.answer.form(item.question) for item in questions)
    metrics = json.loads((layout.scores("unifork") / name / "metrics.json").read_text())
    first = next(scores[FIRST[name]] for scores in metrics.values() if FIRST[name] in scores)
    manifest = read_manifest(layout.answers("unifork") / name)
    assert len(questions) == manifest.rows == ASKED[name]
    assert (first["missing"], first["rule"], first["model"]) == (0, "official", manifest.lineage["model"])
    assert first["items_hash"] == read_manifest(layout.items(name)).lineage["items"]
    lines = (layout.scores("unifork") / name / "verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == [answers[item.id]["text"] for item in questions]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_hubs_tables_of_the_same_photos_have_the_same_answers_and_scores(root, name):
    layout, found = Layout(root), []
    for each in (name, f"{name}_hub"):
        texts = {answer.id: answer.text for answer in read_answers(layout.answers("unifork") / each)}
        found.append((texts, json.loads((layout.scores("unifork") / each / "metrics.json").read_text())))
    assert found[0] == found[1]


@pytest.mark.slow
def test_answers_are_those_of_the_model_asked_about_the_files(root):
    """From the files themselves, without items, in the order in which the table asks."""
    layout = Layout(root)
    model, card = Model.load(root / "models/unifork-init", "cpu"), load_eval("pope", root / "datasets/evals")
    rows = rows_of(layout.items("pope"))
    files = [root / "archives/evals/pope/val2014" / row["image"].rpartition("/")[2] for row in rows]
    assert len({codes_ND.tobytes() for codes_ND in model.images.encode_images(sorted(set(files)))}) == len(COLORS)
    prompts = [card.answer.form(row["question"]) for row in rows]
    texts = model.answer_questions(files, prompts, template=card.answer.template)
    assert texts == [row["text"] for row in rows_of(layout.answers("unifork") / "pope")]

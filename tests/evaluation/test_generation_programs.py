"""The commands and programs around generated images, in a folder with small official files and tiny networks."""

import json
import shutil
from functools import partial

import crashes
import numpy as np
import pytest
import torch
import yaml
from benchmark_files import ROOT, lines, photo, png, write
from generation_files import FILES, PROMPTS, benchmark, image_folder
from tiny import untrained, write_experiment
from tiny_networks import KINDS, shrink
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import load_eval
from unifork.errors import ConfigError
from unifork.evaluation.examining import CANARY, load_networks
from unifork.experiments import resolve
from unifork.shards.manifest import read_manifest

ROWS = {"geneval": 4 * len(PROMPTS), "mjhq": 6, "dpg": 12}


def place(root, name, kinds=None):
    """The card of a benchmark with the rows of small files, these files, and tiny networks where the card has them."""
    FILES[name](root / "archives" / "evals" / name)
    card = yaml.safe_load((ROOT / "datasets" / "evals" / f"{name}.yaml").read_text())
    card["items"]["rows"] = ROWS[name]
    for network, (kind, make) in KINDS[name].items():
        entry = card["networks"].setdefault(network, {"kind": kind, "path": f"networks/{network}"})
        make(root / entry["path"])
    write(root / "datasets" / "evals" / f"{name}.yaml", yaml.safe_dump(card))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=True)


def output_of(*words):
    done = command(*words)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


@pytest.mark.parametrize("image", [png, partial(photo, form="PNG")], ids=["one color", "photo"])
@pytest.mark.parametrize("name", ["geneval", "mjhq", "dpg"])
def test_a_folder_of_images_becomes_scores(name, image, root, monkeypatch):
    shrink(monkeypatch)
    place(root, name)
    _, items = benchmark(name, root / "archives" / "evals" / name)
    image_folder(items, root / "images", image=image)
    assert "images: `unifork answers examine`" in str(command("score", name, "--answers", "images").exception)
    found = command("answers", "examine", name, "--images", "images", "--out", "found")
    assert f"write it by `unifork answers canary {name}`" in str(found.exception)
    output_of("answers", "canary", name)
    if name == "mjhq":
        image_folder(items, root / "archives/evals/mjhq/mjhq30k_imgs", side=9, suffix=".jpg", image=image)
        assert ".npz" in output_of("answers", "examine", name)
    assert "images.found: " in output_of("answers", "examine", name, "--images", "images")
    shown = output_of("score", name, "--answers", "images.found", "--out", "scores")
    metrics = json.loads((root / "scores" / "metrics.json").read_text())["all"]
    first = {"geneval": "overall", "mjhq": "fid", "dpg": "dpg"}[name]
    assert f"all {first} " in shown
    assert metrics[first]["items"] == ROWS[name]
    card = load_eval(name)
    for network, used in load_networks(card, "cpu").items():
        assert f"{network} {card.networks[network].kind} {used.hash}" in metrics[first]["decoding"]
    assert ("WARNING: fewer than 2048" in metrics[first]["note"]) == (name == "mjhq")


@pytest.mark.parametrize(
    ("name", "wanted", "place_of_it"),
    [
        ("geneval", "config.json and model.safetensors of facebook/mask2former-swin-small-coco-instance",
         "networks/mask2former-swin-small-coco-instance"),
        ("dpg", "model.safetensors, vocab.txt, tokenizer.json, tokenizer_config.json and special_tokens_map.json of "
         "Salesforce/blip-vqa-base", "networks/blip-vqa-base"),
    ],
)  # fmt: skip
def test_without_networks_a_command_says_what_to_put_where(name, wanted, place_of_it, root):
    place(root, name)
    shutil.rmtree(root / "networks")
    _, items = benchmark(name, root / f"archives/evals/{name}")
    image_folder(items, root / "images")
    found = command("answers", "examine", name, "--images", "images", "--out", "found")
    assert wanted in str(found.exception)
    assert f"into {place_of_it}" in str(found.exception)
    assert not (root / "found").exists()


def test_an_official_result_file_needs_no_network(root):
    place(root, "geneval")
    shutil.rmtree(root / "networks")
    rows = [
        {"filename": f"out/{prompt:05d}/samples/{sample:05d}.png", "tag": plain["tag"], "prompt": plain["prompt"],
         "correct": sample < 3, "reason": "", "metadata": json.dumps(plain), "details": "{}"}
        for prompt, plain in enumerate(PROMPTS) for sample in range(4)
    ]  # fmt: skip
    write(root / "results.jsonl", lines(rows))
    assert "all overall 0.75 +- 0" in output_of("score", "geneval", "--answers", "results.jsonl")
    write(root / "results.jsonl", lines(rows[:-1]))
    found = command("score", "geneval", "--answers", "results.jsonl")
    assert "1 items have no answer: 00005/0003" in str(found.exception)
    shown = output_of("score", "geneval", "--answers", "results.jsonl", "--partial")
    assert "PARTIAL: 1 missing" in shown
    write(root / "results.jsonl", lines([{**row, "prompt": f"{row['prompt']}, detailed"} for row in rows]))
    found = command("score", "geneval", "--answers", "results.jsonl")
    assert "answers are to another prompt" in str(found.exception)


def test_a_file_of_recorded_answers_is_scored_by_both_rules(root):
    place(root, "dpg")
    _, items = benchmark("dpg", root / "archives/evals/dpg")
    rows = [{"question_id": item.id, "text": json.dumps(dict.fromkeys(item.truth, "yes"))} for item in items]
    write(root / "answers.jsonl", lines(rows))
    shown = output_of("score", "dpg", "--answers", "answers.jsonl")
    assert "all dpg 100 +- 0" in shown
    assert "all dpg_corrected 100 +- 0" in shown


def test_a_reference_that_is_smaller_than_the_card_is_refused(root):
    place(root, "mjhq")
    _, items = benchmark("mjhq", root / "archives/evals/mjhq")
    image_folder(items, root / "archives/evals/mjhq/mjhq30k_imgs", suffix=".jpg")
    next((root / "archives/evals/mjhq/mjhq30k_imgs/art").iterdir()).unlink()
    assert "1 prompts lack images" in str(command("answers", "examine", "mjhq").exception)
    assert isinstance(command("answers", "examine", "shapes-generation").exception, ConfigError)


def test_an_experiment_lists_where_networks_look(root):
    none = {"shapes-generation": None, "shapes-understanding": None}
    experiment = write_experiment(root, {"benchmarks": {"geneval": {}, "mjhq": {}, "pope": {}} | none})
    assert set(experiment.examined) == {"unifork-geneval", "unifork-mjhq", "mjhq-reference"}
    reference = experiment.examined["mjhq-reference"]
    assert (reference["name"], reference["out"]) == ("mjhq", "data/evals/mjhq-reference")
    assert reference["images"] == reference["networks"] == "datasets/evals/README.md"  # nothing is here
    place(root, "geneval")
    place(root, "mjhq")
    examined = resolve("tiny", root / "experiments", root / "datasets").examined
    assert examined["mjhq-reference"]["images"] == "archives/evals/mjhq"
    assert examined["mjhq-reference"]["networks"] == "networks"
    assert examined["unifork-geneval"] == {
        "name": "unifork/geneval", "benchmark": "geneval", "images": "answers/unifork/geneval",
        "out": "answers/unifork/geneval.found", "networks": "networks",
    }  # fmt: skip


@pytest.mark.slow
def test_programs_go_from_a_model_to_scores(tmp_path):
    none = {"shapes-generation": None, "shapes-understanding": None}
    untrained(tmp_path, {"geneval": {}, "mjhq": {"options": {"resamples": 2}}, "dpg": {}} | none)
    for name in ("geneval", "mjhq"):
        place(tmp_path, name)
    write(tmp_path / "datasets/evals/dpg.yaml", (ROOT / "datasets/evals/dpg.yaml").read_text())

    def run(program, name):
        return crashes.run(tmp_path, (f"pipelines.{program}", name))

    for name in ("geneval", "mjhq", "dpg"):
        run("items", name)
        run("answer", f"unifork/{name}")
    references = tmp_path / "archives/evals/mjhq/mjhq30k_imgs"
    for number in range(6):
        color = tuple(np.random.default_rng(number).integers(0, 256, 3).tolist())
        write(references / ("art" if number % 2 else "food") / f"{number:040x}.jpg", png(color, 9))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        for name in ("geneval", "mjhq"):
            load_networks(load_eval(name), "cpu", trusted=True)
    for name in ("unifork/geneval", "unifork/mjhq", "mjhq"):
        assert "not here" not in run("examine", name)
    assert "dpg: not here: put dpg_bench.csv" in run("examine", "unifork/dpg")
    assert "geneval.found: 1/1 shards (1 kept from before)" in run("examine", "unifork/geneval")
    output = run("score", "unifork")
    assert "unifork: geneval: all overall" in output
    assert "unifork: mjhq: all fid " in output
    headlines = json.loads((tmp_path / "scores/unifork.json").read_text())
    assert {name.partition(".")[0] for name in headlines} == {"geneval", "mjhq"}  # of dpg nothing is here
    geneval = json.loads((tmp_path / "scores/unifork/geneval/metrics.json").read_text())["all"]["overall"]
    assert geneval["items"] == 24
    assert geneval["value"] == headlines["geneval.all.overall"]
    drawn = read_manifest(tmp_path / "answers/unifork/geneval").lineage
    assert geneval["model"] == drawn["model"]
    here = f", on cpu by torch {torch.__version__}"
    assert geneval["decoding"].startswith(f"{drawn['decoding']}{here}; examined by ")
    assert geneval["decoding"].endswith(here)
    (reference,) = (tmp_path / "data/evals/mjhq-reference").glob("pytorch-fid-*.npz")
    with np.load(reference) as held:
        assert held["images"] == 6
        assert held["sigma"].shape == (5, 5)
    assert CANARY not in json.dumps([headlines, geneval])
    shutil.rmtree(tmp_path / "networks")
    shutil.rmtree(tmp_path / "answers/unifork/geneval.found")
    assert "unifork/geneval: not here: the network " in run("examine", "unifork/geneval")
    assert "unifork: geneval: not here: the network " in run("score", "unifork")

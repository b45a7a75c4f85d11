"""The three programs on a tiny model: killed and gone on with, without official files, without torch."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import crashes
import pytest
import torch
from tiny import REPOSITORY, bytes_of, start, untrained

from unifork.shards.manifest import read_manifest

NAME = "shapes-understanding"
BENCHMARKS = {NAME: {"options": {"samples": 16}}, "shapes-generation": {"options": {"samples": 1}}, "pope": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """An experiment whose last model is that of step 0, and the items of its benchmarks."""
    root = untrained(tmp_path_factory.mktemp("programs"), BENCHMARKS)
    for name in BENCHMARKS:
        assert "not here" in run(root, "items", name) or name != "pope"
    return root


def run(root, program, name):
    return crashes.run(root, (f"pipelines.{program}", name))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_gives_the_same_answers(root):
    folder = root / "answers/unifork" / NAME
    whole = run(root, "answer", f"unifork/{NAME}")
    shards = len(read_manifest(folder).shards)
    assert shards >= 3
    assert f"{shards}/{shards} shards" in whole
    expected = bytes_of(folder)
    shutil.rmtree(folder)
    process = start(root, "pipelines.answer", f"unifork/{NAME}")
    deadline = time.monotonic() + 300
    while not list(folder.glob("*.done")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "manifest.json").exists()
    again = run(root, "answer", f"unifork/{NAME}")
    assert int(re.search(r"\((\d+) kept from before\)", again)[1]) >= 1
    assert bytes_of(folder) == expected


@pytest.mark.slow
def test_scores_are_made_again_from_answers_and_absent_benchmarks_are_listed(root):
    for name in BENCHMARKS:
        output = run(root, "answer", f"unifork/{name}")
        assert ("pope: not here: put coco_pope_" in output) == (name == "pope")
    output = run(root, "score", "unifork")
    assert "unifork: pope: not here: put coco_pope_{adversarial,popular,random}.json" in output
    every = {
        name: json.loads((root / f"scores/unifork/{name}/metrics.json").read_text())
        for name in BENCHMARKS
        if name != "pope"
    }
    headlines = {NAME: ["yes_no_accuracy"], "shapes-generation": ["overall", "single_object"]}
    assert json.loads((root / "scores/unifork.json").read_text()) == {
        f"{name}.{split}.{score}": every[name][split][score]["value"]
        for name, scores in headlines.items() for split in ("seen", "held_out") for score in scores
    }  # fmt: skip
    manifest = read_manifest(root / "answers/unifork" / NAME)
    score = every[NAME]["seen"]["yes_no_accuracy"]
    assert (score["items"], score["missing"], score["seed"], score["rule"]) == (16, 0, 0, "official")
    assert (score["model"], score["items_hash"]) == (manifest.lineage["model"], manifest.lineage["items"])
    assert score["decoding"] == f"greedy, at most 32 tokens, float32, on cpu by torch {torch.__version__}"
    assert "guidance" in every["shapes-generation"]["seen"]["overall"]["decoding"]
    verdicts = (root / "scores/unifork" / NAME / "verdicts.jsonl").read_text().splitlines()
    assert len(verdicts) == manifest.rows == 160
    before = bytes_of(root / "scores")
    shutil.rmtree(root / "scores")
    run(root, "score", "unifork")
    assert bytes_of(root / "scores") == before


def test_scoring_needs_no_torch_and_no_ray():
    code = (
        "import sys, pipelines.score, pipelines.items, unifork.commands.score\n"
        "from unifork.config import load_eval\n"
        "from unifork.evaluation.suites import suite_of\n"
        "from unifork.evaluation.answers import EXPORTS\n"
        "from pathlib import Path\n"
        "[suite_of(load_eval(path.stem)) for path in Path('datasets/evals').glob('*.yaml')]\n"
        "[EXPORTS.find(name, '') for name in EXPORTS.addresses]\n"
        "print([name for name in ('torch', 'transformers', 'ray') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

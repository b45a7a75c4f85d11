"""Benchmarks of text: the dense export says what the model says; the real lm-evaluation-harness where it is installed."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import start, write_experiment
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from unifork.batch import TEXT, Document, pack
from unifork.cli import app
from unifork.config import TextCard, load_text
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError
from unifork.evaluation.answering import identity
from unifork.evaluation.text import RESULTS, export, read_results, run_tasks, text_scores
from unifork.models.modeling import load_model
from unifork.report.reading import read_scores

torch.set_num_threads(1)
OFFICIAL = Path(__file__).parent.parent / "fixtures" / "official_tiny" / "unifork"
HERE = importlib.util.find_spec("lm_eval") is not None
real = pytest.mark.skipif(not HERE, reason="pip install '.[text-evals]'")
CHOICES = ["the cat", "a dog runs", "12 birds", "no"]
TASKS = {
    "arc_tiny": {
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}", "doc_to_choice": "{{choices.text}}",
        "metric_list": [{"metric": name, "aggregation": "mean"} for name in ("acc", "acc_norm")],
    },
    "boolq_tiny": {
        "output_type": "multiple_choice", "test_split": "test", "doc_to_target": "label",
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:", "doc_to_choice": ["no", "yes"],
        "metric_list": [{"metric": "acc"}],
    },
}  # fmt: skip
CARD = TextCard(
    name="tiny", title="two", homepage="none", license="CC0-1.0", tasks={"arc_tiny": 0.25, "boolq_tiny": 0.5}
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The official tiny model, whose branches differ."""
    out = tmp_path_factory.mktemp("text") / "model"
    assert CliRunner().invoke(app, ["model", "import", str(OFFICIAL), "--out", str(out)]).exit_code == 0
    return out


def archive(folder):
    """Two tasks shaped like ARC and BoolQ, with their data beside them."""
    rng = np.random.default_rng(0)
    arc = [
        {
            "question": f"What is number {n}",
            "choices": {"text": [CHOICES[k] for k in rng.permutation(4)], "label": list("ABCD")},
            "answerKey": "ABCD"[rng.integers(4)],
        }
        for n in range(12)
    ]
    boolq = [{"passage": f"Text {n}.", "question": f"is it {n}", "label": n % 2} for n in range(9)]
    folder.mkdir(parents=True)
    for name, rows in (("arc_tiny", arc), ("boolq_tiny", boolq)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        plain = {"task": name, **data, **TASKS[name], "metadata": {"version": 2.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(plain))
    return CARD.model_copy(update={"include_path": str(folder), "access": "two files"})


def log_likelihood(logits_TV, ids, given):
    """Of the ids after the given ones."""
    log_probs_TV = torch.log_softmax(logits_TV.double(), dim=-1)
    return sum(float(log_probs_TV[place - 1, ids[place]]) for place in range(given, len(ids)))


def own_logits(model, ids, task="understanding"):
    """What the model itself says of a text that one of its tasks reads."""
    count = len(ids)
    none = np.zeros((0, model.config.depth), np.int64)
    text = Document("text", task, np.full(count, TEXT), np.array(ids), np.zeros(count, bool), none)
    with torch.no_grad():
        return model.text_logits(model.hidden(pack([[text]], count, model.config.depth)))[0]


TEXTS = [
    "Question: what?\nAnswer: 1984",
    "  two  spaces\tand a tab",
    "\u732b\u304c\u3044\u308b",
    "na\u00efve caf\u00e9",
    "1234567890",
    "\n\n x",
    "It's",
]


@pytest.mark.parametrize("branch", ["understanding", "generation"])
def test_the_dense_export_reads_and_says_what_the_model_does(model, tmp_path, branch):
    export(model, branch, "float32", tmp_path)
    dense, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    own, words = load_model(model, torch.float32), TextTokenizer(model / "text_tokenizer")
    for text in TEXTS:
        ids = words.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        with torch.no_grad():
            found = log_likelihood(dense(torch.tensor([ids])).logits[0], ids, 1)
        assert found == pytest.approx(log_likelihood(own_logits(own, ids, branch), ids, 1), abs=1e-5)


def test_both_branches_of_a_freshly_forked_model_say_the_same(tiny_root, tmp_path):
    ids, found = TextTokenizer(tiny_root / "tokenizers/text").encode("a photo of two blue squares"), []
    for branch in ("understanding", "generation"):
        export(tiny_root / "models/unifork-init", branch, "float32", tmp_path / branch)
        with torch.no_grad():
            logits_TV = AutoModelForCausalLM.from_pretrained(tmp_path / branch)(torch.tensor([ids])).logits[0]
        found.append(log_likelihood(logits_TV, ids, 1))
    assert len(ids) > 3
    assert found[0] == found[1] < 0

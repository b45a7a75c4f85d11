"""Benchmarks of text: the dense export says what the model says, and the real harness what it finds there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import crashes
import numpy as np
import pytest
import torch
import yaml
from tiny import REPOSITORY, write_experiment
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from unifork.batch import TEXT, Document, pack
from unifork.cli import app
from unifork.config import TextCard
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError, DataError
from unifork.evaluation.comparison import compare
from unifork.evaluation.names import SAMPLES, identity
from unifork.evaluation.text import export, run_tasks
from unifork.evaluation.text_scores import text_scores
from unifork.layout import Layout
from unifork.models.modeling import load_model
from unifork.report.scores import benchmark
from unifork.shards.manifest import Manifest, Shard, read_manifest, write_manifest

torch.set_num_threads(1)
OFFICIAL = Path(__file__).parent.parent / "fixtures" / "official_tiny" / "unifork"
NO_BENCHMARKS = {"shapes-generation": None, "shapes-understanding": None}
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
    name="tiny", title="two", homepage="none", license="CC0-1.0", tasks={"arc_tiny": 0.25, "boolq_tiny": 0.5},
    include_path=None, online=False, branch="understanding", num_fewshot=0, batch_size=8, dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def offline():
    """What `run_tasks` sets for its process is taken back."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


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


@pytest.fixture(scope="module")
def answered(model, tmp_path_factory):
    """The real thing on the tiny model: its card and the folder it wrote, one text at once and eight."""
    root, found = tmp_path_factory.mktemp("answered"), {}
    card = archive(root / "archive")
    for size in (1, 8):
        found[size] = root / str(size)
        found[size].mkdir()
        run_tasks(card.model_copy(update={"batch_size": size}), model, found[size], "cpu", 0)
    return card, found


@pytest.mark.slow
def test_log_likelihoods_are_those_of_the_model_itself(model, answered):
    own, words = load_model(model, torch.float32), TextTokenizer(model / "text_tokenizer")
    found = {size: [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
             for size, folder in answered[1].items()}  # fmt: skip
    pairs = [(given, end, result[0]) for row in found[8]
             for (given, end), result in zip(row["arguments"], row["filtered_resps"], strict=True)]  # fmt: skip
    assert len(pairs) == 12 * 4 + 9 * 2
    for given, end, result in pairs:
        start, ids = len(words.encode(given)), words.encode(given + end)
        assert result == pytest.approx(log_likelihood(own_logits(own, ids), ids, start), abs=1e-4)
    for alone, together in zip(found[1], found[8], strict=True):
        assert np.array(alone["filtered_resps"])[:, 0] == pytest.approx(
            np.array(together["filtered_resps"])[:, 0], abs=1e-4
        )


@pytest.mark.slow
def test_scores_and_errors_are_those_of_the_harness(model, answered):
    card, folders = answered
    scores = {score.name: score for score in text_scores(card, folders[8])}
    results = read_manifest(folders[8]).lineage["results"]
    assert set(scores) == {"arc_tiny", "arc_tiny_acc_norm", "boolq_tiny", "mean"}
    wanted = {"arc_tiny": ("arc_tiny", "acc"), "arc_tiny_acc_norm": ("arc_tiny", "acc_norm")}
    for name, (task, metric) in {**wanted, "boolq_tiny": ("boolq_tiny", "acc")}.items():
        assert scores[name].value == pytest.approx(results[task][f"{metric},none"], abs=1e-12)
        assert scores[name].standard_error == pytest.approx(results[task][f"{metric}_stderr,none"], abs=1e-12)
        assert scores[name].rule == metric
    assert "0-shot" in scores["mean"].decoding
    assert "arc_tiny 2.0, boolq_tiny 2.0" in scores["mean"].decoding
    assert (scores["boolq_tiny"].items, scores["boolq_tiny"].chance, scores["mean"].chance) == (9, 0.5, 0.375)
    assert scores["mean"].model == identity(model)


@pytest.mark.slow
def test_what_is_not_there_is_one_line(model, tmp_path):
    card = archive(tmp_path / "archive")
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match="'nonsense' is not a registered task"):
        run_tasks(card.model_copy(update={"tasks": {"nonsense": 0.5}}), model, tmp_path / "out", "cpu", 0)
    (tmp_path / "archive" / "boolq_tiny.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"boolq_tiny\.jsonl'; put two files there"):
        run_tasks(card, model, tmp_path / "out", "cpu", 0)


@pytest.mark.soak  # a process of its own, since the Hub's library reads its variables when it is imported
def test_without_a_network_is_one_line(tmp_path):
    code = (
        "import sys; from pathlib import Path; from unifork.config import TextCard; import json\n"
        "from unifork.evaluation.text import run_tasks; from unifork.errors import ConfigError\n"
        "try: run_tasks(TextCard(**json.loads(sys.argv[1])), Path('none'), Path('out'), 'cpu', 0)\n"
        "except ConfigError as error: print(error)"
    )
    plain = CARD.model_copy(update={"tasks": {"arc_easy": 0.25}}).model_dump_json()
    done = subprocess.run([sys.executable, "-c", code, plain], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Couldn't reach 'allenai/ai2_arc' on the Hub" in done.stdout
    assert done.stdout.count("\n") == 1


def written(folder, rows, groups=None):
    """A folder as the harness would leave it."""
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / SAMPLES).write_text(text)
    shard = Shard(path=SAMPLES, rows=len(rows), bytes=len(text), sha256="-", inputs="-")
    lineage = {"model": "m", "decoding": "d", "seed": 3, "group_subtasks": groups or {}}
    write_manifest(folder, Manifest(kind="text", dataset="tiny", columns={}, shards=(shard,), lineage=lineage))
    return folder


def row(task, **right):
    return {"task": task, "doc_hash": task, "prompt_hash": "p", "target_hash": "t", **right}


def test_scores_of_groups_and_their_mean_by_hand(tmp_path):
    rows = [row("left", acc=1.0, acc_norm=0.0), row("left", acc=1.0, acc_norm=1.0), row("right", acc=0.0)]
    rows += [row("right", acc=1.0), row("alone", acc=0.0, acc_norm=1.0), row("alone", acc=1.0, acc_norm=1.0)]
    folder = written(tmp_path / "out", rows, {"both": ["inner"], "inner": ["left", "right"]})
    card = CARD.model_copy(update={"tasks": {"both": 0.25, "alone": 0.5}})
    scores = {score.name: score for score in text_scores(card, folder)}
    assert {name: score.value for name, score in scores.items()} == {
        "both": 0.75, "alone": 0.5, "alone_acc_norm": 1.0, "mean": 0.625,
    }  # fmt: skip
    assert scores["both"].standard_error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert scores["mean"].standard_error == pytest.approx((0.75 * 0.25 / 3 + 0.25) ** 0.5 / 2)
    assert (scores["both"].items, scores["both"].chance, scores["mean"].chance) == (4, 0.25, 0.375)
    assert scores["alone_acc_norm"].interval[1] == 1.0
    assert (scores["both"].model, scores["both"].seed, scores["both"].rule) == ("m", 3, "acc")
    with pytest.raises(DataError, match="task 'right' has neither acc nor acc_norm"):
        text_scores(CARD.model_copy(update={"tasks": {"right": 0.5}}), written(tmp_path / "b", [row("right", f1=1.0)]))


def test_two_models_are_compared_question_by_question(tmp_path, monkeypatch):
    (tmp_path / "datasets" / "evals" / "text").mkdir(parents=True)
    card = {**CARD.model_dump(exclude={"show"}), "tasks": {"left": 0.25, "right": 0.5}}
    (tmp_path / "datasets" / "evals" / "text" / "tiny.yaml").write_text(yaml.safe_dump(card))
    monkeypatch.chdir(tmp_path)
    rows = [row("left", acc=float(number % 3 > 0)) for number in range(60)] + [row("right", acc=1.0)] * 4
    ours = written(tmp_path / "ours", rows)
    theirs = written(
        tmp_path / "theirs", [{**line, "acc": line["acc"] * (number > 9)} for number, line in enumerate(rows)]
    )
    found = {pair.name: pair for pair in compare(ours, theirs)}
    assert (found["all left"].first, found["all left"].second) == (pytest.approx(40 / 60), pytest.approx(34 / 60))
    assert found["all left"].difference.value == pytest.approx(0.1)
    assert found["all left"].difference.standard_error == pytest.approx((0.1 * 0.9 / 59) ** 0.5)
    assert found["all right"].difference.value == 0
    assert found["all mean"].difference.value == pytest.approx(0.05)
    with pytest.raises(DataError, match="questions are not the same in both"):
        compare(ours, written(tmp_path / "others", [line | {"doc_hash": "other"} for line in rows]))


def test_without_the_package_is_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"card tiny: .*lm_eval.*; text needs `pip install '\.\[text-evals\]'`"):
        run_tasks(CARD, model, tmp_path, "cpu", 0)


@pytest.mark.slow
def test_the_programs_list_what_is_not_here_and_the_page_shows_scores(tmp_path):
    card = {**CARD.model_dump(exclude={"show"}), "include_path": "archives/text", "access": "two files"}
    shutil.copytree(REPOSITORY / "datasets", tmp_path / "datasets")
    (tmp_path / "datasets" / "evals" / "text" / "tiny.yaml").write_text(yaml.safe_dump(card))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        experiment = write_experiment(tmp_path, {"benchmarks": NO_BENCHMARKS, "text_evals": ["tiny"]})
    entry = {
        "variant": "unifork",
        "benchmark": "tiny",
        "model": "models/unifork-s3",
        "follows": "datasets/evals/README.md",
    }
    assert experiment.text_runs == {"unifork-tiny": entry}
    assert experiment.scored == {"unifork": ("tiny",)}
    for program, name in (("text", "unifork/tiny"), ("score", "unifork")):
        assert "not here: put two files into archives/text" in crashes.run(tmp_path, (f"pipelines.{program}", name))
    assert json.loads((tmp_path / "scores/unifork.json").read_text()) == {}
    shutil.rmtree(tmp_path / "answers/unifork/tiny")
    written(tmp_path / "answers/unifork/tiny", [row("arc_tiny", acc=1.0), row("boolq_tiny", acc=0.0)] * 2)
    crashes.run(tmp_path, ("pipelines.score", "unifork"))
    found = benchmark("tiny", experiment, Layout(tmp_path))
    assert found["numbers"]["unifork"]["all"]["mean"]["value"] == 0.5
    assert found["missing"] == []
    assert [row[0] for table in found["scores"] for row in table.rows]

"""`experiments/compare.yaml` with few rows and steps: from fresh models to a page that compares three plans."""

import re

import pytest
from tiny import build, hold_out, write_experiment
from typer.testing import CliRunner

from pipelines import answer, init, items, report, score
from unifork.cli import app
from unifork.config import TrainResources
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

FEW = {
    "validation": {"documents": 2, "answers": 1, "prompts": 1},
    "checkpoint_every": 9,
    "sample_prompts": ["a circle"],
}
CHANGES = {
    "extends": "compare",
    "stages": {
        "s2-pretrain": {"tracks": {"joint": {"steps": 3}}} | FEW,
        "s3": {"tracks": {"generation": {"steps": 2}, "understanding": {"steps": 1}}} | FEW,
    },
    "benchmarks": {name: {"options": {"samples": 2}} for name in ("shapes-generation", "shapes-understanding")},
}


@pytest.mark.slow
def test_three_plans_are_trained_and_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("UNIFORK_CLUSTER", str(tmp_path / "cluster.yaml"))
    (tmp_path / "cluster.yaml").write_text("name: one\njobs: {answer: {workers: 0}}\ntrain: {workers: 0}\n")
    write_experiment(tmp_path, CHANGES)
    hold_out(tmp_path, 0.2)
    build(tmp_path, CHANGES | {"seeds": None})
    experiment = write_experiment(tmp_path, CHANGES | {"seeds": [0, 1]})
    monkeypatch.chdir(tmp_path)
    for name in experiment.variants:
        init.main(name)
    for key in experiment.runs:
        resources = TrainResources(threads=1, row_tokens=1024)
        train_stage(StageJob(key=key, experiment=experiment, resources=resources, root=str(tmp_path)), WorkerContext())
    for name in experiment.benchmarks:
        items.main(name)
    for entry in experiment.evaluations.values():
        answer.main(f"{entry['variant']}/{entry['benchmark']}")
    for name in experiment.variants:
        score.main(name)
    report.main("")
    text = re.sub(r"<[^>]+>|\s+", " ", (tmp_path / "reports/tiny/index.html").read_text())
    first_screen = " ".join(text[: text.index("First images of the last stage")].split())
    assert "Score unifork shared mot Chance Items shared less unifork mot less unifork" in first_screen
    row = r"seen: Yes/no questions, accuracy(?: [\d.]+ ± [\d.]+ over 2 seeds \([^)]*\); items ± [\d.]+){3} 0\.\d+ \d+"
    assert re.search(row + r"(?: -?[\d.]+ \([^)]*\), p [\d.]+){2}", first_screen), first_screen
    loss = r"held-out image loss of shapes-caption-generate \(lower is better\)"
    assert re.search(loss + r"(?: [\d.]+ ± [\d.]+ over 2 seeds \([^)]*\)){3}", first_screen), first_screen
    output = CliRunner().invoke(app, ["score", "compare", "mot", "unifork"]).output
    assert "shapes-understanding seen yes_no_accuracy: " in output
    commands = {
        "record study": [f"{name}: recorded" for name in experiment.variants],
        "grid study --out study/grid.png --seed 1": ["3 of 3 variants"],
        "show study --out shown --reference shared": ["shown/index.html", "shown/loss-s3.svg"],
    }
    for command, expected in commands.items():
        lines = CliRunner().invoke(app, ["study", *command.split()]).output
        assert [words for words in expected if words not in lines] == []
    tables = (tmp_path / "shown/tables.md").read_text()
    assert "| loss s3 shapes-caption-generate image depth 3 | unifork | 2 | " in tables
    assert "## Differences from shared (families of 2, the variants in one score)" in tables

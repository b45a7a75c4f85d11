"""Variants with several training seeds: on the page, on the command line, and beside earlier runs."""

import json
import re
import shutil

import pytest
from report_samples import FakeCodec, experiment, write_all
from test_page import Page, words
from typer.testing import CliRunner

from unifork.cli import app
from unifork.errors import ConfigError, DataError
from unifork.experiments import params_text
from unifork.report.build import build

NAMES = {f"{group}-seed{seed}": seed for group in ("dense", "fork") for seed in (0, 1, 2)}
VALUES = dict(zip(NAMES, (0.50, 0.60, 0.40, 0.57, 0.65, 0.48), strict=True))


def rewrite(where, variant, value, name="shapes-generation"):
    path = where.scores(variant) / name / "metrics.json"
    table = json.loads(path.read_text())
    table["seen"] = {score: row | {"value": value} for score, row in table["seen"].items()}
    path.write_text(json.dumps(table))


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """Two variants with three seeds each; the experiment and its folders. The working directory is theirs."""
    plan = experiment(tuple(NAMES))
    seeded = {name: variant.model_copy(update={"seed": NAMES[name]}) for name, variant in plan.variants.items()}
    plan = plan.model_copy(update={"variants": seeded, "seeds": (0, 1, 2), "band": "earlier.json"})
    for name, value in VALUES.items():
        where = write_all(tmp_path, plan, name)
        rewrite(where, name, value)
        folders = (where.model(f"{name}-{stage}") / "training" for stage in ("s1", "s3"))
        shutil.copy(next(folders) / "validation.csv", next(folders))
    where.params.write_text(params_text(plan))
    monkeypatch.chdir(tmp_path)
    return plan, where


def run(*arguments):
    return CliRunner().invoke(app, ["score", *arguments])


def test_the_page_shows_variants_over_their_seeds(compared):
    plan, where = compared
    page = build(plan, where, FakeCodec)
    text = words(page)
    title = "seen: Images from text, mean of the six kinds "
    dense, fork = ("0.500 ± 0.100 over 3 seeds (0.252 to 0.748)", "0.567 ± 0.085 over 3 seeds (0.355 to 0.778)")
    first_screen = f"{title}{dense}; items ± 0.062 {fork}; items ± 0.062 0.125 2 0.067 (0.029 to 0.105), p 0.14 "
    assert text.count(first_screen) == 1  # p is 0.0171, times the eight differences there
    assert f"seen: overall {dense}; items ± 0.062 {fork}; items ± 0.062 0.125 2 0.067 (0.029 to 0.105), p 0.017" in text
    loss = "held-out text loss of world-caption-caption (lower is better) "
    assert loss + "1.700 ± 0.000 over 3 seeds (1.700 to 1.700) 1.700 ± 0.000" in text
    assert "Differences are paired by seed" in text
    losses = [image["alt"] for image in Page(page).images if image["alt"].startswith("Text loss over")]
    assert len(losses) == 1
    assert losses[0].count("-seed") == 12  # every seed's curves, trained on and held out
    rows = [image["alt"] for image in Page(page).images if image["alt"].startswith("a red circle, ")]
    assert sum("fork-seed1, s3" in alt for alt in rows) == 1  # among the first images of every seed
    assert sum("fork-seed0, s3" in alt for alt in rows) == 2  # and after each stage for the first


def test_variants_are_compared_by_name(compared):
    result = run("compare", "fork", "dense")
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("shapes-generation seen overall:"))
    above = "0.5667 - 0.5 = 0.06667, 0.02872 to 0.1046; sd 0.0153 over 3 seeds"
    assert line.endswith(f"{above} (p 0.0171, exact 0.2500, corrected 0.1364)")
    assert isinstance(run("compare", "frok", "dense").exception, ConfigError)
    (compared[1].scores("fork-seed2") / "shapes-generation/metrics.json").unlink()
    assert "over 2 seeds" in run("compare", "fork", "dense").output


def test_runs_are_recorded_and_stand_beside_those_of_before(compared):
    plan, where = compared
    for _ in range(2):
        assert run("band", "--record").exit_code == 0
    rows = json.loads((where.root / "earlier.json").read_text())
    assert [row["seed"] for row in rows] == [0, 1, 2] * 4
    assert rows[0]["seconds"] == 180.0
    assert rows[0]["scores"]["shapes-generation seen overall"] == {"value": 0.5, "error": 0.0625, "items": 2}
    rewrite(where, "fork-seed2", 0.9)
    output = run("band").output
    assert re.search(r"shapes-generation seen overall 0\.90, usual 0\.\d\d to 0\.\d\d: outside", output)
    assert re.search(r"shapes-generation seen overall 0\.50, usual 0\.\d\d to 0\.\d\d: ok", output)
    assert "fork-seed0: 8 of 8 scores as usual" in output
    assert "fork-seed2: 5 of 8 scores as usual" in output
    assert "Beside 12 earlier runs" in (text := words(build(plan, where, FakeCodec)))
    assert re.search(r"fork-seed2: shapes-generation seen overall 0\.900 0\.\d\d to 0\.\d\d ✗", text)


def test_an_experiment_without_earlier_runs_has_no_band(compared):
    plan, where = compared
    assert "earlier.json: no such file" in words(build(plan, where, FakeCodec))
    assert isinstance(run("band").exception, DataError)
    where.params.write_text(params_text(plan.model_copy(update={"band": None})))
    assert (run("band").exit_code, run("band").output) == (0, "")

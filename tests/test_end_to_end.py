"""The whole line by `dvc repro` of `micro`, in a fresh checkout: killed, resumed, idle, damaged, changed."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from checkouts import check_out, environment, run
from forks import program
from safetensors.torch import load_file
from test_howto import blocks

from unifork.config import Experiment, TrainResources, load
from unifork.evaluation.comparison import read_runs
from unifork.experiments import resolve
from unifork.layout import Layout
from unifork.report.band import first_scores
from unifork.shards.manifest import read_manifest

STAGE = "unifork-s2-pretrain"
CLUSTER = {
    "name": "test",
    "cpus": 2,
    "object_store_mb": 80,
    "jobs": {"encode": {"workers": 2, "cpus": 0.5}},
    "train": {"workers": 0, "threads": 1, "row_tokens": 384},
    "train_stages": {"s2-pretrain": {"workers": 1, "cpus": 1, "threads": 1, "row_tokens": 384}},
}

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # has a Ray of its own


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return check_out(tmp_path_factory.mktemp("checkout"), CLUSTER)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL for a process and everything below it, as a lost machine would.

    DVC goes first: seeing its program die it would empty its lock file, and be killed before it fills it again.
    """
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        with suppress(psutil.NoSuchProcess):  # our programs die with their parent
            member.send_signal(signal.SIGKILL)
    process.wait()


def ran(text: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", text)


@pytest.fixture(scope="module")
def reproduced(checkout) -> Path:
    """Killed in the middle of the stage that runs on a worker process, then run to the end.

    What is killed are real programs of a real `dvc`; the stages before and after are forked.
    """
    run(checkout, "dvc", "repro", "train@unifork-s1-captions")
    with open(checkout / "first.log", "w") as log:
        first = subprocess.Popen(
            ["dvc", "repro"], cwd=checkout, env=environment(checkout), stdout=log, stderr=log, start_new_session=True
        )
        pointer, deadline = checkout / "runs" / STAGE / "latest", time.monotonic() + 400
        while not (pointer.exists() and int(pointer.read_text().removeprefix("step-")) >= 10):
            assert first.poll() is None, (checkout / "first.log").read_text()[-3000:]
            assert time.monotonic() < deadline, (checkout / "first.log").read_text()[-3000:]
            time.sleep(0.1)
        kill_tree(first)
    assert not (checkout / "models" / STAGE).exists()
    second = run(checkout, "dvc", "repro")
    assert "encode@shapes" not in ran(second)
    (checkout / "second.log").write_text(second)
    return checkout


def test_it_goes_on_from_the_last_checkpoint_and_says_so(reproduced):
    log = (reproduced / "second.log").read_text()
    assert re.search(rf"{STAGE}: continuing from step (10|15|20) of 25", log)


def test_it_ends_with_the_weights_of_an_unbroken_run(reproduced, tmp_path):
    from unifork.training.loop import WorkerContext
    from unifork.training.stage import StageJob, train_stage

    root = tmp_path / "root"
    for name in ("data", "models/unifork-init", "models/unifork-s1-captions"):
        shutil.copytree(reproduced / name, root / name)
    experiment = load(Experiment, reproduced / "params.yaml")
    resources = TrainResources(threads=1, row_tokens=384)
    before = torch.get_num_threads()
    train_stage(StageJob(key=STAGE, experiment=experiment, resources=resources, root=str(root)), WorkerContext())
    torch.set_num_threads(before)
    expected = load_file(root / "models" / STAGE / "model.safetensors")
    found = load_file(reproduced / "models" / STAGE / "model.safetensors")
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    for name in ("history.csv",):
        file = Path("models") / STAGE / "training" / name
        assert (reproduced / file).read_text() == (root / file).read_text()


def test_earlier_runs_of_the_demo_have_the_scores_that_a_run_has(reproduced):
    """`micro` has its benchmarks, and scores them by the same cards."""
    experiment = load(Experiment, reproduced / "params.yaml")
    scores = first_scores(experiment, "unifork", Layout(reproduced))
    for earlier in read_runs(reproduced / resolve("demo", reproduced / "experiments", reproduced / "datasets").band):
        assert earlier.scores.keys() == scores.keys()


def test_everything_is_there(reproduced):
    for view in ("crop", "pad"):
        assert read_manifest(reproduced / "data/codes/shapes" / view).rows == 600
    assert read_manifest(reproduced / "answers/unifork/shapes-understanding").rows == 80
    headlines = json.loads((reproduced / "scores/unifork.json").read_text())
    metrics = json.loads((reproduced / "scores/unifork/shapes-generation/metrics.json").read_text())
    assert headlines["shapes-generation.seen.overall"] == metrics["seen"]["overall"]["value"]
    assert all(isinstance(value, float) for value in headlines.values())
    assert set(metrics) == {"seen", "held_out"}
    for name in ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall"):
        assert {"value", "standard_error", "chance", "items", "clusters", "rule", "model"} <= set(metrics["seen"][name])
    page = (reproduced / "reports/micro/index.html").read_text()
    assert len(page) > 50_000


def test_a_second_repro_does_nothing_in_under_five_seconds(reproduced):
    started = time.monotonic()
    output = run(reproduced, sys.executable, "-m", "dvc", "repro")
    assert time.monotonic() - started < 5
    assert ran(output) == []
    assert "up to date" in output


def test_damaged_code_shards_are_noticed_and_only_they_are_made_again(reproduced):
    """One is missing, one is truncated, in different views; DVC's cache of runs is of no help."""
    shutil.rmtree(reproduced / ".dvc/cache/runs", ignore_errors=True)
    (reproduced / "cluster.yaml").write_text(yaml.safe_dump({**CLUSTER, "jobs": {}}))  # actors made them
    folder = reproduced / "data/codes/shapes"
    damaged = {"crop/part-00001.parquet", "pad/part-00000.parquet"}

    def state() -> dict[str, tuple[int, bytes]]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    missing, truncated = (folder / name for name in sorted(damaged))
    missing.unlink()
    truncated.write_bytes(truncated.read_bytes()[:-20])
    output = run(reproduced, "dvc", "repro")
    assert ran(output) == ["encode@shapes"]
    for view in ("crop", "pad"):
        assert f"{view}: 2/3 shards (2 kept from before)" in output
    after = state()
    assert {name for name in before if before[name] != after[name]} <= damaged | {
        "crop/manifest.json",
        "pad/manifest.json",
    }
    assert {name: data for name, (_, data) in before.items()} == {name: data for name, (_, data) in after.items()}


def test_dvc_runs_an_experiment_and_shows_what_it_changed(reproduced):
    """`exp run -S`, `exp show`, `metrics diff`, `plots diff`, as people type them; afterwards all is as it was."""
    key, loss = "stages.s3.tracks.generation.optimizer.learning_rate", "unifork.image_loss"
    run(reproduced, "git", "add", "-A")
    run(reproduced, "git", "commit", "-qm", "the first run")
    ended = json.loads((reproduced / "reports/micro/losses.json").read_text())
    output = run(reproduced, "dvc", "exp", "run", "-n", "warmer", "-S", f"{key}=0.002")
    assert ran(output)[0] == "train@unifork-s3"
    assert ran(output)[-1] == "report"
    now = json.loads((reproduced / "reports/micro/losses.json").read_text())
    assert now[loss] != ended[loss]

    table = run(reproduced, "dvc", "exp", "show", "--csv", "--only-changed")
    rows = {row["Experiment"] or row["rev"]: row for row in csv.DictReader(table.splitlines())}
    assert (float(rows["warmer"][key]), float(rows["warmer"][loss])) == (0.002, now[loss])
    assert float(next(row for name, row in rows.items() if name not in ("warmer", "workspace"))[loss]) == ended[loss]

    changed = json.loads(run(reproduced, "dvc", "metrics", "diff", "--json", "HEAD"))
    assert changed["reports/micro/losses.json"][loss] == {
        "old": ended[loss], "new": now[loss], "diff": pytest.approx(now[loss] - ended[loss]),
    }  # fmt: skip
    plots = json.loads(run(reproduced, "dvc", "plots", "diff", "--json", "HEAD"))["data"]
    (plot,) = plots["reports/micro/losses/image_loss.csv"]
    points = plot["content"]["data"]["values"]
    curves = {
        rev: [float(point["value"]) for point in points if point["rev"] == rev and not point["of"]]
        for rev in ("HEAD", "workspace")
    }
    assert curves["HEAD"][:-6] == curves["workspace"][:-6]  # the stages before
    assert curves["HEAD"][-1] != curves["workspace"][-1]
    assert plot["content"]["spec"]["encoding"]["color"]["field"] == "rev"  # our template, filled in

    code, output = program(reproduced, ("dvc", "exp", "run", "-S", "training_seed=1"), **environment(reproduced))
    assert code != 0
    assert "`unifork use` alone writes" in output
    run(reproduced, "git", "checkout", "--", "params.yaml", "dvc.lock")
    run(reproduced, "dvc", "checkout", "--force")
    assert json.loads((reproduced / "reports/micro/losses.json").read_text()) == ended


def test_a_changed_parameter_runs_only_what_depends_on_it(reproduced):
    params, card = reproduced / "params.yaml", reproduced / "datasets/evals/shapes-understanding.yaml"
    original, rules = params.read_text(), card.read_text()
    card.write_text(rules.replace("[official, strict]", "[strict]"))
    assert ran(run(reproduced, "dvc", "repro", "--dry")) == ["score@unifork", "report"]
    card.write_text(rules.replace("max_new_tokens: 32", "max_new_tokens: 3"))
    assert ran(run(reproduced, "dvc", "repro", "--dry"))[0] == "answer@unifork-shapes-understanding"
    card.write_text(rules.replace("[official, strict]", "[strict]"))
    plain = yaml.safe_load(original)
    plain["benchmarks"]["shapes-understanding"]["options"]["samples"] = 6
    params.write_text(yaml.safe_dump(plain, sort_keys=False))
    name = "shapes-understanding"
    expected = [f"items@{name}", f"answer@unifork-{name}", "score@unifork", "report"]
    assert ran(run(reproduced, "dvc", "repro")) == expected
    plain["stages"]["s3"]["context"] += 1
    params.write_text(yaml.safe_dump(plain, sort_keys=False))
    assert ran(run(reproduced, "dvc", "repro", "--dry"))[0] == "train@unifork-s3"
    params.write_text(original)
    card.write_text(rules)


def test_the_model_draws_and_answers_from_the_command_line(reproduced, tmp_path):
    cli = (sys.executable, "-m", "unifork.cli")

    def forked(*words):
        return program(reproduced, ("unifork.cli", *words), **environment(reproduced))

    model = ("--model", "models/unifork-s3")
    output = run(reproduced, *cli, "generate", *model, "--prompt", "a red circle", "--out", str(tmp_path), "-n", "2")
    assert [Path(line).name for line in output.split() if line.endswith(".png")] == ["0000.png", "0001.png"]
    first = (tmp_path / "0000.png").read_bytes()
    more = ("--prompt", "a red circle", "--out", str(tmp_path), "-n", "1", "--seed", "1")
    assert forked("generate", *model, *more)[0] == 0
    assert (tmp_path / "0000.png").read_bytes() != first
    question = ("--question", "Is there a red circle in the image?")
    assert forked("describe", *model, "--image", str(tmp_path / "0001.png"), *question)[0] == 0
    nowhere = forked("describe", *model, "--image", "nowhere.png", *question)
    assert nowhere == (2, "error: nowhere.png: no such file\n")


@pytest.mark.pages
def test_the_commands_of_the_howto_page_work(reproduced):
    """Its files and its commands, in the order of the page, after all others: params.yaml and models change."""
    run(reproduced, sys.executable, "-m", "unifork.cli", "use", "micro", "--force")
    run(reproduced, "dvc", "repro")
    for kind, text in blocks():
        if kind == "yaml":
            (reproduced / text.partition("\n")[0].removeprefix("# ")).write_text(text)
        elif kind == "console":
            run(reproduced, "bash", "-e", "-c", text)
    assert {path.name for path in (reproduced / "runs").glob("*")} >= {"unifork-s2-more", "unifork-s2-slow"}
    summary = json.loads((reproduced / "models/tuned-drawing/training/summary.json").read_text())
    assert summary["stage"]["lora"]["rank"] == 8
    assert (reproduced / "published-codes/README.md").exists()

"""A checkpoint of a run as a model directory: any that is there, of a run that goes on or has ended."""

import json

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import RESOURCES, assert_equal, killed, weights
from tiny import write_experiment
from typer.testing import CliRunner

from unifork.cli import app
from unifork.errors import CheckpointError, ConfigError
from unifork.inference import stage_sampling
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

pytestmark = pytest.mark.slow

STAGE, KEY = "s2-pretrain", "unifork-s2-pretrain"
SUMMARY = "training/summary.json"


def run(*words):
    result = CliRunner().invoke(app, [*map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def stage_job(root, monkeypatch):
    """A stage that was killed after step 6 of 8, with checkpoints of the steps 3 and 6."""
    few = {"checkpoint_every": 3, "keep_checkpoints": 9, "sample_prompts": [], "tracks": {"joint": {"steps": 8}}}
    changes = {"variants": {"unifork": {"stages": [STAGE]}}, "stages": {STAGE: few}}
    experiment = write_experiment(root, changes)
    stage_job = StageJob(key=KEY, experiment=experiment, resources=RESOURCES, root=str(root))
    killed(stage_job, "between latest and the metrics", 2)
    monkeypatch.chdir(root)
    return stage_job


def test_the_newest_and_any_other_one(stage_job, root):
    assert "early: unifork-s2-pretrain after 3 steps" in run("model", "checkpoint", KEY, "--step", 3, "--out", "early")
    assert "after 6 steps" in run("model", "checkpoint", KEY, "--out", "newest")
    train_stage(stage_job, WorkerContext())
    assert "after 8 steps" in run("model", "checkpoint", KEY, "--out", "end")
    assert_equal(load_file("end/model.safetensors"), weights(stage_job))
    start, *found = [load_file(f"{name}/model.safetensors") for name in (stage_job.start, "early", "newest", "end")]
    for before, after in zip([start, *found], found, strict=False):
        assert not all(torch.equal(before[name], after[name]) for name in before)
    done, of_end = (
        json.loads((root / name / "training/summary.json").read_text()) for name in (f"models/{KEY}", "end")
    )
    assert of_end == done | {"documents": {}, "quarantined": {}}
    assert (root / "early/training/history.csv").read_text().count("\n") == 1 + 3
    assert stage_sampling(root / "early") == stage_job.stage.sampling


def test_it_is_taken_where_a_model_is(stage_job):
    run("model", "checkpoint", KEY, "--step", 3, "--out", "early")
    run("analyze", "conflict", "early", "--run", KEY, "--out", "found", "--pairs", 4)
    assert json.loads((stage_job.layout.root / "found/conflict.json").read_text())["matrices"]
    assert "0000.png" in run("generate", "--model", "early", "--prompt", "a red circle", "--out", "drawn")


def test_what_is_not_there_or_damaged_is_named(stage_job, root):
    with pytest.raises(
        ConfigError, match=r"/unifork-s2-pretrain: unknown checkpoint 'step-4'.* Known: step-3, step-6\."
    ):
        run("model", "checkpoint", KEY, "--step", 4, "--out", "early")
    with pytest.raises(ConfigError, match=r"params\.yaml: runs: unknown run 'unifork-s2'"):
        run("model", "checkpoint", "unifork-s2", "--out", "early")
    (file,) = (stage_job.run_folder / "step-6").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="not the bytes that were written"):
        run("model", "checkpoint", KEY, "--out", "early")
    assert not (root / "early").exists()

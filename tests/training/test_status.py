"""What `unifork status` shows of a run that is stopped, going, finished, or gone wrong; from its files alone."""

import json
import re
import signal
import time

import pytest
from stage_runs import job
from test_signals import signal_in_step
from typer.testing import CliRunner

from unifork.batch import TEXT
from unifork.cli import app
from unifork.errors import Stopped, UniForkError
from unifork.models.modeling import UniForkModel, load_model
from unifork.processes import exclusive, lock_path
from unifork.shards.progress import PROGRESS, read_progress, write_progress
from unifork.training import history, stage
from unifork.training.flops import Length, document_flops
from unifork.training.launch import launch
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow

KEY = "unifork-s2-pretrain"


def shown(*words):
    result = CliRunner().invoke(app, ["status", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def run_of(name=KEY):
    return next(row for row in json.loads(shown("--json")) if row["name"] == name)


@pytest.fixture(autouse=True)
def _in_the_folder(root, monkeypatch):
    monkeypatch.chdir(root)


def test_a_run_is_shown_from_its_wait_to_its_end(root, monkeypatch):
    assert run_of() | {"state": "waiting", "done": 0, "reason": None} == run_of()
    stage_job = job(root, checkpoint_every=100)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_in_step(patch, 2, signal.SIGTERM)
        launch(stage_job)
    row = run_of()
    assert [row[name] for name in ("state", "done", "total", "checkpoint")] == ["stopped", 4, 8, "step-4"]
    assert row["reason"] == "SIGTERM: every finished step is saved; the same command goes on"
    assert "left" not in row
    assert f"{KEY}: SIGTERM: every finished step" in shown()
    with exclusive(stage_job.run_folder), open(stage_job.run_folder / "history.jsonl", "a") as steps:
        steps.write('{"half a li')
        steps.flush()
        assert [run_of()[name] for name in ("state", "done", "reason")] == ["running", 4, None]
    launch(stage_job)
    row, last = run_of(), history.read(stage_job.run_folder)[-1]
    assert [row[name] for name in ("state", "done", "total", "reason")] == ["finished", 8, 8, None]
    assert [row[name] for name in ("text_loss", "image_loss", "fill")] == [
        last[name] for name in ("text_loss", "image_loss", "fill")
    ]
    assert 0.05 < row["memory_gib"] < 50
    assert row["documents_per_second"] > 0
    assert row["mfu"] is None
    line = next(line for line in shown().splitlines() if line.startswith(KEY))
    assert f"finished  8/8   {last['text_loss']:.3f}  {last['image_loss']:.3f}  -" in line
    assert line.endswith("step-8")


def test_what_a_run_writes_of_its_progress_is_what_its_log_says(root, monkeypatch):
    monkeypatch.setattr(stage.Progress.__init__, "__defaults__", ("cpu", 0.0))
    seen = []
    original = history.write_progress

    def write(path, **facts):
        original(path, **facts)
        seen.append((facts, run_of("unifork-s3")))

    monkeypatch.setattr(history, "write_progress", write)
    stage_job = job(root, "unifork-s3")
    train_stage(stage_job, WorkerContext())
    (first, row), *steps = seen
    assert first == {"done": 0, "total": 16}
    assert row["state"] == "running"
    assert 0 <= row["seen"] < 10
    log = (stage_job.run_folder / "log.txt").read_text()
    for number, (facts, row) in enumerate(steps, 1):
        assert facts["done"] == row["done"] == number
        assert f"step {number}/16 [{facts['track']}]" in log
        assert f"{facts['tokens_per_second']:.0f} tokens/s  memory {facts['memory_gib']:.2f} GiB" in log
        assert row["left"] == facts["seconds_left"]
    assert {"text_loss", "image_loss"} <= steps[-1][0].keys()  # of two tracks that have a task each
    assert len(steps) == 16


def test_an_error_is_the_reason_and_a_kill_has_none(root, monkeypatch):
    def out_of_bounds(*_):
        raise UniForkError("track joint, step 3: loss nan\nand more")

    monkeypatch.setattr(stage.Watch, "check", out_of_bounds)
    with pytest.raises(UniForkError):
        launch(job(root))
    assert [run_of()[name] for name in ("state", "reason")] == ["stopped", "track joint, step 3: loss nan"]
    place = root / "runs" / KEY / PROGRESS
    write_progress(place, done=3, total=8, seconds_left=5.0)
    assert run_of()["reason"].startswith("without a word")


def test_a_lock_of_another_machine_is_not_taken_for_a_dead_one(root):
    folder = root / "runs" / KEY
    write_progress(folder / PROGRESS, done=3, total=8, seconds_left=5.0)
    plain = read_progress(folder / PROGRESS)
    (folder / PROGRESS).write_text(json.dumps({**plain, "written": time.time() - 40}))
    lock_path(folder).write_text("process 7 on elsewhere")
    row = run_of()
    assert row["state"] == "unknown"
    assert 40 <= row["seen"] < 100
    assert re.search(r"unknown .* 0:0[01]:\d\d ago", shown())
    assert f"{KEY}: the lock of process 7 on elsewhere is not held" in shown()


def test_validation_is_the_mean_over_the_parts_of_the_newest(root):
    folder = root / "runs" / KEY
    write_progress(folder / PROGRESS, done=3, total=8)
    parts = [(4, 9.0, 9.0), (8, 1.0, None), (8, 2.0, 4.0), (8, None, 5.0)]
    lines = [json.dumps({"finished_steps": n, "text_loss": text, "image_loss": image}) for n, text, image in parts]
    assert "validation_text_loss" not in run_of()
    (folder / "validation.jsonl").write_text("\n".join(lines) + '\n{"half')
    row = run_of()
    assert (row["validation_text_loss"], row["validation_image_loss"]) == (1.5, 4.5)
    assert "1.500     4.500" in shown()


def test_the_share_of_a_peak_is_that_of_the_planned_flops(root):
    stage_job = job(root)
    model, found = load_model(stage_job.start), {}
    original, shares = stage.flops_per_token, stage._token_shares

    def counting(model, loader, trained, lora):
        plan = loader.plan(0, 1)
        found["documents"] = [loader.document(plan, number) for number in range(len(plan.slots))]
        found["each"] = original(model, loader, trained, lora)
        found["trained"] = set(trained)
        return found["each"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "flops_per_token", counting)
        patch.setattr(stage, "peak_flops", lambda name: 1e12)
        patch.setattr(stage.torch.cuda, "get_device_name", lambda device: "a chip")
        patch.setattr(stage, "_token_shares", lambda _, *rest: shares("cuda", *rest))
        train_stage(stage_job, WorkerContext())
    outline = UniForkModel(model.config).to("meta")
    total = 0.0
    for document in found["documents"]:
        image = int((document.kinds_T != TEXT).sum())
        positions = len(document.codes_ND) * (document.task == "generation")
        length = Length(len(document) - image, image, int(document.loss_mask_T.sum()), positions)
        total += document_flops(outline, document.task, length, found["trained"])
    tokens = sum(map(len, found["documents"]))
    assert {document.task for document in found["documents"]} == {"understanding", "generation"}
    assert found["each"] == pytest.approx(total / tokens, rel=2e-3)
    row = run_of()
    assert row["mfu"] == pytest.approx(found["each"] * row["tokens_per_second"] / 1e12)
    assert f"  MFU {row['mfu']:.1%}" in (stage_job.run_folder / "log.txt").read_text()

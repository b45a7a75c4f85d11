"""What `unifork status` shows of a run that is stopped, going, finished, or gone wrong; from its files alone."""

import json
import re
import signal

import pytest
from stage_runs import job
from test_signals import signal_in_step

from unifork.commands.status import status
from unifork.errors import Stopped
from unifork.processes import exclusive
from unifork.training.launch import launch


def test_a_run_is_shown_with_its_step_losses_checkpoint_and_why_it_stopped(root, monkeypatch, capsys):
    def shown():
        capsys.readouterr()
        status()
        head, row, *reasons = capsys.readouterr().out.splitlines()
        assert head.split() == ["run", "state", "step", "text", "image", "fill", "rate", "left", "checkpoint"]
        return re.split("  +", row), reasons

    monkeypatch.chdir(root)
    stage_job = job(root, checkpoint_every=100)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_in_step(patch, 2, signal.SIGTERM)
        launch(stage_job)
    row, reasons = shown()
    assert row[:3] == ["unifork-s2-pretrain", "stopped", "4/8"]
    assert all(re.fullmatch(r"\d\.\d{3}", number) for number in row[3:6])
    assert row[8] == "step-4"
    assert reasons == ["unifork-s2-pretrain: stopped by a signal after step 4 of 8, which is saved"]
    (stage_job.run_folder / "stopped.json").write_text(json.dumps({"reason": "step 3: loss nan"}))
    assert shown()[1] == ["unifork-s2-pretrain: step 3: loss nan"]
    with exclusive(stage_job.run_folder), open(stage_job.run_folder / "history.jsonl", "a") as history:
        history.write('{"half a li')
        history.flush()
        assert shown()[0][1:3] == ["running", "4/8"]
    launch(stage_job)
    row, reasons = shown()
    assert row[1:3] == ["finished", "8/8"]
    assert row[6].endswith(" documents/s")
    assert reasons == []

"""Where the numbers of a step go: TensorBoard, Weights & Biases, anybody's logger; none of them holds training."""

import re
import sys
import threading
import time
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from stage_runs import RESOURCES, job

from unifork.errors import ConfigError
from unifork.training.history import History, read
from unifork.training.launch import launch
from unifork.training.loggers import Logger, TensorBoard
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow


def with_loggers(root, *names, **changes):
    return job(root, resources=RESOURCES.model_copy(update={"loggers": names}), **changes)


def numbers_of(row):
    return {f"joint/{name}": value for name, value in row.items() if isinstance(value, float | int) and name != "step"}


def test_tensorboard_reads_every_number_and_a_repeated_step_once(root):
    stage_job = job(root)
    train_stage(stage_job, WorkerContext())
    rows = read(stage_job.run_folder)
    again = History(stage_job.run_folder, 4, print, [TensorBoard])  # as after a kill behind the checkpoint of step 4
    for row in rows[4:6]:
        again.add(row)
    again.close()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = accumulator.EventAccumulator(
        str(stage_job.run_folder / "tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    for name in numbers_of(rows[0]):
        events, values = board.Scalars(name), [numbers_of(row)[name] for row in rows[:6]]
        assert [event.step for event in events] == [1, 2, 3, 4, 5, 6]
        assert [event.value for event in events] == pytest.approx(values, rel=1e-6)


class Service:
    """The three calls of wandb, and what they got; `broken` names one that fails, `hanging` one that never returns."""

    def __init__(self, broken="", hanging=""):
        self.broken, self.hanging, self.got, self.ended = broken, hanging, {}, False
        self.Settings = SimpleNamespace

    def _call(self, name):
        if name == self.hanging:
            threading.Event().wait()
        if name == self.broken:
            raise ConnectionError("nobody answers")

    def init(self, **options):
        self.options = options
        self._call("init")
        return self

    def log(self, numbers, step):
        self._call("log")
        self.got[step] = numbers

    def finish(self):
        self._call("finish")
        self.ended = True


@pytest.fixture
def service(monkeypatch):
    def stand_in(**faults):
        monkeypatch.setitem(sys.modules, "wandb", module := Service(**faults))
        sys.modules.pop("unifork.training.service", None)
        import_module("unifork.training.service")
        return module

    yield stand_in
    sys.modules.pop("unifork.training.service", None)


def test_wandb_gets_every_number_of_every_step(root, service):
    wandb, stage_job = service(), with_loggers(root, "wandb")
    launch(stage_job)
    assert wandb.got == {number: numbers_of(row) for number, row in enumerate(read(stage_job.run_folder), 1)}
    assert wandb.ended
    assert wandb.options["name"] == stage_job.key
    assert wandb.options["settings"].finish_timeout > 0
    assert not (stage_job.run_folder / "tensorboard").exists()


@pytest.mark.parametrize("fault", ["broken", "hanging"])
@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_service_that_fails_or_hangs_costs_a_line(root, service, monkeypatch, fault, call):
    service(**{fault: call})
    stage_job = with_loggers(root, "wandb", "tensorboard", steps=3)
    monkeypatch.setattr("unifork.training.service.PATIENCE_SECONDS", 0.5)
    started = time.monotonic()
    launch(stage_job)
    assert time.monotonic() - started < 60
    log = (stage_job.run_folder / "log.txt").read_text()
    reason = "it did not end within 0.5 s" if fault == "hanging" else "ConnectionError: nobody answers"
    assert re.findall("warning: .*", log) == [f"warning: logger wandb is left out from here on: {reason}"]
    assert "finished in" in log
    assert list((stage_job.run_folder / "tensorboard").iterdir())


def test_a_service_that_falls_behind_is_left_out(root, service, monkeypatch):
    service(hanging="init")
    monkeypatch.setattr("unifork.training.service.MOST_WAITING", 2)
    stage_job = with_loggers(root, "wandb", steps=3)
    launch(stage_job)
    assert (
        "logger wandb is left out from here on: 2 steps wait for it" in (stage_job.run_folder / "log.txt").read_text()
    )


class Own(Logger):
    steps: list[int] = []

    def add(self, step, numbers):
        self.steps.append(step)


def test_a_logger_may_be_anybodys(root):
    launch(with_loggers(root, f"{__name__}:Own", steps=3))
    assert Own.steps == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [("wandb", r"train\.loggers: logger 'wandb': No module named 'wandb'"), ("board", r"unknown logger 'board'")],
)
def test_what_cannot_be_used_is_refused_before_anything_starts(root, name, message):
    if name == "wandb" and find_spec("wandb"):
        pytest.skip("wandb is installed")
    stage_job = with_loggers(root, name)
    with pytest.raises(ConfigError, match=message):
        launch(stage_job)
    assert not stage_job.run_folder.exists()

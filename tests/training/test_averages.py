"""The average of weights: what it is, that training does not notice it, that kills and workers change nothing."""

import pytest
import torch
from distributed_testing import run_distributed
from safetensors.torch import load_file
from stage_runs import RESOURCES, assert_equal, job, killed, train_and_die, weights, worker
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from unifork.config import Averaging
from unifork.errors import ConfigError
from unifork.training import checkpoint
from unifork.training.history import read
from unifork.training.loop import TrackRun, WorkerContext
from unifork.training.optimizer import Average
from unifork.training.stage import train_stage

pytestmark = pytest.mark.slow

EMA = Averaging(decay=0.5)


@pytest.fixture(scope="module")
def averaged(tiny_root, tmp_path_factory):
    """Stage III without interruption, its average exported: the job."""
    from tiny import copy_of

    stage_job = job(copy_of(tiny_root, tmp_path_factory.mktemp("averaged") / "root"), "unifork-s3", ema=EMA)
    train_stage(stage_job, WorkerContext())
    return stage_job


def trained(stage_job):
    """The trained weights of a run's last checkpoint."""
    path, _ = checkpoint.latest(stage_job.run_folder)
    whole = checkpoint.all_tensors(checkpoint.whole_model(path, stage_job.start))
    return {name: whole[name] for name in weights(stage_job)}


def test_training_is_the_same_with_and_without(averaged, unbroken):
    expected, history = unbroken["unifork-s3"]
    assert_equal(trained(averaged), expected)
    assert read(averaged.run_folder) == history


def test_a_model_has_the_average_over_the_steps_of_the_track_that_trains_a_parameter(root, averaged, monkeypatch):
    """Against a loop in float64 over the weights after every step."""
    steps, step = [], TrackRun.step

    def watched(self, *args):
        done = step(self, *args)
        steps.append({name: p.detach().double().clone() for name, p in self.parameters.items()})
        return done

    monkeypatch.setattr(TrackRun, "step", watched)
    stage_job = job(root, "unifork-s3", ema=EMA)
    train_stage(stage_job, WorkerContext())
    start, expected = load_file(root / "models/unifork-init/model.safetensors"), {}
    for name in start:
        expected[name] = start[name].double()
        for number, after in enumerate([after[name] for after in steps if name in after]):
            decay = min(0.5, (1 + number) / (10 + number))
            expected[name] = decay * expected[name] + (1 - decay) * after
    assert sum(len(after) for after in steps) > 0
    exported = weights(stage_job)
    assert_equal(exported, weights(averaged))
    for name, tensor in exported.items():
        assert torch.allclose(tensor.double(), expected[name], rtol=1e-6, atol=1e-7), name
    moved = [name for name in start if not torch.equal(exported[name], trained(stage_job)[name])]
    assert {name for after in steps for name in after} >= set(moved) != set()


def test_the_trained_weights_are_exported_without_training_again(root, averaged, unbroken):
    stage_job = job(root, "unifork-s3", ema=EMA)
    train_stage(stage_job, WorkerContext())
    train_stage(job(root, "unifork-s3", ema=EMA.model_copy(update={"export": False})), WorkerContext())
    assert_equal(weights(stage_job), unbroken["unifork-s3"][0])
    assert "continuing from step 16 of 16" in (stage_job.run_folder / "log.txt").read_text()
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), weights(averaged))


def test_a_stage_without_has_the_fingerprint_of_before(root):
    plain = job(root).stage.model_dump(mode="json")
    assert not {"ema", "extend"} & plain.keys()
    assert job(root).fingerprint() != job(root, ema=EMA).fingerprint()


@pytest.mark.parametrize("where", ["after the update", "between latest and the metrics"])
def test_killed_twice_the_average_is_the_same(root, averaged, where):
    stage_job = job(root, "unifork-s3", ema=EMA)
    for _ in range(2):
        killed(stage_job, where, 2)
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), weights(averaged))


@pytest.mark.parametrize("shard", ["none", "all", "deepspeed-2"])
def test_two_workers_average_as_one_and_go_on_bit_equal(tiny_root, tmp_path, averaged, shard):
    from tiny import copy_of

    resources = RESOURCES.model_copy(update={"workers": 2, "shard": shard})
    whole, broken = (
        job(copy_of(tiny_root, tmp_path / name), "unifork-s3", resources, ema=EMA) for name in ("whole", "broken")
    )
    run_distributed(worker, 2, whole.model_dump(mode="json"))
    with pytest.raises(ProcessExitedException):
        run_distributed(dying_worker, 2, broken.model_dump(mode="json"))
    run_distributed(worker, 2, broken.model_dump(mode="json"))
    assert_equal(weights(broken), weights(whole))
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(averaged)[name], atol=2e-4), name
    train_stage(job(tmp_path / "whole", "unifork-s3", steps=8, ema=EMA), WorkerContext())  # read by one worker
    assert_equal(weights(whole), weights(broken))


def dying_worker(rank, world, plain):
    train_and_die(plain, "between latest and the metrics", 2, rank, world)


def test_weights_in_pieces_are_refused():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_tensor = parameter.detach()
    with pytest.raises(ConfigError, match="ema: not with deepspeed-3"):
        Average(0.9, {"weight": parameter}).start()

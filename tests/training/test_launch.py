"""What training asks Ray for, and which errors cost a restart."""

import re
from pathlib import Path

import pytest
import torch
from stage_runs import RESOURCES, job

from unifork.config import LossBand, TrainResources
from unifork.errors import ConfigError, DataError, UniForkError
from unifork.training import launch


def resources(workers, **more):
    return RESOURCES.model_copy(update={"workers": workers, "cpus": 0.5, "max_restarts": 2, **more})


def log_of(stage_job):
    return (stage_job.run_folder / "log.txt").read_text()


def test_training_asks_for_the_gpus_of_the_cluster_file(ray_session, tmp_path):
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    def worker(config):
        import os

        rank = ray.train.get_context().get_world_rank()
        Path(config["folder"], str(rank)).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))

    train_resources = TrainResources(workers=2, cpus=0.5, gpus=1)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ray.train.ScalingConfig(**launch.scaling(train_resources)),
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray"), name="gpus"),
    )
    trainer.fit()
    seen = {(tmp_path / rank).read_text() for rank in ("0", "1")}
    assert all(devices for devices in seen)


@pytest.mark.parametrize(
    "workers", [0, pytest.param(1, marks=pytest.mark.soak), pytest.param(2, marks=pytest.mark.soak)]
)
def test_a_loss_out_of_its_band_ends_the_run_at_once_with_its_message(request, root, workers):
    """On workers its way is that of the mistake of one worker, below."""
    if workers:
        request.getfixturevalue("ray_session")
    stage_job = job(root, resources=resources(workers), loss_band=LossBand(stop=0.9))
    with pytest.raises(UniForkError, match=r"step 0: text_loss .* is above 0\.9 x 5\.991") as caught:
        launch.launch(stage_job)
    assert type(caught.value) is UniForkError
    assert log_of(stage_job).count("starting, 8 steps") == 1


@pytest.mark.soak  # what ends a worker keeps its type in the tests beside it; a next start: test_signals
def test_a_missing_template_keeps_its_type_and_the_next_start_is_a_new_one(ray_session, root):
    stage_job = job(root, resources=resources(1), steps=1)
    stage = stage_job.stage
    (entry, *_), track = stage.tracks["joint"].mixture, stage.tracks["joint"]
    wrong = track.model_copy(update={"mixture": (entry.model_copy(update={"template": "generat"}),)})
    stages = {"s2-pretrain": stage.model_copy(update={"tracks": {"joint": wrong}})}
    bad = stage_job.model_copy(update={"experiment": stage_job.experiment.model_copy(update={"stages": stages})})
    with pytest.raises(ConfigError, match=r"unknown prompt template 'generat'.*Did you mean 'generate'"):
        launch.launch(bad)
    launch.launch(stage_job)
    assert stage_job.model_folder.exists()


def instead_of_training(monkeypatch, attempts, stage):
    """Workers call `stage(rank, attempt)`; both know how often the group was started."""

    def worker(config):  # a function of a function is sent as it is, with what it names
        import ray.train
        from torch import distributed

        from unifork.training import launch

        rank = ray.train.get_context().get_world_rank()
        path = Path(attempts) / str(rank)
        attempt = len(path.read_text()) if path.exists() else 0
        path.write_text("x" * (attempt + 1))

        def train_stage(job, run):
            stage(rank, attempt)
            if run.workers > 1:
                distributed.barrier()

        launch.train_stage = train_stage
        launch._worker(config)

    monkeypatch.setattr(launch, "_worker", worker)


def started(folder):
    return {path.name: len(path.read_text()) for path in folder.iterdir()}


def test_a_mistake_of_one_worker_ends_those_that_wait_for_it(ray_session, root, monkeypatch, tmp_path):
    def stage(rank, attempt):
        from unifork.errors import DataError

        if rank == 1:
            raise DataError("a shard of rank 1 is damaged")

    (tmp_path / "attempts").mkdir()
    instead_of_training(monkeypatch, tmp_path / "attempts", stage)
    with pytest.raises(DataError, match=r"^a shard of rank 1 is damaged$"):
        launch.launch(job(root, resources=resources(2)))
    assert started(tmp_path / "attempts") == {"0": 1, "1": 1}


def test_a_node_that_does_not_share_the_folder_is_named_and_costs_no_restart(
    ray_session, root, monkeypatch, tmp_path, capfd
):
    def worker(config):
        from unifork.training import launch

        with (Path(config["shared"]).parent / "starts").open("a") as starts:
            starts.write("x")
        launch._worker({**config, "shared": config["shared"] + "-elsewhere"})

    monkeypatch.setattr(launch, "_worker", worker)
    stage_job = job(root, resources=resources(1))
    with pytest.raises(ConfigError, match=r"^node \S+ \(\S+\) does not see /.*runs/\.ray/\.shared-.*-elsewhere, which"):
        launch.launch(stage_job)
    assert (stage_job.layout.ray_train / "starts").read_text() == "x"
    assert not (stage_job.run_folder / "log.txt").exists()  # nothing was written there


@pytest.mark.parametrize(
    ("saved", "restarts"),
    [([None, 1, 1], 2), ([1, 2, 3, 3], 3), ([1, 2, "end"], 2)],
)
def test_restarts_are_counted_from_the_last_checkpoint(ray_session, root, monkeypatch, capfd, saved, restarts):
    """With `max_restarts: 1` fits fail after saving some step; twice from one checkpoint only at the end."""
    import ray.train

    stage_job, attempts = job(root, resources=resources(1, max_restarts=1)), iter(enumerate(saved))
    stage_job.run_folder.mkdir(parents=True)

    def fit(*_):
        number, step = next(attempts)
        if step == "end":
            return True
        if step:
            (stage_job.run_folder / "latest").write_text(f"step-{step}")
        raise ray.train.TrainingFailedError(f"workers died:\nfailure {number}")

    monkeypatch.setattr(launch, "_fit_once", fit)
    if saved[-1] == "end":
        launch.launch(stage_job)
    else:
        with pytest.raises(ray.train.TrainingFailedError, match=f"failure {len(saved) - 1}"):
            launch.launch(stage_job)
    assert next(attempts, None) is None
    begins = [f"step-{step}" if step else "the beginning" for step in saved[:restarts]]
    lines = [f"{stage_job.key}: workers failed (failure {n}); starting again from {b}\n" for n, b in enumerate(begins)]
    assert capfd.readouterr().out == "".join(lines)


@pytest.mark.soak  # the same by the failures of real workers
def test_restarts_of_real_workers_are_counted_from_the_last_checkpoint(ray_session, root, monkeypatch, tmp_path, capfd):
    """With `max_restarts: 1` workers fail three times, and twice from one checkpoint only at the end."""
    import ray.train

    run_folder = job(root).run_folder

    def stage(rank, attempt):
        run_folder.mkdir(parents=True, exist_ok=True)
        (run_folder / "latest").write_text(f"step-{min(attempt, 1)}")
        raise RuntimeError(f"failure {attempt}")

    (tmp_path / "attempts").mkdir()
    instead_of_training(monkeypatch, tmp_path / "attempts", stage)
    with pytest.raises(ray.train.TrainingFailedError, match="failure 2"):
        launch.launch(job(root, resources=resources(1, max_restarts=1)))
    assert started(tmp_path / "attempts") == {"0": 3}
    out = capfd.readouterr().out
    assert "unifork-s2-pretrain: workers failed (RuntimeError: failure 1); starting again from step-1" in out


def test_a_range_of_workers_takes_what_is_there(ray_session, root, monkeypatch, tmp_path):
    """Two CPUs are there: of one to three workers with one each, two start."""

    def stage(rank, attempt):
        pass

    (tmp_path / "attempts").mkdir()
    instead_of_training(monkeypatch, tmp_path / "attempts", stage)
    launch.launch(job(root, resources=resources((1, 3), cpus=1.0)))
    assert started(tmp_path / "attempts") == {"0": 1, "1": 1}


def test_waiting_is_said(ray_session, root, monkeypatch, tmp_path, capfd):
    import ray

    def words(**what):
        found = room(**what)
        ray.kill(others[0])
        return found

    room = launch.room
    monkeypatch.setattr(launch, "room", words)
    monkeypatch.setattr(launch, "SILENT_SECONDS", 1.0)
    monkeypatch.setattr(launch, "check_room", lambda *_: None)

    @ray.remote(num_cpus=1)
    class Other:
        pass

    others = [Other.remote() for _ in range(2)]
    ray.get([other.__ray_ready__.remote() for other in others])

    def stage(rank, attempt):
        pass

    (tmp_path / "attempts").mkdir()
    instead_of_training(monkeypatch, tmp_path / "attempts", stage)
    launch.launch(job(root, resources=resources(1)))
    line = "unifork-s2-pretrain: waiting for 1 workers with 0.5 CPU each; the cluster has 0 of 2 CPU free"
    assert line in capfd.readouterr().out


@pytest.mark.parametrize("death", ["exit", pytest.param("exception", marks=pytest.mark.soak)])
def test_a_worker_that_is_lost_costs_a_restart(ray_session, root, monkeypatch, tmp_path, capfd, death):
    def stage(rank, attempt):
        import os

        if attempt == 0:
            if death == "exit":
                os._exit(1)
            raise RuntimeError("not the user's fault")

    (tmp_path / "attempts").mkdir()
    instead_of_training(monkeypatch, tmp_path / "attempts", stage)
    launch.launch(job(root, resources=resources(1)))
    assert started(tmp_path / "attempts") == {"0": 2}
    line = r"^unifork-s2-pretrain: workers failed \(.+\); starting again from the beginning$"
    assert len(re.findall(line, capfd.readouterr().out, re.MULTILINE)) == 1


@pytest.mark.soak  # as the last two failures of the test of restarts from a checkpoint
def test_what_is_no_mistake_of_the_user_is_raised_by_ray_after_the_last_restart(
    ray_session, root, monkeypatch, tmp_path
):
    import ray.train

    def stage(rank, attempt):
        raise RuntimeError("not the user's fault")

    (tmp_path / "attempts").mkdir()
    instead_of_training(monkeypatch, tmp_path / "attempts", stage)
    with pytest.raises(ray.train.TrainingFailedError, match="not the user's fault"):
        launch.launch(job(root, resources=resources(1, max_restarts=1)))
    assert started(tmp_path / "attempts") == {"0": 2}


def test_what_the_machine_does_not_have_is_said_at_once(ray_session, root, monkeypatch):
    with pytest.raises(ConfigError, match=r"local\.yaml: 5 workers with 0\.5 CPU each .*Ray has 2 CPU"):
        launch.launch(job(root, resources=resources(5)))
    with pytest.raises(ConfigError, match=r"3 workers with 1 GPU each .*Ray has 2 GPU"):
        launch.launch(job(root, resources=resources(3, gpus=1.0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"local\.yaml: .* asks for a GPU, but there is none"):
        launch.launch(job(root, resources=resources(0, gpus=1.0)))

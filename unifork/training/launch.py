"""Ray Train as launcher: placement, process groups and restarts. Checkpoints are not its business.

With zero workers the stage runs in this process, without Ray; otherwise on worker processes, each
with what the cluster file asks for. A worker that is lost or raises is started again, as often as
`max_restarts` says. A UniForkError is nobody's loss and would come again, so it is no error to Ray: the
worker leaves it in a file and returns, the others see the file and return too, wherever they wait for
each other, and whoever launched the stage raises it.
"""

# ruff: noqa: PLC0415  Ray is slow to import, and small stages do without

import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unifork import errors
from unifork.cluster import check_room
from unifork.config import TrainResources, cluster_file
from unifork.errors import ConfigError, UniForkError
from unifork.shards.manifest import write_json
from unifork.training.history import LOG
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

if TYPE_CHECKING:
    from ray.train import ScalingConfig


POLL_SECONDS = 0.5


def launch(job: StageJob) -> None:
    """Run a stage where its resources say.

    Raises ConfigError for resources that this machine does not have, the UniForkError that ended a worker, and Ray's
    own error where workers were lost or failed more often than `max_restarts`.
    """
    with _shown(job.run_folder / LOG):
        if job.resources.workers:
            _fit(job)
        elif job.resources.gpus and not torch.cuda.is_available():
            raise ConfigError(f"{cluster_file()}: {job.key} asks for a GPU, but there is none on this machine")
        else:
            train_stage(job, WorkerContext(rank=0, workers=1, device="cuda" if job.resources.gpus else "cpu"))


def scaling(resources: TrainResources) -> "ScalingConfig":
    """What Ray Train is asked for."""
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker={"CPU": resources.cpus, "GPU": resources.gpus},
    )


def _fit(job: StageJob) -> None:
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    check_room(job.resources.workers, job.resources.cpus, job.resources.gpus, cluster_file())
    for name in ("ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mistake = _mistake(job)
    mistake.unlink(missing_ok=True)
    trainer = TorchTrainer(
        _worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=scaling(job.resources),
        torch_config=TorchConfig(backend="nccl" if job.resources.gpus else "gloo"),
        run_config=RunConfig(
            name=f"{job.key}-{job.fingerprint()}",
            storage_path=str(job.layout.ray_train),
            failure_config=FailureConfig(max_failures=job.resources.max_restarts),
        ),
    )
    try:
        trainer.fit()
    finally:  # a mistake stands before what Ray says of workers that it took down with it
        if mistake.exists():
            found = json.loads(mistake.read_text())
            raise getattr(errors, found["error"], UniForkError)(found["message"])


def _mistake(job: StageJob) -> Path:
    """Where a worker leaves the UniForkError that ended it."""
    return job.layout.ray_train / f"{job.key}.mistake.json"


def _worker(config: dict[str, Any]) -> None:
    """Train until the stage ends or any worker leaves a mistake; the training of the others is then left waiting."""
    import ray.train
    import ray.train.torch

    job, context = StageJob.model_validate(config), ray.train.get_context()
    run = WorkerContext(
        rank=context.get_world_rank(),
        workers=job.resources.workers,
        device=str(ray.train.torch.get_device()) if job.resources.gpus else "cpu",
        report=ray.train.report,
    )
    mistake, work = _mistake(job), Future[None]()

    def train() -> None:
        try:
            if job.resources.gpus:
                torch.cuda.set_device(run.device)  # of this thread; Ray has set that of the other
            train_stage(job, run)
            work.set_result(None)
        except BaseException as error:
            work.set_exception(error)

    threading.Thread(target=train, daemon=True).start()
    while not (mistake.exists() or wait([work], timeout=POLL_SECONDS).done):
        pass
    if work.done():
        try:
            work.result()
        except UniForkError as error:
            write_json(mistake, {"error": type(error).__name__, "message": str(error)})


@contextmanager
def _shown(path: Path) -> Iterator[None]:
    """Print the lines that are added to a file while the block runs, wherever they are written."""
    offset = path.stat().st_size if path.exists() else 0
    done = threading.Event()

    def follow() -> None:
        nonlocal offset
        while True:
            last = done.wait(0.5)
            if path.exists():
                offset = 0 if path.stat().st_size < offset else offset  # moved aside, begun again
                with open(path) as handle:
                    handle.seek(offset)
                    print(handle.read(), end="", flush=True)
                    offset = handle.tell()
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

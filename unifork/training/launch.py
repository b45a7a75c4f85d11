"""Ray Train as launcher: placement, process groups and restarts. Checkpoints are not its business.

With zero workers the stage runs in this process, without Ray; otherwise on worker processes, each
with what the cluster file asks for.
"""

# ruff: noqa: PLC0415  Ray is slow to import, and small stages do without

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unifork.config import TrainResources
from unifork.training.history import LOG
from unifork.training.loop import Run
from unifork.training.stage import StageJob, train_stage

if TYPE_CHECKING:
    from ray.train import ScalingConfig


def launch(job: StageJob) -> None:
    """Run a stage where its resources say. Raises what the worker raised."""
    with _shown(job.run_folder / LOG):
        if job.resources.workers:
            _fit(job)
        else:
            train_stage(job, Run(rank=0, workers=1, device="cuda" if job.resources.gpus else "cpu"))


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

    for name in ("ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    TorchTrainer(
        _worker,
        train_loop_config=job.model_dump(mode="json"),
        scaling_config=scaling(job.resources),
        torch_config=TorchConfig(backend="nccl" if job.resources.gpus else "gloo"),
        run_config=RunConfig(
            name=f"{job.key}-{job.fingerprint()}",
            storage_path=str(Path(job.root) / "runs" / ".ray"),
            failure_config=FailureConfig(max_failures=job.resources.max_restarts),
        ),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    job, context = StageJob.model_validate(config), ray.train.get_context()
    run = Run(
        rank=context.get_world_rank(),
        workers=job.resources.workers,
        device=str(ray.train.torch.get_device()) if job.resources.gpus else "cpu",
        report=ray.train.report,
    )
    train_stage(job, run)


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

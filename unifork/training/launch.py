"""Ray Train as launcher: placement, process groups and restarts. Checkpoints are not its business.

With zero workers the stage runs in this process, without Ray; otherwise on worker processes, each
with what the cluster file asks for. Where a worker is lost or raises, all are started again, without limit while
checkpoints come and `max_restarts` times from the same one. A worker says first whether its node shares the storage of
the data. A UniForkError is nobody's loss and would come again, so it is no error to Ray: the
worker leaves it as a message and returns, the others see that and return too, wherever they wait for
each other, and whoever launched the stage raises it. A signal to the program takes the same way to the
workers, and so does the notice that a node of theirs is about to be taken away (drained): they save the step and
return, and the next fit begins on other nodes. Messages are held in memory by an actor: a disk that is full would take
no file.
"""

# ruff: noqa: PLC0415  Ray is slow to import, and small stages do without

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unifork import errors
from unifork.cluster import check_room, check_shared, room, shared_file, this_node
from unifork.config import TrainResources, cluster_file
from unifork.errors import ConfigError, Stopped, UniForkError
from unifork.processes import PRINT
from unifork.shards.progress import PROGRESS, stop_noted, write_progress
from unifork.training.checkpoint import LATEST
from unifork.training.history import LOG
from unifork.training.loggers import find_loggers
from unifork.training.loop import WorkerContext, turns
from unifork.training.requests import Messages, Requests, signals
from unifork.training.stage import StageJob, train_stage

POLL_SECONDS, SILENT_SECONDS = 0.5, 30.0
"""Between looks at workers; and how long nothing may be heard of them before a line says what they wait for."""
LEAVES = signal.SIGUSR1
"""What workers get when one of their nodes is about to be taken away."""


def launch(job: StageJob) -> None:
    """Run a stage where its resources say.

    Raises ConfigError for resources that this machine does not have, the UniForkError that ended a worker, Stopped
    after SIGTERM or SIGINT, and Ray's own error where workers were lost or failed more often than `max_restarts` from
    one checkpoint.
    """
    requests, progress = Requests(), job.run_folder / PROGRESS
    find_loggers(job.resources.loggers)
    write_progress(progress, total=len(turns(job.stage)))
    with stop_noted(progress), _shown(job.run_folder / LOG), signals(requests.receive):
        if job.resources.fewest:
            _fit(job, requests)
        elif job.resources.gpus and not torch.cuda.is_available():
            raise ConfigError(f"{cluster_file()}: {job.key} asks for a GPU, but there is none on this machine")
        else:
            train_stage(job, WorkerContext(device="cuda" if job.resources.gpus else "cpu", requests=requests))


def scaling(resources: TrainResources) -> dict[str, Any]:
    """What Ray Train is asked for: arguments of its ScalingConfig."""
    each = {"CPU": resources.cpus, "GPU": resources.gpus}
    return {"num_workers": resources.workers, "use_gpu": resources.gpus > 0, "resources_per_worker": each}


def _fit(job: StageJob, requests: Requests) -> None:
    """Fits of Ray Train until one ends, each from the last checkpoint, as long as those come."""
    import ray
    from ray.train import TrainingFailedError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    check_room(job.resources.fewest, job.resources.cpus, job.resources.gpus, cluster_file())
    for name in ("ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if job.resources.gpus:  # read where a trainer begins
        os.environ["RAY_TRAIN_ENABLE_NCCL_HANG_DETECTOR"] = "1"
        os.environ["RAY_TRAIN_NCCL_RAS_ACTION"] = "fail"
        os.environ["RAY_TRAIN_NCCL_RAS_CONFIRM_DURATION_S"] = str(job.resources.collective_timeout_seconds)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor: Any = ray.remote(num_cpus=0)(Messages)
    messages = actor.options(name=_messages_name(job), scheduling_strategy=here).remote()
    requests.deferred = True
    saved, failures = "", 0
    try:
        with shared_file(job.layout.ray_train) as shared:
            while True:
                try:
                    if _fit_once(job, requests, messages, shared):
                        return
                    PRINT(f"{job.key}: a node is about to be taken away; going on elsewhere from {_saved(job)}")
                except TrainingFailedError as error:
                    before, saved = saved, _saved(job)
                    failures = failures + 1 if saved == before else 1
                    if failures > job.resources.max_restarts:
                        raise
                    reason = str(error).strip().splitlines()[-1]
                    PRINT(f"{job.key}: workers failed ({reason}); starting again from {saved}")
    finally:
        ray.kill(messages)


def _saved(job: StageJob) -> str:
    """The name of the last checkpoint."""
    pointer = job.run_folder / LATEST
    return pointer.read_text().strip() if pointer.exists() else "the beginning"


def _fit_once(job: StageJob, requests: Requests, messages: Any, shared: str) -> bool:
    """Whether training ended; otherwise everything is saved, and a node is about to be taken away."""
    import ray
    from ray._private.state import state  # which Ray Train asks, too: there is no public way to hear of it
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    backend = "nccl" if job.resources.gpus else "gloo"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job.model_dump(mode="json"), "shared": shared},
        scaling_config=ScalingConfig(**scaling(job.resources)),
        torch_config=TorchConfig(backend=backend, timeout_s=job.resources.collective_timeout_seconds),
        run_config=RunConfig(name=f"{job.key}-{job.fingerprint()}", storage_path=str(job.layout.ray_train)),
    )
    ray.get(messages.begin.remote())
    fit, announced = _in_thread(trainer.fit), 0  # in the main thread Ray would take SIGINT for itself
    look_at = time.monotonic() + SILENT_SECONDS
    while not wait([fit], timeout=POLL_SECONDS).done:
        if not announced:
            announced = requests.signal
            leaving = [*state.get_draining_nodes()]
            if not announced and leaving and ray.get(messages.among.remote(leaving)):
                announced = LEAVES
            if announced:
                ray.get(messages.announce.remote(announced))
        if time.monotonic() >= look_at:
            look_at += SILENT_SECONDS
            if ray.get(messages.silence.remote()) >= SILENT_SECONDS:
                PRINT(f"{job.key}: waiting for {room(**scaling(job.resources))}")
    end, _ = ray.get(messages.read.remote())
    if end:  # before what Ray says of workers that it took down with it
        if end[0] != Stopped.__name__:
            raise getattr(errors, end[0])(end[1])
        if requests.signal or announced != LEAVES:
            raise Stopped(requests.signal or signal.SIGTERM)
    fit.result()
    return not end


def _messages_name(job: StageJob) -> str:
    return f"messages-{job.key}-{job.root}"


def _in_thread(work: Callable[[], object]) -> Future[None]:
    """Begin some work in a thread that nobody waits for at the end of the process."""
    future = Future[None]()

    def call() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def _worker(config: dict[str, Any]) -> None:
    """Train until the stage ends or any worker was ended; the training of the others is then left waiting."""
    import ray
    import ray.train.torch

    job, context = StageJob.model_validate(config["job"]), ray.train.get_context()
    run = WorkerContext(
        rank=context.get_world_rank(),
        workers=context.get_world_size(),
        node_workers=context.get_local_world_size(),
        device=str(ray.train.torch.get_device()) if job.resources.gpus else "cpu",
        report=ray.train.report,
    )
    messages: Any = ray.get_actor(_messages_name(job))

    def train() -> None:
        check_shared(config["shared"])
        if job.resources.gpus:
            torch.cuda.set_device(run.device)  # of this thread; Ray has set that of the other
        train_stage(job, run)

    work = _in_thread(train)
    try:
        while not wait([work], timeout=POLL_SECONDS).done:
            left: tuple[Any, int] = ray.get(messages.read.remote(this_node()))
            end, number = left
            if end:
                return
            if number and not run.requests.signal:
                run.requests.receive(number)
        work.result()
    except (UniForkError, Stopped) as error:
        ray.get(messages.leave.remote(type(error).__name__, str(error)))


@contextmanager
def _shown(path: Path) -> Iterator[None]:
    """Print the lines that are added to a file while the block runs, wherever they are written."""
    offset = path.stat().st_size if path.exists() else 0
    done = threading.Event()

    def follow() -> None:
        nonlocal offset
        last = False
        while not last:
            last = done.wait(0.5)
            if path.exists():
                offset = 0 if path.stat().st_size < offset else offset  # moved aside, begun again
                with open(path) as handle:
                    handle.seek(offset)
                    PRINT(handle.read(), end="")
                    offset = handle.tell()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

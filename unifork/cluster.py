"""Work over shards: in this process, in another, or on the actors of a Ray Data job.

In: jobs over shards and a worker class. Out: finished folders with their manifests.

Ray's defaults depend on the shell, on files in the home directory and on what ran before (token mode, addresses,
object store, threads). Everything is set here, explicitly and before `ray` is imported; nothing is inherited. `ray`
is imported only where it is needed: small data and the unit tests do without.
"""

# ruff: noqa: PLC0415  Ray is imported only by those who need it, after its environment is set

import logging
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any

from unifork.config import Cluster, JobResources, Step, cluster_file, in_job
from unifork.devices import chosen_device
from unifork.errors import ConfigError, IdentityError, MachineError, UniForkError, writing
from unifork.layout import Layout
from unifork.processes import die_with_parent
from unifork.shards.job import ShardJob
from unifork.shards.manifest import Manifest
from unifork.shards.progress import places, stop_noted
from unifork.shards.task import ShardResult, ShardTask, joined

Worker = Callable[[ShardTask], ShardResult]
Results = Generator[ShardResult, None, None]

WORKER_RESTARTS = 3
"""How often a worker process that dies is replaced; Ray Data's default, forever, loops on a poisonous shard."""
MOST_BLOCKS = 5000
"""Ray Data's driver spends about 13 ms and 10 kB on each block: beyond this many tasks some share one."""
ENDS_THE_JOB = (ConfigError, IdentityError, MachineError)
"""Errors that every other shard would meet as well; any other costs the shard that meets it."""


# ------------------------------------------------------------------------------------ Ray, locally


def set_ray_environment() -> None:
    """Set what Ray reads from the environment. To be called before `ray` is imported: parts are read only once.

    Token mode is off for a Ray that lives and dies with this program: left to itself, `ray.init` writes a token file
    that changes what a later `ray start` on this machine does. A job keeps the mode of its cluster.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"] = "1"  # the default, 32, takes half a minute on two cores
    os.environ["RAY_DATA_LOG_LEVEL"] = "CRITICAL"  # errors are raised, and told once
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.5"  # the default, 2, makes start and end of a fit 10 s longer
    if not in_job():
        os.environ["RAY_AUTH_MODE"] = "disabled"


@contextmanager
def local_ray(cluster: Cluster, *, needed: bool = True) -> Iterator[None]:
    """A running Ray inside the block: the job's cluster in a submitted job, otherwise one of its own.

    An already initialized Ray is used and left running. With `needed=False` nothing is started, so that a
    program can say `needed=resources.workers > 0`.
    """
    if not needed:
        yield
        return
    set_ray_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    own: dict[str, Any] = {
        "address": "local",  # never one that happens to run on this machine
        "num_cpus": cluster.cpus,
        "num_gpus": cluster.gpus,
        "object_store_memory": cluster.object_store_mb * 1024**2,
        "include_dashboard": False,
    }
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **({} if in_job() else own))  # RAY_ADDRESS in a job
    try:
        yield
    finally:
        ray.shutdown()


def room(num_workers: int | tuple[int, int], resources_per_worker: dict[str, float], **_: object) -> str:
    """What workers ask for and what there is, in words. To be called while Ray runs."""
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()  # type: ignore[no-untyped-call]
    each = {name: count for name, count in resources_per_worker.items() if count}
    needs = " and ".join(f"{count:g} {name}" for name, count in each.items())
    has = ", ".join(f"{free.get(name, 0):g} of {there.get(name, 0):g} {name} free" for name in each)
    workers = num_workers if isinstance(num_workers, int) else " to ".join(map(str, num_workers))
    return f"{workers} workers with {needs} each; the cluster has {has}"


def check_room(workers: int, cpus: float, gpus: float, place: str) -> None:
    """Refuse what a local Ray can never give; Ray would wait for it forever. A cluster may still grow: one line.

    place: the cluster file. Raises ConfigError naming it. To be called while Ray runs.
    """
    import ray

    have, asks = ray.cluster_resources(), {"CPU": cpus, "GPU": gpus}  # type: ignore[no-untyped-call]
    for name, each in asks.items():
        if workers * each > have.get(name, 0):
            if in_job():
                print(f"{place}: waiting for {room(workers, asks)}", flush=True)
                return
            raise ConfigError(
                f"{place}: {workers} workers with {each:g} {name} each asked for, but this machine's Ray has "
                f"{have.get(name, 0):g} {name}"
            )


@contextmanager
def shared_file(folder: Path) -> Iterator[str]:
    """The path of a new file while the block runs, by which other nodes show that they share this folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.NamedTemporaryFile(dir=folder, prefix=".shared-")  # noqa: SIM115  closed below
    with file:
        yield os.path.abspath(file.name)


def check_shared(path: str, patience_seconds: float = 5.0) -> None:
    """Raise ConfigError, which names this node, where a file of `shared_file` is not seen."""
    import ray

    deadline = time.monotonic() + patience_seconds  # a network file system may be late
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            raise ConfigError(
                f"node {socket.gethostname()} ({address}) does not see {path}, which was just written "
                f"elsewhere: mount the storage of the experiment there, or take the node away"
            )
        time.sleep(0.2)


def living_nodes() -> list[dict[str, Any]]:
    """Ray's own words for its nodes: `NodeID`, `Resources`, and others. To be called while Ray runs."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def this_node() -> str:
    """The `NodeID` of the node where this is called, in a task or actor."""
    import ray

    return str(ray.get_runtime_context().get_node_id())


def on_every_node(
    look: Callable[..., Any], *arguments: object, gpus: int = 0, seconds: float = 120.0
) -> list[tuple[str, float, Any]]:
    """Call a function on every living node at once: name and address, number of GPUs, what it returned or the error.

    gpus: of each call; nodes with fewer are left out. To be called while Ray runs; TimeoutError where none answers.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(look)
    nodes = [node for node in living_nodes() if node["Resources"].get("GPU", 0) >= gpus]
    on = partial(NodeAffinitySchedulingStrategy, soft=False)
    calls = [task.options(scheduling_strategy=on(node["NodeID"])).remote(*arguments) for node in nodes]
    ray.wait(calls, num_returns=len(calls), timeout=seconds)
    found = []
    for node, call in zip(nodes, calls, strict=True):
        try:
            answer = ray.get(call, timeout=0.1)
        except (ray.exceptions.RayError, TimeoutError) as error:
            answer = error
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        found.append((name, node["Resources"].get("GPU", 0.0), answer))
    return found


# ------------------------------------------------------------------------------------- shards


def run_jobs(
    jobs: Sequence[ShardJob],
    worker_class: Callable[..., Worker],
    *arguments: object,
    cluster: Cluster | None = None,
    step: Step | None = None,
) -> list[Manifest]:
    """Make every missing shard of some jobs with one set of workers, and print their progress.

    cluster: where, with the workers that it gives to `step`; None: in this process, shards beside their manifests.
    Raises DataError where shards could not be made.
    """
    resources = cluster.for_step(step) if cluster and step else JobResources()
    cluster = cluster or Cluster(name="here")
    if resources.gpus and not resources.workers:  # actors are counted where they start
        chosen_device("cuda", f"{cluster_file()}: jobs.{step}.gpus:")
    job_of: dict[str, ShardJob] = {}
    tasks: list[ShardTask] = []
    for job in jobs:
        job.store = Layout().in_store(cluster.store, job.folder) if cluster.store else None
        left = job.missing()
        tasks += left
        job_of |= {task.output: job for task in left}
        print(job, flush=True)
        if left:
            job.noted = next((place for lock, place in places(job.folder) if lock.exists()), None)
            job.note()
    if getattr(worker_class, "BESIDE", False) and len(together := joined(tasks)) >= resources.workers:
        tasks = together
    with (
        stop_noted(*[job.noted for job in jobs if job.noted]),
        local_ray(cluster, needed=resources.workers > 0 and bool(tasks)),  # not started where nothing is left to do
        closing(map_shards(tasks, worker_class, arguments, resources)) as results,
    ):
        for result in results:
            if result.traceback:
                print(f"{result.output}: {result.traceback}", file=sys.stderr, flush=True)
            for each in (result, *result.beside):
                job_of[each.output].add(each)
                print(job_of[each.output], flush=True)
                job_of[each.output].note()
        return [job.finish() for job in jobs]


def map_shards(
    tasks: Sequence[ShardTask],
    worker_class: Callable[..., Worker],
    worker_args: tuple[object, ...],
    resources: JobResources,
) -> Results:
    """Run `worker_class(*worker_args)(task)` once per task; the results as they come, in any order.

    Tasks and results are small (paths, counts, hashes), never images. With `resources.workers == 0` the work is done
    in this process (for a worker class with `OWN_PROCESS` in one that is started for it), otherwise by as many actors
    of a Ray Data job (inside `local_ray`), each of which makes one worker and keeps it. A worker class with
    `TASKS_AT_ONCE` above 1 is called by as many threads where there are tasks enough for all actors. One with `BESIDE`
    makes the shards beside a task, too (`run_jobs` joins tasks where some are left for every worker). What one shard
    meets is its result (`problem`); what all would meet (ENDS_THE_JOB, a worker that cannot be made, one whose process
    keeps dying) ends the work and is raised.
    """
    if not tasks:
        return
    make = partial(worker_class, *worker_args)
    if resources.workers == 0 and getattr(worker_class, "OWN_PROCESS", False):
        yield from _map_in_process(tasks, make)
    elif resources.workers == 0:
        yield from map(partial(outcome, make()), tasks)
    else:
        with shared_file(Layout().ray_train) if in_job() else nullcontext() as shared:
            yield from _map_on_ray(tasks, make, resources, shared)


def outcome(worker: Worker, task: ShardTask) -> ShardResult:
    """The result of a task, or its problem. Raises what ends the job."""
    try:
        return worker(task)
    except ENDS_THE_JOB:
        raise
    except UniForkError as error:
        problem, trace = str(error), None
    except Exception as error:  # a row may raise anything; the other shards are worth finishing
        problem, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    return ShardResult(
        task.output, None, problem, trace, tuple(ShardResult(t.output, None, problem) for t in task.beside)
    )


def _map_in_process(tasks: Sequence[ShardTask], make: partial[Worker]) -> Results:
    """`map_shards` in a process of its own, for workers that change what belongs to all of a process."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, os.getpid(), make), daemon=True)
    process.start()
    there.close()
    try:
        for task in tasks:
            here.send_bytes(pickle.dumps(task))
            result = pickle.loads(here.recv_bytes())
            if isinstance(result, Exception):
                raise result
            yield result
    except (EOFError, ConnectionError):
        process.join()
        raise MachineError(
            f"{task.output}: the process that makes it ended with exit code {process.exitcode} (-9: killed, "
            f"perhaps for want of memory). Finished shards are kept; run the stage again"
        ) from None
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection, parent: int, make: partial[Worker]) -> None:
    """The process of `_map_in_process`; a Ctrl-C is its parent's, with which it dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_start_method("fork", force=True)  # whose pools, of threads here, leave no named semaphores when they are killed
    die_with_parent()
    actor = _Actor(make, os.getcwd())
    while os.getppid() == parent:
        pipe.send_bytes(pickle.dumps(actor.answer(pipe.recv_bytes())))


def _map_on_ray(
    tasks: Sequence[ShardTask], make: partial[Worker], resources: JobResources, shared: str | None
) -> Results:
    import ray
    import ray.data

    workers = min(resources.workers, len(tasks))
    at_once = min(getattr(make.func, "TASKS_AT_ONCE", 1), len(tasks) // workers)
    check_room(workers, resources.cpus, resources.gpus, cluster_file())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # bytes: Arrow would guess types from nested and missing values, differently for every block
    items = [{"index": index, "task": pickle.dumps(task)} for index, task in enumerate(tasks)]
    with warnings.catch_warnings():  # Ray 2.60 warns of the two keys at the end, but has no other way to bound restarts
        warnings.simplefilter("ignore")
        answers = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS)).map_batches(
            _Actor,
            fn_constructor_args=(make, os.getcwd(), shared),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=at_once,
                max_concurrent_calls_per_actor=at_once,
                enable_true_multi_threading=at_once > 1,
            ),
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(max(1, int(resources.cpus)))}},
            max_restarts=WORKER_RESTARTS,
            max_task_retries=WORKER_RESTARTS,
        )
    left = dict(enumerate(tasks))
    rows: Any = iter(answers.iter_batches(batch_size=None, prefetch_batches=0))
    try:
        for batch in rows:
            for index, answer in zip(batch["index"], batch["answer"], strict=True):
                result = pickle.loads(answer)
                if isinstance(result, Exception):
                    raise result
                del left[int(index)]
                yield result
    except ray.exceptions.RayError as error:
        unfinished = ", ".join(Path(task.output).name for task in list(left.values())[:5])
        raise RuntimeError(
            f"a worker died more than {WORKER_RESTARTS} times; {len(left)} shards unfinished: {unfinished}\n{error}"
        ) from None
    finally:
        rows.close()  # ends the job; otherwise its actors live as long as a traceback refers to it
    if left:
        raise RuntimeError(f"{len(tasks)} tasks went in, results of {len(tasks) - len(left)} came out")


class _Actor:
    """One process of the pool: makes the worker at its first task; errors travel as data.

    Ray would wrap errors in pages of its own traceback. The actor works in the driver's folder, so that relative
    paths mean the same in both.
    """

    def __init__(self, make: Callable[[], Worker], folder: str, shared: str | None = None) -> None:
        self.make, self.folder, self.shared = make, folder, shared
        self.worker: Worker | None = None
        self.making = Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"index": batch["index"], "answer": [pickle.dumps(self.answer(task)) for task in batch["task"]]}

    def answer(self, task: bytes) -> ShardResult | Exception:
        """The result of a pickled task, or what ends the job."""
        try:
            with self.making:
                if self.worker is None:
                    if self.shared:
                        check_shared(self.shared)
                    os.chdir(self.folder)
                    self.worker = self.make()
            return outcome(self.worker, pickle.loads(task))
        except UniForkError as error:
            return error
        except Exception as error:
            return RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")

"""Where programs run: in this process, on a Ray of this machine, or as a job on a cluster.

In: a cluster file (`clusters/*.yaml`), and the work: a list of tasks for `map_shards`, a program for `run_stage`.
Out: the results of the tasks; the exit code of the program.

Why one file: Ray's defaults depend on the shell, on files in the home directory and on what ran before (token
mode, addresses, object store, threads). Everything is set here, explicitly and before `ray` is imported; nothing is
inherited. `ray` is imported only where it is needed: small data and the unit tests do without.
"""

# ruff: noqa: PLC0415  Ray is imported only by those who need it, after its environment is set

import asyncio
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

from unifork import errors, jobs
from unifork.config import Cluster, HopResources, TrainResources, load
from unifork.errors import ConfigError, UniForkError
from unifork.processes import die_with_parent

Task = dict[str, Any]
Result = dict[str, Any]
Pairs = Generator[tuple[int, Result], None, None]

WORKER_RESTARTS = 3
"""How often a worker process that dies is replaced; Ray Data's default, forever, loops on a poisonous shard."""


def load_cluster() -> Cluster:
    """The cluster file named by UNIFORK_CLUSTER, else `clusters/local.yaml`."""
    return load(Cluster, jobs.cluster_file())


def in_job() -> bool:
    """Whether this program is the driver of a submitted job (by `submit` or by `ray job submit`)."""
    return jobs.IN_JOB in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the name Ray gives it


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
def local_ray(cluster: Cluster, *, needed: bool = True, worker_output: bool = False) -> Iterator[None]:
    """A running Ray inside the block: the job's cluster in a submitted job, otherwise one of its own.

    An already initialised Ray is used and left running. With `needed=False` nothing is started, so that a
    program can say `needed=resources.workers > 0`. `worker_output` shows what worker processes print.
    """
    if not needed:
        yield
        return
    set_ray_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    options: dict[str, Any] = {"log_to_driver": worker_output, "logging_level": logging.ERROR}
    if in_job():
        ray.init(**options)  # RAY_ADDRESS names the cluster
    else:
        ray.init(
            address="local",  # never one that happens to run on this machine
            num_cpus=cluster.cpus,
            num_gpus=cluster.gpus,
            object_store_memory=cluster.object_store_mb * 1024**2,
            include_dashboard=False,
            **options,
        )
    try:
        yield
    finally:
        ray.shutdown()


# ------------------------------------------------------------------------------------- shards


def map_shards(
    tasks: Sequence[Task],
    worker_class: type[Callable[[Task], Result]],
    worker_args: tuple[Any, ...],
    resources: HopResources,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Run `worker_class(*worker_args)(task)` once per task; the results in the order of the tasks.

    Tasks and results are small JSON-able dictionaries (paths, counts, hashes), never pictures. `on_result` sees
    each result as it comes, in any order. With `resources.workers == 0` the work is done in this process, otherwise
    by as many actors of a Ray Data job (inside `local_ray`), each of which makes one worker and keeps it. A worker
    class with `TASKS_AT_ONCE` above 1 is called by as many threads where there are tasks enough for all actors.
    The first error of a worker ends the job and is raised here: a UniForkError as itself, any other as a
    RuntimeError with the worker's traceback.
    """
    if not tasks:
        return []
    if resources.workers == 0:
        stream = _map_here(tasks, worker_class, worker_args)
    else:
        stream = _map_on_ray(tasks, worker_class, worker_args, resources)
    results: dict[int, Result] = {}
    with closing(stream) as pairs:
        for index, result in pairs:
            results[index] = result
            if on_result is not None:
                on_result(result)
    if sorted(results) != list(range(len(tasks))):
        raise RuntimeError(f"{len(tasks)} tasks went in, results of {len(results)} came out")
    return [results[index] for index in range(len(tasks))]


def _map_here(tasks: Sequence[Task], worker_class: type[Any], worker_args: tuple[Any, ...]) -> Pairs:
    worker = worker_class(*worker_args)
    for index, task in enumerate(tasks):
        yield index, json.loads(json.dumps(worker(task)))  # the same types as from an actor


def _map_on_ray(
    tasks: Sequence[Task], worker_class: type[Any], worker_args: tuple[Any, ...], resources: HopResources
) -> Pairs:
    import ray
    import ray.data

    workers = min(resources.workers, len(tasks))
    at_once = min(getattr(worker_class, "TASKS_AT_ONCE", 1), len(tasks) // workers)
    check_room(ray.cluster_resources(), workers, resources)  # type: ignore[no-untyped-call]
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # JSON strings: Arrow would guess types from nested and missing values, differently for every block
    items = [{"index": index, "task": json.dumps(task)} for index, task in enumerate(tasks)]
    with warnings.catch_warnings():  # Ray 2.60 warns of the two keys at the end, but has no other way to bound restarts
        warnings.simplefilter("ignore")
        answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(worker_class, worker_args, os.getcwd()),
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
                yield int(index), _result(json.loads(answer), left.pop(int(index)))
    except ray.exceptions.RayError as error:
        unfinished = f"{list(left.values())!r:.300}"
        raise RuntimeError(
            f"a worker died more than {WORKER_RESTARTS} times; unfinished: {unfinished}\n{error}"
        ) from None
    finally:
        rows.close()  # ends the job; otherwise its actors live as long as a traceback refers to it


def check_room(have: dict[str, float], workers: int, resources: HopResources | TrainResources) -> None:
    """Refuse what a local Ray can never give; Ray would wait for it forever. A cluster may still grow."""
    for name, each in (("CPU", resources.cpus), ("GPU", resources.gpus)):
        if not in_job() and workers * each > have.get(name, 0):
            raise ConfigError(
                f"{jobs.cluster_file()}: {workers} workers with {each:g} {name} each "
                f"asked for, but this Ray has {have.get(name, 0):g} {name}"
            )


class _Actor:
    """One process of the pool: makes the worker at its first task and answers in JSON, errors included.

    Errors travel as data: Ray would wrap them in pages of its own traceback. The actor works in the driver's
    folder, so that relative paths mean the same in both.
    """

    def __init__(self, worker_class: type[Any], worker_args: tuple[Any, ...], folder: str) -> None:
        self.worker_class, self.worker_args, self.folder = worker_class, worker_args, folder
        self.worker: Any = None
        self.making = Lock()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"index": batch["index"], "answer": [self._answer(task) for task in batch["task"]]}

    def _answer(self, task: str) -> str:
        try:
            with self.making:
                if self.worker is None:
                    os.chdir(self.folder)
                    self.worker = self.worker_class(*self.worker_args)
            return json.dumps({"result": self.worker(json.loads(task))})
        except UniForkError as error:
            return json.dumps({"error": type(error).__name__, "message": str(error)})
        except Exception:  # all of them travel to the driver and are raised there
            return json.dumps({"error": None, "message": traceback.format_exc()})


def _result(answer: dict[str, Any], task: Task) -> Result:
    """The result in an actor's answer, or its error, raised."""
    if "result" in answer:
        result: Result = answer["result"]
        return result
    if answer["error"]:
        raise getattr(errors, answer["error"], UniForkError)(answer["message"])
    message: str = answer["message"]
    raise RuntimeError(f"{message.splitlines()[-1]}\nin the worker of task {task!r:.300}\n{message}")


# ------------------------------------------------------------------------------- jobs on a cluster


def submit(cluster: Cluster, module: str, argv: Sequence[str], outputs: Sequence[Path] = ()) -> int:
    """Run `python -m module argv` as a job on the cluster, print its log, return the driver's own exit code.

    The code is shipped: the packages `unifork` and that of the module, frozen as they are now. Everything else
    (params, cards, data, outputs) is read and written in the current folder, which the cluster must see too, at
    `cluster.root` if not at the same path. SIGTERM and SIGINT stop the job and return 143 and 130.
    """
    address = str(cluster.address).rstrip("/")
    headers = jobs.knock(cluster, address)
    # the client prefers an address from the environment to the one it is given
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_MODE"] = "token" if headers else "disabled"
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    client = JobSubmissionClient(address, headers=headers)
    code = asyncio.run(jobs.run_job(client, cluster, module, argv))
    if code == 0:
        jobs.wait_for_outputs(outputs, cluster)
    return code


# ----------------------------------------------------------------------------------- programs


def run_stage(main: Callable[[], None], module: str, argv: Sequence[str], outputs: Sequence[Path] = ()) -> None:
    """Run a pipeline stage where the cluster file says: `main()` here, or `python -m module argv` as a job.

    Always ends the program: 0, 2 after a UniForkError (one line, no traceback), 1 with traceback after any
    other exception, or the exit code of the job. `outputs` are looked for after a job.
    """
    try:
        sys.exit(_run_stage(main, module, argv, outputs))
    except UniForkError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _run_stage(main: Callable[[], None], module: str, argv: Sequence[str], outputs: Sequence[Path]) -> int:
    if in_job():
        die_with_parent()  # Ray stops drivers itself, but a head node that dies would leave them behind
        try:
            os.chdir(os.environ.get(jobs.ROOT) or ".")
        except OSError as error:
            raise ConfigError(f"{jobs.ROOT}: {error}; the cluster must share the storage of the data") from None
        main()
        return 0
    cluster = load_cluster()
    if cluster.address:
        die_with_parent(signal.SIGTERM)  # which stops the job
        return submit(cluster, module, argv, outputs)
    die_with_parent()
    main()
    return 0

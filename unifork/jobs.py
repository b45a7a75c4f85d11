"""A pipeline program: run here, or as a job on a Ray cluster whose log is followed and whose exit code is its own.

In: the program's `main` and the cluster file. Out: an exit code: 0; 2 after a user's mistake, which is one line; 143 or
130 where training was ended by SIGTERM or SIGINT; 1 with a traceback after any other exception; that of the job, which
`ray job submit` does not pass on (it exits 1 always).
"""

# ruff: noqa: PLC0415  Ray is imported only by those who submit, after its environment is set

import argparse
import asyncio
import logging
import os
import shlex
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unifork.config import (
    CLUSTER,
    IN_JOB,
    ROOT,
    Cluster,
    JobResources,
    Step,
    TrainResources,
    cluster_file,
    in_job,
    load_cluster,
    load_experiment,
)
from unifork.devices import chosen_device
from unifork.errors import FULL, ConfigError, Stopped, UniForkError, one_of, writing
from unifork.processes import die_with_parent, exclusive

SILENT_SECONDS = 30.0
"""How long a job's log may be silent before its server must answer."""


def program(output: Callable[[str], Path], main: Callable[[str], None], what: str | None = None) -> None:
    """Run `main(name)` of the running module where the cluster file says, alone in its output folder. Ends the program.

    what: what the one argument of the program names; None for a program without arguments. Nothing but the cluster
    file is read before the program stands in the root of its experiment, or `params.yaml` to submit a training stage.
    """
    module: str = main.__globals__["__spec__"].name
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=main.__globals__["__doc__"])
    if what:
        parser.add_argument("name", help=what)
    name: str = getattr(parser.parse_args(), "name", "")

    def alone() -> None:
        with exclusive(output(name)), writing(output(name), FULL):
            main(name)

    run_stage(alone, module, [name] if what else [], [output(name)])


def run_stage(main: Callable[[], None], module: str, argv: Sequence[str], outputs: Sequence[Path] = ()) -> None:
    """Run a stage where the cluster file says: `main()` here, or `python -m module argv` as a job. Ends the program.

    `outputs` are looked for after a job.
    """
    code = 0
    try:
        if in_job():
            die_with_parent()  # Ray stops drivers itself, but a head node that dies would leave them behind
            _enter(os.environ.get(ROOT) or ".")
            main()
        elif (cluster := load_cluster()).address:
            die_with_parent(signal.SIGTERM)  # which stops the job
            code = asyncio.run(run_job(connect(cluster), cluster, module, argv))
            wait_for_outputs(outputs if code == 0 else (), cluster)
        else:
            die_with_parent()
            main()
    except UniForkError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except Stopped as stopped:
        print(f"stopped by {stopped}", file=sys.stderr, flush=True)
        code = 128 + stopped.number
    sys.exit(code)


def own_device(step: Step) -> str:
    """Where a step of `jobs` without workers computes, by the cluster file. Raises ConfigError for a GPU not here."""
    return str(chosen_device(load_cluster().device(step), f"{cluster_file()}: jobs.{step}.gpus:"))


def _enter(root: str) -> None:
    try:
        os.chdir(root)
    except OSError as error:
        raise ConfigError(f"{ROOT}: {error}; the cluster must share the storage of the data") from None


def connect(cluster: Cluster) -> Any:
    """Ray's client of the cluster's job server, with the token that Ray finds. UniForkError when it refuses or is dead.

    Left to itself the client goes by the environment: by an address there, and by a mode in which no token is sent.
    """
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import requests
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    headers = AuthenticationTokenLoader.instance().get_token_for_http_header(ignore_auth_mode=True)
    logging.getLogger("ray").setLevel(logging.WARNING)
    place = f"cluster {cluster.name!r} ({cluster.address})"
    try:
        client = JobSubmissionClient(str(cluster.address), headers=headers)
        if not (cluster.allow_unprotected or is_loopback(urlsplit(str(cluster.address)).hostname or "")):
            _check_protected(str(cluster.address), place)
        return client
    except AuthenticationError as error:
        raise ConfigError(
            f"{place}: {str(error).splitlines()[0]}: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or copy the cluster's "
            f"~/.ray/auth_token here; `ray get-auth-token` there prints it"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, requests.RequestException) as error:
        raise UniForkError(
            f"{place}: no Ray job server answers: {error}. Is the cluster up, with `ray[default]`?"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its very name or address."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # another name
        return False


def _check_protected(address: str, place: str) -> None:
    """Raise ConfigError where a job server lists its jobs to somebody without a token."""
    import requests

    if requests.get(f"{address.rstrip('/')}/api/jobs/", timeout=30, allow_redirects=False).status_code == 200:
        raise ConfigError(
            f"{place}: demands no token, so whoever reaches it runs programs there: start Ray with "
            f"RAY_AUTH_MODE=token, or reach it through a tunnel as http://localhost:PORT, or say "
            f"`allow_unprotected: true` in {cluster_file()}"
        )


async def run_job(client: Any, cluster: Cluster, module: str, argv: Sequence[str]) -> int:
    """Submit, follow, and stop on a signal. Signals wait while the job is being submitted: then it has a name."""
    loop, this, received = asyncio.get_running_loop(), asyncio.current_task(), []

    def on_signal(number: int) -> None:
        received.append(number)
        if this is not None:
            this.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    job = _start_job(client, cluster, module, argv)
    print(f"job {job} on cluster {cluster.name!r}: {module}", flush=True)
    try:
        info = await follow(client, job)
    except asyncio.CancelledError:
        _stop(client, job)
        return 128 + int(received[0])
    if info.status == "SUCCEEDED":
        return 0
    reason = info.message.partition(", last available logs")[0]  # they were printed already
    print(f"job {job} {info.status}: {reason}", file=sys.stderr, flush=True)
    code: int = info.driver_exit_code or 1
    return code if code > 0 else 128 - code


def _start_job(client: Any, cluster: Cluster, module: str, argv: Sequence[str]) -> str:
    """Ship the code, frozen as it is now, and start the program; the name of the job.

    Everything else (params, cards, data, outputs) is read and written in the current folder, which the cluster must
    see too, at `cluster.root` if not at the same path.
    """
    environment = {
        IN_JOB: "1",
        ROOT: cluster.root or os.getcwd(),
        CLUSTER: os.path.relpath(cluster_file()),
        **cluster.runtime_env.get("env_vars", {}),
    }
    packages = [import_module(name).__path__[0] for name in sorted({"unifork", module.partition(".")[0]})]
    name = module.rpartition(".")[2]
    step = _resources(cluster, name, argv)
    own = step if step and not step.workers else cluster.driver  # without workers the program itself computes
    job: str = client.submit_job(
        entrypoint_num_cpus=own.cpus,
        entrypoint_num_gpus=own.gpus,
        entrypoint=shlex.join([cluster.python or sys.executable, "-m", module, *argv]),
        submission_id=f"{name}-{uuid.uuid4().hex[:8]}",
        runtime_env={
            "excludes": ["__pycache__"],
            **cluster.runtime_env,
            "py_modules": [*packages, *cluster.runtime_env.get("py_modules", ())],
            "env_vars": environment,
        },
    )
    return job


def _resources(cluster: Cluster, program: str, argv: Sequence[str]) -> JobResources | TrainResources | None:
    """What the cluster file gives to a program, if it names it."""
    if program == "train":
        one_of("run", argv[0], runs := load_experiment().runs, "params.yaml: runs")
        return cluster.for_stage(runs[argv[0]].stage)
    step = "answer" if program == "examine" else program
    return next((resources for name, resources in cluster.jobs.items() if name == step), None)


async def follow(client: Any, job: str, patience_seconds: float = 120.0) -> Any:
    """Print the job's log until it ends; what the server says about it then.

    The log is one websocket. When that breaks, it is read again and what was printed is skipped.
    """
    import aiohttp

    printed, broken_since = 0, None
    while True:
        try:
            skip = printed
            async for text in _log(client, job):
                print(text[skip:], end="", flush=True)
                printed += len(text[skip:])
                skip = max(0, skip - len(text))
                broken_since = None
            info = client.get_job_info(job)
            broken_since = None
            if info.status.is_terminal():
                return info
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            broken_since = broken_since or time.monotonic()
            if time.monotonic() - broken_since > patience_seconds:
                raise UniForkError(
                    f"the job server went away ({error}). Job {job} may still run there: `ray job status {job}`"
                ) from None
        await asyncio.sleep(1)


async def _log(client: Any, job: str) -> AsyncIterator[str]:
    """The job's log as it comes; where nothing comes, the server must answer: a lost machine closes no connection."""
    log = client.tail_job_logs(job)
    while True:
        text = asyncio.ensure_future(anext(log, None))
        try:
            while not (await asyncio.wait([text], timeout=SILENT_SECONDS))[0]:
                client.get_job_info(job)
        finally:
            text.cancel()
        if (found := text.result()) is None:
            return
        yield found


def _stop(client: Any, job: str, patience_seconds: float = 300.0) -> None:
    """Stop a job and wait until it is."""
    print(f"stopping job {job}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + patience_seconds
    try:
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.5)
    except (OSError, RuntimeError) as error:
        print(f"job {job} may still run: {error}", file=sys.stderr, flush=True)


def wait_for_outputs(outputs: Sequence[Path], cluster: Cluster, patience_seconds: float = 30.0) -> None:
    """Check that a job's outputs are seen here; network file systems may show them some seconds late."""
    deadline = time.monotonic() + patience_seconds
    while missing := [str(path) for path in outputs if not path.exists()]:
        if time.monotonic() > deadline:
            raise UniForkError(
                f"cluster {cluster.name!r}: the job succeeded, but {', '.join(missing)} cannot be seen here: "
                f"does the cluster share {os.getcwd()!r}, as {cluster.root or os.getcwd()!r}?"
            )
        time.sleep(1)

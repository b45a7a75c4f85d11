"""One program as a job on a Ray cluster: ask the server in, send the code, follow the log, stop, check the outputs.

In: the cluster's configuration and Ray's job client, made by `unifork.cluster.submit`; this file imports no Ray.
Out: the exit code of the program itself, which `ray job submit` does not pass on (it exits 1 for every failure).
"""

import asyncio
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unifork.config import Cluster
from unifork.errors import ConfigError, UniForkError

CLUSTER = "UNIFORK_CLUSTER"
"""Environment: path of the cluster file."""
IN_JOB = "UNIFORK_IN_JOB"
"""Environment: set in jobs that `unifork.cluster.submit` started."""
ROOT = "UNIFORK_ROOT"
"""Environment: the folder that holds the data, on storage that the cluster shares; programs work in it."""


def cluster_file() -> str:
    """Path of the cluster file in use."""
    return os.environ.get(CLUSTER) or "clusters/local.yaml"


def knock(cluster: Cluster, address: str) -> dict[str, str]:
    """The headers that the job server wants, none or a token; UniForkError when it is dead or refuses.

    The server says itself whether it wants a token; Ray's client would go by the environment and fail.
    """
    place = f"cluster {cluster.name!r} ({address})"
    status = _status(address, {}, place)
    if status == 200:
        return {}
    token = _token()
    if token is None:
        raise ConfigError(
            f"{place}: the job server wants a token and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, "
            "or copy the cluster's ~/.ray/auth_token here"
        )
    headers = {"Authorization": f"Bearer {token}"}
    if _status(address, headers, place) != 200:
        raise ConfigError(f"{place}: the job server refuses the token; `ray get-auth-token` there prints the right one")
    return headers


def _status(address: str, headers: dict[str, str], place: str) -> int:
    """HTTP status of the job server's version page: 200, 401 or 403."""
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=headers)
        with urllib.request.urlopen(request, timeout=20) as page:
            if "ray_version" in json.load(page):
                return 200
            reason = "the server there is not Ray's"
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return error.code
        reason = f"HTTP {error.code}"
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
    raise UniForkError(f"{place}: no Ray job server answers: {reason}. Is the cluster up, with `ray[default]`?")


def _token() -> str | None:
    """The token, from where Ray looks for it and in the same order."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.is_file() else None


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
    """Ship the code and start the program; the name of the job."""
    environment = {
        IN_JOB: "1",
        ROOT: cluster.root or os.getcwd(),
        CLUSTER: os.path.relpath(cluster_file()),
        **cluster.runtime_env.get("env_vars", {}),
    }
    with tempfile.TemporaryDirectory(prefix="unifork-job-") as folder:
        for package in {"unifork", module.partition(".")[0]}:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                raise ConfigError(f"{module}: {package!r} is no package that could be sent to the cluster")
            source = next(iter(spec.submodule_search_locations))
            shutil.copytree(source, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        job: str = client.submit_job(
            entrypoint=shlex.join([cluster.python or sys.executable, "-m", module, *argv]),
            submission_id=f"{module.rpartition('.')[2]}-{uuid.uuid4().hex[:8]}",
            runtime_env={"working_dir": folder, **cluster.runtime_env, "env_vars": environment},
        )
    return job


async def follow(client: Any, job: str, patience_seconds: float = 120.0) -> Any:
    """Print the job's log until it ends; what the server says about it then.

    The log is one websocket. When that breaks, it is read again and what was printed is skipped.
    """
    import aiohttp  # noqa: PLC0415  slow to import, and like the job client a part of ray[default]

    printed, broken_since = 0, None
    while True:
        try:
            skip = printed
            async for text in client.tail_job_logs(job):
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


def _stop(client: Any, job: str, patience_seconds: float = 30.0) -> None:
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

"""`clusters/*.yaml`: where things run. Never a parameter of DVC, since results do not depend on it."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator
from pydantic_core import PydanticCustomError

from unifork.config.base import UNKNOWN_KEY, StrictModel, load

CLUSTER = "UNIFORK_CLUSTER"
"""Environment: path of the cluster file."""
IN_JOB = "UNIFORK_IN_JOB"
"""Environment: set in jobs that a program of the pipeline started."""
ROOT = "UNIFORK_ROOT"
"""Environment: the folder that holds the data, on storage that the cluster shares; programs work in it."""


Step = Literal["download", "filter", "encode", "prepare", "image_tokenizer", "answer", "text", "analyze"]
"""What an entry of `jobs` is for; networks that examine images work with what `answer` has."""


class JobResources(StrictModel):
    """Workers of one data stage."""

    workers: NonNegativeInt = 0
    """Actors of the Ray Data job; 0 works in the stage's own process, for small data."""
    cpus: PositiveFloat = 1.0
    """CPUs each actor asks for; in `encode` as many threads, at least one, decode images."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs each actor asks for."""


class WebAccess(StrictModel):
    """How the download stage reaches the web; what it may fetch is part of the card."""

    threads: PositiveInt = 32
    """Connections of one worker at once."""
    connections_per_host: PositiveInt = 8
    """Connections of all workers together to one host; at least the number of workers."""
    proxy: Annotated[str, Field(pattern=r"^http://[^/@]+$")] | None = None
    """`http://HOST:PORT` of a proxy that allows CONNECT to any checked address; None connects directly. Proxies
    named in the environment are never used."""


class TrainResources(StrictModel):
    """Workers of a training stage."""

    workers: NonNegativeInt | tuple[PositiveInt, PositiveInt] = 0
    """Ray Train worker processes; 0 trains in the stage's own process, without Ray. `[LEAST, MOST]`: as many as the
    cluster has room for, looked at again every minute; another number goes on from the last checkpoint."""
    cpus: PositiveFloat = 1.0
    """CPUs each worker asks for."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs each worker asks for."""
    threads: PositiveInt = 1
    """Torch threads per worker; part of what makes results bit-equal on a CPU."""
    row_tokens: PositiveInt = 512
    """Tokens of a packed row; changes only the speed. At least the longest document."""
    rows_per_microbatch: PositiveInt = 1
    """Rows a device processes at once; changes only the speed."""
    activation_checkpointing: tuple[str, ...] = ()
    """Kinds of layers (`shared`, `task`, ... as in a plan, and `head`) that are computed again in the backward pass
    instead of kept: less memory, more time, the same numbers."""
    shard: Literal["none", "node", "all", "deepspeed-1", "deepspeed-2", "deepspeed-3"] = "none"
    """What shares a model that does not fit on every worker: nothing, the workers of a node, or all of them (torch), or
    all of them with DeepSpeed. One worker needs none."""
    compile: bool = False
    """Whether torch compiles the position-wise parts of the model, for GPUs: less memory traffic, a slower start,
    the same numbers within rounding."""
    max_restarts: NonNegativeInt = 0
    """How often workers that failed or were lost are started again from one and the same checkpoint; after a newer one
    the count begins anew."""
    collective_timeout_seconds: PositiveInt = 1800
    """How long workers wait for each other before they count as failed; more than the longest pause of the lead alone,
    such as writing the model at the end."""
    loggers: tuple[str, ...] = ("tensorboard",)
    """Where the numbers of each step go beside `history.jsonl`: `tensorboard`, `wandb`, or MODULE:OBJECT."""

    @property
    def fewest(self) -> int:
        """Workers without which training does not start."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @model_validator(mode="after")
    def _check_range(self) -> "TrainResources":
        if not isinstance(self.workers, int) and self.workers[0] > self.workers[1]:
            raise ValueError(f"workers: {list(self.workers)}: the first is the smaller number")
        return self

    @model_validator(mode="before")
    @classmethod
    def _name_the_key_of_strategies(cls, values: Any) -> Any:
        if isinstance(values, dict) and "strategy" in values:
            given = values["strategy"]
            now = {"ddp": "none", "fsdp2": "all"}.get(given, given)
            problem = f"`strategy: {given}` is `shard: {now}` now"
            raise PydanticCustomError(UNKNOWN_KEY, "{problem}", {"problem": problem})
        return values


class DriverResources(StrictModel):
    """A submitted program's own process."""

    cpus: Annotated[float, Field(ge=0.0)] = 0.0
    """CPUs it asks for; with these and `gpus` 0 Ray starts it on the head."""
    gpus: Annotated[float, Field(ge=0.0)] = 0.0
    """GPUs it asks for."""


class Cluster(StrictModel):
    """Where things run. Never a parameter of DVC: results do not depend on it."""

    name: str
    address: str | None = None
    """Job server (`http://HOST:8265`) to submit stages to; None runs them here."""
    allow_unprotected: bool = False
    """Whether `address` may be another machine's without demanding a token: whoever reaches it runs programs there."""
    driver: DriverResources = DriverResources()
    """What a submitted program's own process asks for, so that Ray places it on a node that has it. A program without
    workers (`workers: 0` of its entry in `jobs`, or of `train`) asks for what that entry says."""
    cpus: PositiveInt | None = None
    """CPUs given to the local Ray; None takes what the machine has."""
    gpus: NonNegativeInt | None = None
    """GPUs given to the local Ray; None takes what the machine has."""
    object_store_mb: PositiveInt = 200
    """Object store of the local Ray in MiB; jobs pass paths, not images."""
    runtime_env: dict[str, Any] = {}
    """Ray runtime environment of submitted jobs; `py_modules` are sent beside the project's own packages."""
    root: str | None = None
    """The folder of the experiment as the cluster sees it; None where it has the same path as here."""
    python: str | None = None
    """Python of the cluster's nodes; None where this very interpreter is on shared storage."""
    store: Annotated[str, Field(pattern=r"^[a-z][a-z0-9+.-]*://[^/]")] | None = None
    """`s3://bucket/path` or any other address of fsspec where new shards go, as `<store>/raw/<set>/part-00000.parquet`;
    the folders here keep the manifests, which name them. One experiment, one store. Credentials come from the
    environment of every node. None keeps shards beside their manifests."""
    jobs: dict[Step, JobResources] = {}
    """Resources of `download`, `filter`, `encode`, `answer` and of `prepare`, whose workers read texts and need a CPU
    each; the CPUs of `image_tokenizer` are the threads of its training. It, `text` and `analyze` compute in the program
    itself; their GPUs say whether on one."""
    web: WebAccess = WebAccess()
    train: TrainResources = TrainResources()
    train_stages: dict[str, TrainResources] = {}
    """Resources of single stages, by stage name, instead of `train`."""

    @field_validator("store")
    @classmethod
    def _takes_single_files(cls, store: str | None) -> str | None:
        if store and store.startswith("hf:"):
            raise ValueError("the Hub makes a commit of every file; publish finished codes there instead")
        return store

    def for_step(self, step: Step) -> JobResources:
        """Resources of a step of `jobs`."""
        return self.jobs.get(step, JobResources())

    def device(self, step: Step) -> str:
        """Where the networks of a step of `jobs` run, in its workers or in the program itself: `cuda` or `cpu`."""
        return "cuda" if self.for_step(step).gpus else "cpu"

    def for_stage(self, stage: str) -> TrainResources:
        """Resources of a training stage."""
        return self.train_stages.get(stage, self.train)


def cluster_file() -> str:
    """Path of the cluster file in use."""
    return os.environ.get(CLUSTER) or "clusters/local.yaml"


def load_cluster() -> Cluster:
    """The cluster file in use. Raises ConfigError."""
    return load(Cluster, cluster_file())


def in_job() -> bool:
    """Whether this program is the driver of a submitted job (by this project or by `ray job submit`)."""
    return IN_JOB in os.environ or "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the name Ray gives it

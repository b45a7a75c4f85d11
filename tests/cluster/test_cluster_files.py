"""Every cluster file loads; the one in use is the one that the environment names."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unifork.config import Cluster, TrainResources, load, load_cluster, parse
from unifork.errors import ConfigError
from unifork.jobs import _start_job, own_device

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "clusters").glob("*.yaml") if "." not in path.stem)
"""Without those that platforms read, such as `aws.ray-up.yaml`."""


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_loads(path: Path) -> None:
    cluster = load(Cluster, path)
    assert cluster.name == path.stem
    always = {"download", "filter", "encode", "prepare"}
    assert always <= set(cluster.jobs) <= {*always, "image_tokenizer", "answer", "text", "analyze"}


def test_the_local_one_starts_on_two_cores() -> None:
    cluster = load(Cluster, ROOT / "clusters" / "local.yaml")
    assert cluster.address is None
    for resources in [*cluster.jobs.values(), cluster.train, *cluster.train_stages.values()]:
        assert resources.workers * resources.cpus <= 2
        assert resources.gpus == 0


@pytest.mark.parametrize(("before", "now"), [("ddp", "none"), ("fsdp2", "all"), ("deepspeed-3", "deepspeed-3")])
def test_what_was_a_strategy_names_what_it_is_now(before: str, now: str) -> None:
    with pytest.raises(ConfigError, match=f"train: `strategy: {before}` is `shard: {now}` now$"):
        parse(Cluster, {"name": "x", "train": {"strategy": before}}, "file")
    assert parse(Cluster, {"name": "x", "train": {"shard": now}}, "file").train.shard == now


def test_an_entry_for_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"jobs\.encod: .*'download', .*'encode', .*\(got 'encod'\)"):
        parse(Cluster, {"name": "x", "jobs": {"encod": {"gpus": 1}}}, "file")


def test_workers_of_training_are_a_number_or_a_range() -> None:
    assert parse(TrainResources, {"workers": [2, 16]}, "file").fewest == 2
    assert parse(TrainResources, {"workers": 4}, "file").fewest == 4
    for wrong in ([3, 2], [0, 2], [2], -1):
        with pytest.raises(ConfigError, match="workers"):
            parse(TrainResources, {"workers": wrong}, "file")


def test_a_submitted_program_without_workers_asks_for_what_its_entry_says() -> None:
    class Client:
        def submit_job(self, **options: object) -> str:
            demands.update(options)
            return "job"

    demands: dict[str, object] = {}
    entries = {"analyze": {"cpus": 2, "gpus": 1}, "encode": {"workers": 4, "gpus": 1}, "answer": {"gpus": 0.5}}
    cluster = parse(Cluster, {"name": "x", "driver": {"cpus": 3}, "jobs": entries}, "file")
    for module, wanted in {"analyze": (2, 1), "encode": (3, 0), "report": (3, 0), "examine": (1, 0.5)}.items():
        _start_job(Client(), cluster, f"pipelines.{module}", ["name"])
        assert (demands["entrypoint_num_cpus"], demands["entrypoint_num_gpus"]) == wanted
    assert [cluster.device(step) for step in ("analyze", "encode", "text")] == ["cuda", "cuda", "cpu"]


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("UNIFORK_CLUSTER", raising=False)
    assert load_cluster().name == "local"
    monkeypatch.setenv("UNIFORK_CLUSTER", "clusters/slurm.yaml")
    assert load_cluster().name == "slurm"
    monkeypatch.setenv("UNIFORK_CLUSTER", "clusters/nowhere.yaml")
    with pytest.raises(ConfigError, match=r"clusters/nowhere\.yaml: no such file"):
        load_cluster()


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_where_training_has_gpus_every_network_has_one(path: Path) -> None:
    cluster = load(Cluster, path)
    networks = {"image_tokenizer", "encode", "answer", "text", "analyze"}
    with_gpu = {name for name, step in cluster.jobs.items() if step.gpus}
    assert with_gpu == (networks if cluster.train.gpus else set())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_here_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text("{name: file, jobs: {text: {gpus: 1}, analyze: {cpus: 2}}}")
    monkeypatch.setenv("UNIFORK_CLUSTER", str(tmp_path / "file.yaml"))
    assert (own_device("analyze"), own_device("image_tokenizer")) == ("cpu", "cpu")
    with pytest.raises(ConfigError, match=r"file\.yaml: jobs\.text\.gpus: cuda: this machine has 0 GPUs"):
        own_device("text")


def test_ray_is_not_imported_before_it_is_needed() -> None:
    program = """
import sys
from unifork.cluster import map_shards, local_ray
from unifork.config import JobResources, load_cluster
from unifork.shards.task import ShardResult, ShardTask
class Same:
    def __call__(self, task):
        return ShardResult(task.output, problem="none")
with local_ray(load_cluster(), needed=False):
    (result,) = map_shards([ShardTask(output="shard")], Same, (), JobResources())
    print(result.output, "ray" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "shard False\n"

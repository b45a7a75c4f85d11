"""One Ray for all tests of a process that need one, and the order in which processes share the tests.

Of two Rays on one machine, Ray Train misses its cleaner of what lost controllers leave behind, and nothing else.
"""

import lzma
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unifork.cluster import local_ray, set_ray_environment
from unifork.config import Cluster

if "PYTEST_XDIST_WORKER" in os.environ:  # of several processes each has one core; before any test imports torch
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ |= {"RAY_worker_niceness": "0"}  # Ray's 15 would wait for the tests of the other process
set_ray_environment()  # before any test imports ray
sys.path.insert(0, str(Path(__file__).parent))  # helpers beside this file, such as `tiny`


@pytest.hookimpl(tryfirst=True)  # xdist's own hook reads the groups (with pytest 9.2 it sets them in vain)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts a Ray is slow, and comes first: clusters of a test's own, then what uses the session's Ray.

    Processes take slow tests file by file in this order, so that none gets a cluster any more when it has the session's
    Ray; fast tests come last and one by one, so that no process is left without work.
    """

    def order(item: pytest.Item) -> int:
        users = "ray_session" in getattr(item, "fixturenames", ())
        cluster, longest = item.get_closest_marker("cluster"), item.path.name == "test_end_to_end.py"
        return (0 if longest else 1) if cluster else 2 if users else 3 if item.get_closest_marker("slow") else 4

    for item in items:
        if order(item) < 4:
            item.add_marker("slow")
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    items.sort(key=order)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What forked processes find imported."""
    import forks

    forks.preload(slow=any(item.get_closest_marker("slow") for item in session.items))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[Cluster]:
    """A Ray with two CPUs and two pretended GPUs, started once; `local_ray` uses it too."""
    cluster = Cluster(name="tests", cpus=2, gpus=2, object_store_mb=80)
    with local_ray(cluster):
        yield cluster


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment root with everything up to a fresh model, made by the real stages.

    Read-only: tests that train or damage something copy it.
    """
    from builds import built_once
    from tiny import build

    return built_once(tmp_path_factory, "tiny", build)


@pytest.fixture(scope="session")
def qwen_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2.5's real tokenizer, as a directory of the Hub. Read-only."""
    packed = Path(__file__).parent / "fixtures" / "qwen2.5_tokenizer"
    directory = tmp_path_factory.mktemp("qwen")
    (directory / "tokenizer.json").write_bytes(lzma.decompress((packed / "tokenizer.json.xz").read_bytes()))
    (directory / "tokenizer_config.json").write_bytes((packed / "tokenizer_config.json").read_bytes())
    return directory


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a real S3 server in this process; the environment points S3 clients at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    variables = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    yield url
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def bucket(s3_server: str, request: pytest.FixtureRequest) -> str:
    """A fresh bucket, by its address."""
    import boto3

    name = "b" + str(abs(hash(request.node.name)) % 10**12)
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"

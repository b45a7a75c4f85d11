"""A real S3 server in this process."""

import os

import pytest


@pytest.fixture(scope="session")
def s3_server():
    """Address of a moto server; the environment points S3 clients at it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    said = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in said}
    os.environ.update(said)
    yield url
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def bucket(s3_server, request):
    """A fresh bucket, by its address."""
    import boto3

    name = "b" + str(abs(hash(request.node.name)) % 10**12)
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"

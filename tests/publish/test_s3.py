"""Publishing to a real S3 server: whole, interrupted, changed, verified, and read back."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
from tiny import bytes_of, objects

from unifork.errors import DataError
from unifork.layout import Layout
from unifork.publish.card import Offer
from unifork.publish.publication import build, fetch
from unifork.publish.stores import CHECKSUMS, checksums, open_store, reread, sync

pytestmark = pytest.mark.slow

KILLED = """
import os, signal, sys
from pathlib import Path

from unifork.publish import stores
from unifork.stores import Store

seen = []

class Dying:
    def __init__(self, system): self.system = system
    def __getattr__(self, name): return getattr(self.system, name)
    def put_file(self, path, target):
        seen.append(target)
        if len(seen) == 4:
            handle = self.system.open(target, "wb", block_size=5 * 2**20)
            handle.write(bytes(6 * 2**20))  # one part of a larger object is on the server now
            os.kill(os.getpid(), signal.SIGKILL)
        self.system.put_file(path, target)

store = stores.open_store(sys.argv[2])
stores.sync(Path(sys.argv[1]), Store(store.uri, Dying(store.system), store.root))
"""


@pytest.fixture(scope="module")
def folder(tiny_root, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("published")
    build("shapes", Layout(tiny_root), out, None, Offer("unifork"))
    return out


def test_only_what_is_missing_or_differs_is_uploaded(folder, bucket, tmp_path):
    address = f"{bucket}/sets/shapes"
    store = open_store(address)
    names = {*checksums(open_store(str(folder))), CHECKSUMS}
    assert set(sync(folder, store).uploaded) == names
    assert objects(address) == bytes_of(folder)
    assert sync(folder, store) == sync(folder, open_store(address))
    assert sync(folder, store).uploaded == ()
    assert reread(store) == []

    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    victim, lost = "crop/train-00001-of-00003.parquet", "pad/train-00002-of-00003.parquet"
    data = bytearray((folder / victim).read_bytes())
    data[50] ^= 1
    client.put_object(Bucket=name, Key=f"sets/shapes/{victim}", Body=bytes(data))
    client.delete_object(Bucket=name, Key=f"sets/shapes/{lost}")
    client.put_object(Bucket=name, Key="sets/shapes/crop/train-00007-of-00008.parquet", Body=b"old")
    client.put_object(Bucket=name, Key="sets/shapes/notes.txt", Body=b"of somebody else")
    assert [fault.split(":")[0] for fault in reread(store)] == [victim, lost]
    with pytest.raises(DataError, match=rf"{victim}: sha256 .* instead of"):
        fetch(store, "back", Layout(tmp_path))
    done = sync(folder, store)
    assert (set(done.uploaded), done.removed) == ({victim, lost}, ("crop/train-00007-of-00008.parquet",))
    assert objects(address) == bytes_of(folder) | {"notes.txt": b"of somebody else"}
    assert reread(store) == []


def test_an_upload_in_parts_is_compared_by_its_bytes(folder, bucket):
    address = f"{bucket}/set"
    store = open_store(address)
    sync(folder, store)
    client, name = boto3.client("s3"), bucket.removeprefix("s3://")
    key = "set/crop/train-00000-of-00003.parquet"
    upload = client.create_multipart_upload(Bucket=name, Key=key)["UploadId"]
    body = (folder / key.removeprefix("set/")).read_bytes()
    part = client.upload_part(Bucket=name, Key=key, UploadId=upload, PartNumber=1, Body=body)
    client.complete_multipart_upload(
        Bucket=name, Key=key, UploadId=upload, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    )
    assert "-" in client.head_object(Bucket=name, Key=key)["ETag"]
    assert sync(folder, store).uploaded == ()


def test_a_killed_upload_goes_on_where_it_was(folder, bucket):
    address = f"{bucket}/set"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), address], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    begun = boto3.client("s3").list_multipart_uploads(Bucket=bucket.removeprefix("s3://"))["Uploads"]
    assert len(begun) == 1
    there = objects(address)
    assert len(there) == 3
    assert CHECKSUMS not in there
    with pytest.raises(DataError, match=f"no {CHECKSUMS}; nothing was published here, or not to its end"):
        checksums(open_store(address))
    again = sync(folder, open_store(address))
    assert not set(again.uploaded) & set(there)
    assert objects(address) == bytes_of(folder)


def test_codes_come_back_from_s3(folder, bucket, tiny_root, tmp_path):
    address = f"{bucket}/set"
    sync(folder, open_store(address))
    fetch(open_store(address), "shapes", Layout(tmp_path))
    assert bytes_of(tmp_path / "data/codes/shapes") == bytes_of(tiny_root / "data/codes/shapes")


def test_a_bucket_that_is_not_there_is_one_line(folder, s3_server):
    with pytest.raises(DataError, match=r"s3://not-there/set: .*Run the command again"):
        sync(folder, open_store("s3://not-there/set"))

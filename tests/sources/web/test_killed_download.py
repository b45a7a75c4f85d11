"""A download from the web that is killed, as a program of its own."""

import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import yaml
from loopback import FETCH, image
from test_web_download import card, download, root, write_laion
from tiny import REPOSITORY, bytes_of, start

from unifork.config import Card, load_card
from unifork.shards.manifest import MANIFEST, read_manifest

__all__ = ["root"]


def write_root(root: Path) -> Card:
    """What the program needs beside the list."""
    (root / "datasets").mkdir()
    patient = card(fetch={**FETCH, "timeout_seconds": 20})
    (root / "datasets/weblist.yaml").write_text(yaml.safe_dump(patient.model_dump(mode="json")))
    assert load_card("weblist") == patient
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["datasets"]["weblist"] = {"rows": None, "shard_rows": 4}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(REPOSITORY / "clusters", root / "clusters")
    return patient


KILLS = """
import os, signal, sys, time
if {words!r} in " ".join(sys.orig_argv):
    sys.path.insert(0, {tests!r})
    import crashes
    def die(mark):
        os.kill(os.getppid() if {inside!r} else os.getpid(), signal.SIGKILL)
        time.sleep(20)
    crashes.die = die
    crashes.arm({point!r})
"""
INSIDE = ("in the middle of the shard", "after the temporary file", "before the rename", "before the record",
          "after the record")  # fmt: skip
"""Points that the process of img2dataset comes to; the program to the others."""


@pytest.mark.slow
@pytest.mark.parametrize("point", [*INSIDE, "before the manifest"])
def test_a_program_killed_at_a_point_ends_with_the_same_bytes(root, web, tmp_path, point):
    web.pages |= {f"/{i}.png": image("PNG", i) for i in range(6)}
    write_laion(root / "lists/a.parquet", [f"{web.root}/{i}.png" for i in range(6)] + [web.root + "/no", "ftp://x"])
    download(write_root(root), "whole", shard_rows=4)
    inside = point in INSIDE
    words = "--multiprocessing-fork" if inside else "pipelines.download"
    (tmp_path / "killed").mkdir()
    code = KILLS.format(words=words, tests=str(REPOSITORY / "tests"), inside=inside, point=point)
    (tmp_path / "killed/sitecustomize.py").write_text(code)
    first = start(root, "pipelines.download", "weblist", path=tmp_path / "killed")
    output = first.communicate(timeout=60)
    assert first.returncode == -signal.SIGKILL, output
    assert not (root / "data/raw/weblist" / MANIFEST).exists()
    second = start(root, "pipelines.download", "weblist")
    output = second.communicate(timeout=60)
    assert second.returncode == 0, output
    assert bytes_of(root / "data/raw/weblist") == bytes_of(root / "whole")


ALONE = """
import sys, urllib.request
from pipelines import download
if __name__ == "__main__":
    download.main("weblist")
    print("img2dataset" in sys.modules, urllib.request._opener)
"""


@pytest.mark.slow
def test_the_program_never_imports_img2dataset_and_says_how_its_process_ended(root, web, tmp_path):
    web.pages |= {f"/{i}.png": image("PNG", i) for i in range(2)} | {"/gate.png": lambda page: web.gate.wait(20)}
    write_laion(root / "lists/a.parquet", [f"{web.root}/{i}.png" for i in range(2)])
    write_root(root)
    (tmp_path / "alone.py").write_text(ALONE)
    done = start(root, "alone", path=tmp_path).communicate(timeout=60)
    assert done[0].splitlines()[-1] == "False None", done
    write_laion(root / "lists/b.parquet", [f"{web.root}/gate.png"])
    program = start(root, "pipelines.download", "weblist")
    while not web.hits["/gate.png"]:
        assert program.poll() is None
        time.sleep(0.02)
    for child in psutil.Process(program.pid).children():
        if "--multiprocessing-fork" in child.cmdline():
            child.kill()
    output = program.communicate(timeout=60)
    assert program.returncode == 2
    assert "part-00001.parquet: the process that makes it ended with exit code -9" in output[1].splitlines()[-1]
    web.gate.set()


@pytest.mark.slow
def test_a_killed_program_does_only_the_rest_and_a_grown_list_only_what_is_new(root, web):
    def gated(page):
        web.gate.wait(20)
        page.answer(200, image("PNG", 99))

    web.pages |= {f"/{i}.png": image("PNG", i) for i in range(6)} | {"/gate.png": gated}
    urls = [f"{web.root}/{i}.png" for i in range(5)] + [f"{web.root}/gate.png", f"{web.root}/5.png", web.root + "/no"]
    write_laion(root / "lists/a.parquet", urls)
    patient = write_root(root)
    first = start(root, "pipelines.download", "weblist")
    while not web.hits["/gate.png"]:
        assert first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    raw = root / "data/raw/weblist"
    assert not (raw / MANIFEST).exists()
    assert (raw / "part-00000.parquet").exists()
    assert not (raw / "part-00001.parquet").exists()

    web.gate.set()
    web.hits.clear()
    second = start(root, "pipelines.download", "weblist").communicate()
    assert "2/2 shards (1 kept from before)" in second[0], second
    assert web.hits["/0.png"] == 0
    assert read_manifest(raw).rows == 7
    download(patient, "whole", shard_rows=4)
    for name in (MANIFEST, "part-00000.parquet", "part-00001.parquet", "quarantine/part-00001.parquet"):
        assert (raw / name).read_bytes() == (root / "whole" / name).read_bytes()

    untouched = {path: path.stat() for path in raw.glob("part-*")}
    write_laion(root / "lists/b.parquet", [f"{web.root}/0.png"])
    web.hits.clear()
    grown = start(root, "pipelines.download", "weblist").communicate()
    assert "3/3 shards (2 kept from before), 1/1 rows" in grown[0], grown
    assert web.hits == {"/robots.txt": 1, "/0.png": 1}
    for path, before in untouched.items():
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

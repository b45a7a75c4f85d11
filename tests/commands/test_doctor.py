"""`unifork doctor`: what holds on this machine, and every verdict made false by a machine that lacks something."""

import errno
import json
import os
import shutil
import socket
import time

import pytest
import torch
from typer.testing import CliRunner

from unifork import doctor, processes
from unifork.cli import app
from unifork.config import Cluster, Experiment, load, load_card, parse
from unifork.devices import is_capture_trusted
from unifork.doctor import CHECKS, Here, examine
from unifork.layout import Layout
from unifork.models import generation, masks

OK = {"machine", "versions", "attention", "bfloat16 step", "cpus and gpus", "file locks"}
DEMO = load(Experiment, "params.yaml")
ZERO = {"workers": 2, "shard": "deepspeed-2"}


@pytest.fixture
def here(tmp_path) -> Here:
    return Here(Cluster(name="here"), layout=Layout(tmp_path))


def cluster(**values) -> Here:
    return Here(parse(Cluster, {"name": "test", **values}, "test"))


def raising(error: Exception):
    def call(*_, **__):
        raise error

    return call


@pytest.mark.slow
def test_all_checks_of_this_machine():
    """Kernels, a step, two processes, disk and locks: the real ones."""
    done = CliRunner().invoke(app, ["doctor", "--json"])
    verdicts = {finding["check"]: finding["verdict"] for finding in json.loads(done.stdout)}
    assert list(verdicts) == list(CHECKS)
    assert {name: verdicts[name] for name in OK | {"all reduce"}} == dict.fromkeys(OK | {"all reduce"}, "ok")
    assert verdicts["web"] == verdicts["store"] == verdicts["job server"] == "not run"
    assert done.exit_code == ("failed" in verdicts.values())


def test_the_exit_code_and_the_table(monkeypatch):
    findings = {"one": ("ok", "fine"), "two": ("warning", "hm")}
    monkeypatch.setattr(doctor, "CHECKS", {name: lambda _, it=it: it for name, it in findings.items()})
    done = CliRunner().invoke(app, ["doctor"])
    assert [line.split() for line in done.stdout.splitlines()] == [["one", "ok", "fine"], ["two", "warning", "hm"]]
    assert done.exit_code == 0
    monkeypatch.setitem(doctor.CHECKS, "three", raising(ValueError("broken\nmachine")))
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert json.loads(done.stdout)[2] == {"check": "three", "verdict": "failed", "text": "ValueError: broken machine"}
    assert done.exit_code == 1


def test_versions(here, monkeypatch, tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text(f"torch=={torch.__version__.partition('+')[0]}\nnever-installed==1.0\nPyYAML==0.1\n")
    monkeypatch.setattr(doctor, "LOCK", lock)
    verdict, text = examine("versions", here)
    assert verdict == "warning"
    assert text.startswith("pyyaml 6")
    assert text.endswith(", not 0.1"), "neither torch, whatever its build, nor what is not installed"
    lock.unlink()
    assert examine("versions", here)[0] == "not run"


@pytest.mark.parametrize(("free", "verdict"), [(0.5e9, "failed"), (5e9, "warning"), (500e9, "ok")])
def test_free_disk(here, monkeypatch, free, verdict):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1e12, 1e12 - free, free))
    assert examine("free disk", here)[0] == verdict


def test_write_speed(here, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SLOW_MB_PER_SECOND", 1)
    assert examine("write speed", here)[0] == "ok"
    monkeypatch.setattr(doctor, "SLOW_MB_PER_SECOND", 50)
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(1.5))
    assert examine("write speed", here)[0] == "warning"
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", raising(OSError(errno.EROFS, "Read-only file system")))
    assert examine("write speed", here) == ("failed", "OSError: [Errno 30] Read-only file system")
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_file_locks(here, monkeypatch):
    assert examine("file locks", here)[0] == "ok"
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)
    assert examine("file locks", here) == ("failed", f"{here.folder}: flock lets two in at once")
    monkeypatch.setattr(doctor.fcntl, "flock", raising(OSError(errno.ENOSYS, "Function not implemented")))
    assert examine("file locks", here) == ("failed", "OSError: [Errno 38] Function not implemented")


RIGHT = masks.one_by_one


def leaking(q, k, v, mask, scaling):
    """All documents as one."""
    return RIGHT(q, k, v, masks.Sequences((len(q),), mask.starts_Q1), scaling)


WRONG = {
    "nothing": lambda *given: RIGHT(*given) * 0,
    "another scale": lambda q, k, v, mask, scaling: RIGHT(q, k, v, mask, 1.2 * scaling),
    "not a number": lambda *given: RIGHT(*given) * float("nan"),
    "across documents": leaking,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_gives_wrong_numbers(here, monkeypatch, wrong):
    monkeypatch.setattr(masks, "one_by_one", WRONG[wrong])
    verdict, text = examine("attention", here)
    assert verdict == "failed", text


def test_flash_attention(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert examine("flash attention", here) == ("not run", "no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "find_spec", lambda _: object())
    assert examine("flash attention", here)[0] == "ok"
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert examine("flash attention", here)[0] == "warning"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong_in_one_number_type(here, monkeypatch, dtype):
    monkeypatch.setattr(masks, "one_by_one", lambda q, *rest: RIGHT(q, *rest) * (1.2 if q.dtype == dtype else 1))
    assert examine("attention", here)[0] == "failed"


def test_a_bfloat16_step_that_gives_nan(here, monkeypatch):
    forward = torch.nn.Linear.forward

    def overflowing(self, x):
        return forward(self, x) * (float("inf") if torch.is_autocast_enabled("cpu") else 1)

    assert examine("bfloat16 step", here)[0] == "ok"
    monkeypatch.setattr(torch.nn.Linear, "forward", overflowing)
    verdict, text = examine("bfloat16 step", here)
    assert verdict == "failed"
    assert text.startswith("loss nan; not finite: ")


def test_captured_generation(here, monkeypatch, tmp_path):
    """The model stays on the CPU, and generation is one that a GPU might do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert examine("captured generation", here) == ("not run", "no GPU")
    model, flips = doctor._model(), 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(model), "to", lambda self, device: self)
    generate = generation.generate_images
    monkeypatch.setattr(
        generation, "generate_images", lambda *given, capture=False: generate(*given) + flips * int(capture)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpu = torch.device("cuda")
    assert not is_capture_trusted(gpu)
    assert examine("captured generation", here) == ("ok", "same codes")
    assert is_capture_trusted(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 2")
    assert not is_capture_trusted(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 1")
    flips = 1
    assert examine("captured generation", here) == ("failed", "captured steps draw other codes")
    assert not is_capture_trusted(gpu)
    assert not is_capture_trusted(torch.device("cpu"))


def test_processes_that_do_not_meet(here, monkeypatch):
    monkeypatch.setattr(doctor, "REDUCE_SECONDS", 0)
    assert examine("all reduce", here) == ("failed", "gloo: 2 processes did not meet within 0 s")


def test_a_wrong_sum(monkeypatch, tmp_path):
    for name in ("init_process_group", "all_reduce", "destroy_process_group"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: None)
    with pytest.raises(RuntimeError, match=r"the sum of 1 to 2 came out as 1\.0"):
        processes.meet(0, 2, "gloo", str(tmp_path))


def test_cpus_and_gpus(monkeypatch):
    assert examine("cpus and gpus", cluster(cpus=2, train={"workers": 2}))[0] == "ok"
    verdict, text = examine("cpus and gpus", cluster(cpus=2, jobs={"encode": {"workers": 3}}, train={"gpus": 1}))
    if not torch.cuda.is_available():
        assert verdict == "failed"
        assert text == "2 cpus and 0 gpus; encode asks for 3 cpus; train asks for 1 gpus"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    eight = {"workers": 8, "gpus": 1}
    assert examine("cpus and gpus", cluster(cpus=8, train=eight))[0] == "ok"
    assert (
        "s1 asks for 9 gpus"
        in examine("cpus and gpus", cluster(cpus=9, train_stages={"s1": eight | {"workers": 9}}))[1]
    )
    assert examine("cpus and gpus", cluster(address="http://head:8265", train=eight))[0] == "not run"


def test_deepspeed(monkeypatch):
    assert examine("deepspeed", cluster())[0] == "not run"
    monkeypatch.setattr(doctor, "find_spec", lambda _: object())
    assert examine("deepspeed", cluster(train_stages={"s1": ZERO}))[0] == "ok"
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert examine("deepspeed", cluster(train_stages={"s1": ZERO}))[0] == "failed"


@pytest.mark.slow
def test_a_store(bucket, monkeypatch):
    import boto3

    assert examine("store", cluster())[0] == "not run"
    assert examine("store", cluster(store=f"{bucket}/shards")) == ("ok", f"{bucket}/shards: written, read and removed")
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=bucket.removeprefix("s3://"))
    verdict, text = examine("store", cluster(store="s3://no-such-bucket/shards"))
    assert verdict == "failed"
    assert "s3://no-such-bucket/shards" in text


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_job_server(listening):
    address = f"http://127.0.0.1:{listening}"
    assert examine("job server", cluster()) == ("not run", "not needed: stages run on this machine")
    assert examine("job server", cluster(address=address)) == ("ok", f"127.0.0.1:{listening}")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    verdict, text = examine("job server", cluster(address=f"http://127.0.0.1:{port}"))
    assert verdict == "failed"
    assert text.startswith(f"127.0.0.1:{port}: no connection: ")


def test_the_web(listening, monkeypatch):
    assert examine("web", Here(Cluster(name="here"), DEMO))[0] == "not run", "the demo needs no network"
    webby = DEMO.model_copy(update={"datasets": {"laion_en": DEMO.datasets["shapes"]}})
    assert load_card("laion_en").source.kind == "url_list"
    proxy = {"proxy": f"http://127.0.0.1:{listening}"}
    through = parse(Cluster, {"name": "here", "web": proxy}, "test")
    assert examine("web", Here(through, webby)) == ("ok", f"127.0.0.1:{listening}")
    monkeypatch.setattr(socket, "getaddrinfo", raising(socket.gaierror(-3, "Temporary failure in name resolution")))
    verdict, text = examine("web", Here(Cluster(name="here"), webby))
    assert verdict == "failed"
    assert "no such name: [Errno -3] Temporary failure" in text
    monkeypatch.setattr(socket, "create_connection", raising(TimeoutError("timed out")))
    verdict, text = examine("web", Here(Cluster(name="here"), webby))
    assert verdict == "failed"
    assert text.endswith(":443: no connection: timed out")

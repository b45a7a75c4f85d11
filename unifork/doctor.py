"""What this machine has, and whether the pieces work on it: the checks of `unifork doctor`.

In: the cluster file and, where there is one, `params.yaml`. Out: for each check of CHECKS a verdict and a sentence. A
check is a function of `Here`; what it raises is a failure. Nothing starts Ray, and the only machines that are spoken to
are those that the cluster file names and the home pages of data sets that come from the web.

Shape suffixes: B rows, T tokens, X tokens of documents, H hidden size, K codebook rows, C width of a code, P positions,
D code depth.
"""

import copy
import fcntl
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, NO_DOCUMENT, TEXT, Batch, Document, pack
from unifork.config import Cluster, Experiment, HeadConfig, Sampling, TrainResources, Variant, load_card
from unifork.devices import trust_capture
from unifork.layout import Layout
from unifork.models import generation
from unifork.models.masks import EAGER, MASKS, VARLEN
from unifork.models.warm_start import create_model
from unifork.processes import meet
from unifork.report.surroundings import installed, surroundings
from unifork.sources import source_of
from unifork.stores import open_store
from unifork.vocabulary import TASKS

Finding = tuple[Literal["ok", "warning", "failed", "not run"], str]

LOCK = Path(__file__).parents[1] / "requirements.lock"
LEAST_FREE_GB, FEW_FREE_GB = 1, 20
WRITTEN_MB, SLOW_MB_PER_SECOND = 64, 50
ANSWER_SECONDS, REDUCE_SECONDS = 5, 60
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Of hidden states and gradients, as shares of the largest. A token that sees what it must not changes them by more."""
DEPTH, POSITIONS, VOCABULARY = 2, 4, 64


@dataclass(frozen=True)
class Here:
    """What the checks are about."""

    cluster: Cluster
    params: Experiment | None = None
    layout: Layout = field(default_factory=Layout)

    @property
    def device(self) -> str:
        """Where networks run on this machine."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def folder(self) -> Path:
        """The folder of runs, or the nearest above it that is there."""
        folder = self.layout.run("").absolute()
        return next(path for path in (folder, *folder.parents) if path.exists())


# -------------------------------------------------------------------------------------- what is here


def machine(_: Here) -> Finding:
    """Cores, memory, graphics cards with their driver."""
    facts = surroundings(LOCK.parent)
    gpus = "; ".join(facts["gpus"]) or "no GPU"
    return "ok", f"{facts['cores']} cores, {facts['cpu']}; {facts['memory']} of memory; {gpus}"


def versions(_: Here) -> Finding:
    """Distributions that Python imports against requirements.lock."""
    if not LOCK.exists():
        return "not run", "no requirements.lock beside the package"
    locked, here = dict(line.lower().replace("_", "-").split("==") for line in LOCK.read_text().split()), installed()
    there = {name: here[name] for name in locked if name in here}  # the others belong to extras
    others = [f"{name} {now}, not {locked[name]}" for name, now in there.items() if now != locked[name]]
    return ("warning", "; ".join(others)) if others else ("ok", f"{len(there)} as in requirements.lock")


def free_disk(here: Here) -> Finding:
    """Free room where runs are written."""
    free = shutil.disk_usage(here.folder).free / 1e9
    text = f"{free:.1f} GB; `unifork plan` says what an experiment needs"
    return "failed" if free < LEAST_FREE_GB else "warning" if free < FEW_FREE_GB else "ok", text


# ------------------------------------------------------------------------------- what is written to


def write_speed(here: Here) -> Finding:
    """Of a file that is whole on the disk before the clock stops, as a checkpoint is."""
    with tempfile.TemporaryFile(dir=here.folder, buffering=0) as file:
        block, started = os.urandom(1_000_000), time.perf_counter()
        for _ in range(WRITTEN_MB):
            file.write(block)
        os.fsync(file.fileno())
        speed = WRITTEN_MB / (time.perf_counter() - started)
    return "warning" if speed < SLOW_MB_PER_SECOND else "ok", f"{speed:.0f} MB/s in {here.folder}"


def file_locks(here: Here) -> Finding:
    """Whether a lock keeps a second one out, which stops two programs from writing one folder."""
    with tempfile.NamedTemporaryFile(dir=here.folder) as first, open(first.name) as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "ok", "flock on this machine; for several see docs/clusters.md"
    return "failed", f"{here.folder}: flock lets two in at once"


def store(here: Here) -> Finding:
    """Whether a shard can be written to the cluster's store, read and removed."""
    if not here.cluster.store:
        return "not run", "not needed: shards lie in folders"
    place = open_store(here.cluster.store)
    with tempfile.NamedTemporaryFile(prefix="doctor-") as file:
        folder, name = os.path.split(file.name)
        place.put(Path(folder), [name])
    found = place.get(name)
    place.remove([name])
    return ("failed" if found is None else "ok"), f"{place.uri}: written, read and removed"


# ------------------------------------------------------------------------------------ what computes


def _model() -> Any:
    """A model of a few thousand weights with a layer of each kind of attention."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    backbone = {"model_type": "qwen2", "num_hidden_layers": 3, **sizes}
    head = HeadConfig(layers=1, heads=2, head_dim=32)
    variant = Variant(plan="shared task modality_isolated norm:task", backbone=backbone, head=head, stages=())
    codebook_KC = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    model = create_model(variant, codebook_KC, DEPTH, int(POSITIONS**0.5), "none", VOCABULARY)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as drawn, attention would hardly matter
            nn.init.normal_(parameter, 0, parameter.shape[1] ** -0.5, torch.Generator().manual_seed(parameter.numel()))
    return model


def _batch(device: str) -> Batch:
    """Two rows of documents of both tasks, short and long."""
    draw, documents = np.random.default_rng(0), []
    for number, length in enumerate((3, 40, 9, 60, 1, 20)):
        kinds_T = np.array([TEXT] * length + [BEGIN_IMAGE] + [IMAGE] * POSITIONS + [END_IMAGE])
        ids_T = np.where(kinds_T == TEXT, draw.integers(0, VOCABULARY, len(kinds_T)), 0)
        codes_PD = draw.integers(0, 16, (POSITIONS, DEPTH))
        supervised_T = (kinds_T == TEXT) & (np.arange(len(kinds_T)) > 0) & (number % 2 == 0)
        documents.append(Document("", TASKS[number % 2], kinds_T, ids_T, supervised_T, codes_PD))
    return pack([documents[::2], documents[1::2]], 160, DEPTH).to(device)


def _computed(model: Any, implementation: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Hidden states (X, H) of the documents' tokens, and the gradient of the embedding, in float64."""
    model, batch = copy.deepcopy(model).to(device, dtype), _batch(device)
    model.set_attn_implementation(implementation)
    hidden_XH = model.hidden(batch)[batch.documents_BT != NO_DOCUMENT]
    weights_XH = torch.linspace(-1, 1, hidden_XH.numel(), device=device, dtype=dtype).view_as(hidden_XH)
    (gradient,) = torch.autograd.grad((hidden_XH * weights_XH).sum(), [model.embed_tokens.weight])
    return [hidden_XH.detach().double().cpu(), gradient.double().cpu()]


def attention(here: Here) -> Finding:
    """Every kernel of attention that a model may use here, against eager attention in float64."""
    model, errors, right = _model(), [], True
    expected = _computed(model, EAGER, torch.float64, "cpu")
    for dtype, largest in LARGEST_ERROR.items():
        for name in MASKS:
            found = _computed(model, name, dtype, here.device)
            error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))
            right = right and error <= largest
            errors.append(f"{name} in {str(dtype).removeprefix('torch.')} {error:.0e}")
    return ("ok" if right else "failed"), f"largest error on {here.device}: {', '.join(errors)}"


def flash_attention(here: Here) -> Finding:
    """Whether the extra `flash` is installed, which only a GPU can use."""
    if here.device == "cpu":
        return "not run", "no GPU"
    found = find_spec("flash_attn") is not None
    return ("ok", "installed") if found else ("warning", "not installed: torch's kernel takes its place")


def bfloat16_step(here: Here) -> Finding:
    """Losses, gradients and weights of one optimizer step."""
    model = _model().to(here.device)
    model.set_attn_implementation(VARLEN)
    with torch.autocast(here.device, torch.bfloat16):
        losses = model(_batch(here.device))
    loss = losses.text_loss_sum + losses.image_loss_sum_D.sum()
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    numbers = [loss, *model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    wrong = sum(not torch.isfinite(number).all() for number in numbers)
    return ("failed" if wrong else "ok"), f"loss {loss.item():.1f}; not finite: {wrong} of {len(numbers)} tensors"


def captured_generation(here: Here) -> Finding:
    """Whether captured steps of generation draw the codes of the same steps without capture; then they are used."""
    if here.device == "cpu":
        return "not run", "no GPU"
    generate: Any = partial(generation.generate_images, _model().to(here.device), [[1, 2], [3]], [4], Sampling(top_k=8))
    right = torch.equal(generate(), generate(capture=True))
    trust_capture(torch.device(here.device), right)
    return ("ok", "same codes") if right else ("failed", "captured steps draw other codes")


def all_reduce(_: Here) -> Finding:
    """A sum over processes: of all GPUs by nccl, of two processes by gloo where there are not two."""
    gpus = torch.cuda.device_count()
    backend, workers = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    with tempfile.TemporaryDirectory() as folder:
        spawn: Any = partial(start_processes, join=False, start_method="spawn")
        group, ends = spawn(meet, (workers, backend, folder), workers), time.monotonic() + REDUCE_SECONDS
        while not group.join(timeout=1):  # raises what a process raised
            if time.monotonic() > ends:
                for process in group.processes:
                    process.kill()
                return "failed", f"{backend}: {workers} processes did not meet within {REDUCE_SECONDS} s"
    return "ok", f"{backend}, {workers} processes"


# ------------------------------------------------------------------------------------- what is asked for


def cpus_and_gpus(here: Here) -> Finding:
    """Whether the workers of the cluster file have theirs on this machine."""
    cluster = here.cluster
    if cluster.address:
        return "not run", f"stages run at {cluster.address}: look there, with a cluster file without `address`"
    needs: list[tuple[str, Any]] = [*cluster.jobs.items(), ("train", cluster.train), *cluster.train_stages.items()]
    have = {"cpus": cluster.cpus or os.cpu_count() or 1, "gpus": torch.cuda.device_count()}
    short = [
        f"{name} asks for {total:g} {kind}"
        for name, need in needs
        for workers in [need.fewest if isinstance(need, TrainResources) else need.workers]
        for kind, total in (("cpus", workers * need.cpus), ("gpus", max(workers, 1) * need.gpus))
        if total > have[kind]
    ]
    return "failed" if short else "ok", "; ".join([f"{have['cpus']} cpus and {have['gpus']} gpus", *short])


def deepspeed(here: Here) -> Finding:
    """Whether it is installed, where a stage trains with it."""
    if "deepspeed" not in str([here.cluster.train, *here.cluster.train_stages.values()]):
        return "not run", "not needed"
    return ("ok", "installed") if find_spec("deepspeed") else ("failed", "missing: pip install 'unifork[deepspeed]'")


def job_server(here: Here) -> Finding:
    """Whether something listens where stages are submitted."""
    address = here.cluster.address
    return _reached([address]) if address else ("not run", "not needed: stages run on this machine")


def web(here: Here) -> Finding:
    """Names and connections, where a data set of the experiment is downloaded from the web."""
    cards = [load_card(name, here.layout.cards) for name in (here.params.datasets if here.params else ())]
    pages = [card.homepage for card in cards if source_of(card)[1].web]
    if not pages:
        return "not run", "not needed: nothing is downloaded from the web"
    return _reached([here.cluster.web.proxy] if here.cluster.web.proxy else pages)


def _reached(addresses: list[str]) -> Finding:
    """Connections to the hosts of some addresses."""
    places = []
    for parts in map(urlsplit, addresses):
        host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
        try:
            socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
        except OSError as error:
            kind = "no such name" if isinstance(error, socket.gaierror) else "no connection"
            return "failed", f"{host}:{port}: {kind}: {error}"
        places.append(f"{host}:{port}")
    return "ok", ", ".join(dict.fromkeys(places))


CHECKS: dict[str, Callable[[Here], Finding]] = {check.__name__.replace("_", " "): check for check in (
    machine, versions, free_disk, write_speed, file_locks, attention, flash_attention, bfloat16_step,
    captured_generation, all_reduce, cpus_and_gpus, deepspeed, store, job_server, web,
)}  # fmt: skip
"""Name: the check."""


def examine(name: str, here: Here) -> Finding:
    """What a check found; what it raised is a failure."""
    try:
        return CHECKS[name](here)
    except Exception as error:  # whatever a machine that does not work raises
        return "failed", f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"

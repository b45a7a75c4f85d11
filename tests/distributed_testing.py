"""Run a function as the ranks of a process group on one machine.

In: a function that a new process can import, and its arguments. Out: what each rank returned. The
ranks are new processes (nothing of the caller's state is inherited) of `forks`, one torch thread each,
joined by gloo through a file, so no port can be taken. A rank that fails or waits too long ends all of
them and its error is raised here.
"""

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import SERVER
from torch.multiprocessing.spawn import start_processes

TIMEOUT_SECONDS = 120
"""How long a rank waits for the others before it fails."""


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` gloo processes; their results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        method = SERVER.get_start_method()
        start_processes(_rank, (world_size, folder, function, args), nprocs=world_size, start_method=method)
        return [torch.load(_result(folder, rank), weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    try:
        torch.save(function(rank, world_size, *args), _result(folder, rank))
    finally:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"

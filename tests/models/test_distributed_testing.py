"""Functions run as ranks: results by rank, errors of any rank. Kept apart so that ranks import little."""

import pytest
import torch
import torch.distributed as dist
from distributed_testing import run_distributed

pytestmark = pytest.mark.slow  # every rank is a process that imports torch


def summed(rank: int, world_size: int, offset: int) -> int:
    value = torch.tensor(rank + offset)
    dist.all_reduce(value)
    return int(value) * 10 + rank


def failing(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one says no")


def test_results_come_back_by_rank():
    assert run_distributed(summed, 2, 5) == [110, 111]


def test_the_error_of_a_rank_is_raised():
    with pytest.raises(Exception, match="rank one says no"):
        run_distributed(failing, 2)

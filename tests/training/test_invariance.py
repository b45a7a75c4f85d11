"""The gradient of a step depends on its documents alone: not on ranks, accumulation, packing or sharding.

Eight packed microbatches on one rank, four each on two, two each on four.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed_testing import run_distributed

from unifork.batch import assign_rows_to_workers, pack
from unifork.config import OptimizerConfig
from unifork.errors import ConfigError
from unifork.models import losses
from unifork.training import strategies
from unifork.training.loop import TrackRun, WorkerContext
from unifork.training.optimizer import make_optimizer
from unifork.training.strategies import strategy

sys.path.insert(0, str(Path(__file__).parent.parent / "models"))
from model_samples import DEPTH, generation, gradients, largest_difference, noisy_model, understanding

pytestmark = pytest.mark.slow

PLAN = "shared*2 task*2 norm:task"
DOCUMENTS = [understanding(n, answer=3 + n % 5) for n in range(7)] + [generation(n, 2 + n % 4) for n in range(9)]
PACKED = [[2 * row, 2 * row + 1] for row in range(8)]
ONE_BY_ONE = [[number] for number in range(len(DOCUMENTS))]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}


class Loader:
    """The documents of one step in given rows."""

    identity = SimpleNamespace(depth=DEPTH)

    def __init__(self, rows):
        self.rows = rows

    def batches(self, plan, rank):
        for microbatch in assign_rows_to_workers(self.rows, plan.workers, 1)[rank]:
            yield pack([[DOCUMENTS[number] for number in row] for row in microbatch], 48, DEPTH)


def whole_gradients(model, name, sharing):
    if not name.startswith("deepspeed"):
        return {key: g.full_tensor() if hasattr(g, "full_tensor") else g for key, g in gradients(model).items()}
    from deepspeed.utils import safe_get_full_optimizer_state

    sharing.update({}, 1e9)
    keep = 1 - sharing.joint.param_groups[0]["betas"][0]  # of the first gradient in the first moment
    return {key: safe_get_full_optimizer_state(p, "exp_avg") / keep for key, p in model.named_parameters()}


def step(rank, workers, name, rows, dtype, chunk=losses.CHUNK_LOGITS, precision="float32"):
    """Loss sums and whole gradients of one step, by the loop's own rule."""
    losses.CHUNK_LOGITS = chunk
    model = noisy_model(PLAN).to(dtype).train()
    sharing = strategy(name, workers, precision == "bfloat16", node_workers=2)
    wrapped = sharing.wrap(model)
    constant = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=0)
    sharing.start({"all": (make_optimizer(constant, model.parameters()), dict(model.named_parameters()))})
    sharing.turn("all")
    plan = SimpleNamespace(
        workers=workers,
        text_targets=sum(int(document.loss_mask_T.sum()) for document in DOCUMENTS),
        image_targets=sum(len(document.codes_ND) for document in DOCUMENTS if document.task == "generation"),
    )
    track = SimpleNamespace(loader=Loader(rows), strategy=sharing, track=SimpleNamespace(precision=precision))
    batches = list(Loader(rows).batches(plan, rank))
    sums_1D = TrackRun._accumulate(track, wrapped, plan, batches, WorkerContext(rank, workers))
    return sums_1D, whole_gradients(model, name, sharing)


SMALL = 100
"""Logits at a time that make the losses of every step chunked: one row of 97 words, four of 23 codes."""
CASES = [
    ("none", PACKED, torch.float64),
    ("none", PACKED, torch.float32),
    ("none", ONE_BY_ONE, torch.float64),
    ("none", PACKED, torch.float64, SMALL),
    ("all", PACKED, torch.float64),
    ("all", PACKED, torch.float32),
    ("all", ONE_BY_ONE, torch.float64),
    ("all", PACKED, torch.float64, SMALL),
    ("node", PACKED, torch.float64),  # of four ranks two replicas of two shards
    ("deepspeed-1", PACKED, torch.float32),  # float32 is all it has
    ("deepspeed-2", ONE_BY_ONE, torch.float32),
    ("deepspeed-3", PACKED, torch.float32),
]


def _rank(rank, workers):
    """All cases in one process group."""
    found = [step(rank, workers, *case) for case in CASES]
    return found if rank == 0 else None


@pytest.fixture(scope="module")
def reference():
    """One worker, eight packed microbatches."""
    torch.set_num_threads(1)
    return {dtype: step(0, 1, "none", PACKED, dtype) for dtype in TOLERANCES}


def assert_same(found, wanted, dtype):
    assert torch.allclose(found[0], wanted[0], rtol=TOLERANCES[dtype])
    difference, name = largest_difference(found[1], wanted[1])
    assert difference <= TOLERANCES[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_documents_one_by_one_or_all_in_one_row(reference, dtype):
    assert_same(step(0, 1, "none", ONE_BY_ONE, dtype), reference[dtype], dtype)


@pytest.fixture(scope="module")
def shared():
    return {workers: run_distributed(_rank, workers)[0] for workers in (2, 4)}


@pytest.mark.parametrize("workers", [2, 4])
def test_ranks_and_accumulation_under_every_strategy(reference, shared, workers):
    for case, found in zip(CASES, shared[workers], strict=True):
        assert_same(found, reference[case[2]], case[2])


REDUCTIONS = [name for name in dir(dist) if name.startswith(("all_reduce", "reduce_scatter"))]


def _bfloat16(rank, workers):
    """A step under each way to shard, with how often something was reduced."""
    found, calls = {}, []
    for name in REDUCTIONS:
        call = getattr(dist, name)
        setattr(dist, name, lambda *args, call=call, **kwargs: calls.append(call.__name__) or call(*args, **kwargs))
    for shard in ("none", "all"):
        calls.clear()
        sums_1D, grads = step(rank, workers, shard, PACKED, torch.float32, precision="bfloat16")
        found[shard] = sums_1D, grads, len(calls)
    return found


@pytest.fixture(scope="module")
def in_bfloat16():
    return {workers: run_distributed(_bfloat16, workers)[0] for workers in (1, 2)}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("shard", ["none", "all"])
def test_bfloat16_keeps_float32_gradients_near_those_of_float32(reference, in_bfloat16, workers, shard):
    sums_1D, found, _ = in_bfloat16[workers][shard]
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert torch.allclose(sums_1D, reference[torch.float32][0], rtol=2e-2)
    assert not torch.allclose(sums_1D, reference[torch.float32][0], rtol=1e-6)
    difference, name = largest_difference(found, reference[torch.float32][1])
    assert difference < 0.2, name


def test_nothing_is_reduced_before_the_last_microbatch(in_bfloat16):
    """Four microbatches a worker: one reduction for each of four layers, two blocks of the head and the rest."""
    with_that_of_the_losses = 7 + 1
    assert [in_bfloat16[2][shard][2] for shard in ("none", "all")] == [with_that_of_the_losses] * 2
    assert in_bfloat16[1]["none"][2] == 1


def test_nodes_with_different_numbers_of_workers_cannot_hold_a_replica_each(monkeypatch):
    monkeypatch.setattr(strategies, "gathered", lambda own: [3, 3, 3, 1])
    with pytest.raises(ConfigError, match="shard is node, but nodes have 1 to 3 of the 4 workers"):
        strategy("node", 4, node_workers=3)


def test_a_wrong_rule_is_found(reference):
    """The mean of the microbatches' means is another gradient."""
    model = noisy_model(PLAN).double().train()
    for row in PACKED:
        out = model(pack([[DOCUMENTS[n] for n in row]], 48, DEPTH))
        words = sum(int(DOCUMENTS[n].loss_mask_T.sum()) for n in row)
        codes = sum(DOCUMENTS[n].codes_ND.size for n in row if DOCUMENTS[n].task == "generation")
        (out.text_loss_sum / max(words, 1) / 8 + out.image_loss_sum_D.sum() / max(codes, 1) / 8).backward()
    difference, _ = largest_difference(gradients(model), reference[torch.float64][1])
    assert difference > 0.1

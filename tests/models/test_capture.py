"""A position of an image can be captured and replayed: it waits for nothing and always does the same."""

import pytest
import torch
from model_samples import PLANS, noisy_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unifork.config import Sampling
from unifork.models import generation as decoding
from unifork.models.generation import generate_images

PROMPTS, UNCONDITIONAL = [[3, 1, 4, 1, 5], [9, 2]], [8, 9, 7, 9]
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item", "unique")
"""Operations whose result or shape the host has to wait for."""


class Trace(TorchDispatchMode):
    """Every operation: name, shapes and other arguments; kernels; the memory of before that is written to."""

    def __init__(self):
        super().__init__()
        self.operations, self.written, self.kernels, self._passing = [], [], 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in READS or (name == "index" and any(leaf.dtype == torch.bool for leaf in tensors(args[1]))):
            raise AssertionError(f"{name} waits for the device")
        given = [(tuple(leaf.shape), leaf.stride()) if isinstance(leaf, torch.Tensor) else leaf for leaf in
                 tree_leaves((args, kwargs))]  # fmt: skip
        self.operations.append((str(func), given))
        self.kernels += not func.is_view
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((value.untyped_storage().data_ptr(), value.storage_offset()))
        self.written = [place for place in self.written if place[0] not in self._passing]
        before = {leaf.untyped_storage().data_ptr() for leaf in tensors((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        self._passing |= {leaf.untyped_storage().data_ptr() for leaf in tensors(found)} - before
        return found


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def traces(plan, monkeypatch, capture, **options) -> list[Trace]:
    """One trace for each position after the first."""
    found: list[Trace] = []

    def repeat(act, times, captured):
        assert captured == capture
        for _ in range(times):
            found.append(Trace())
            with found[-1]:
                act()

    monkeypatch.setattr(decoding, "_repeat", repeat)
    found_codes = generate_images(noisy_model(plan), PROMPTS, UNCONDITIONAL, Sampling(**options), capture=capture)
    monkeypatch.undo()
    wanted = generate_images(noisy_model(plan), PROMPTS, UNCONDITIONAL, Sampling(**options))
    assert torch.equal(found_codes, wanted)
    return found


@pytest.mark.parametrize("options", [{"seed": 3}, {"top_k": 1, "guidance": 1.0}, {"temperature": 0.8, "top_k": 5}])
@pytest.mark.parametrize("plan", PLANS)
def test_every_position_does_the_same_to_the_same_memory_and_waits_for_nothing(plan, options, monkeypatch):
    first, *others = traces(plan, monkeypatch, True, **options)
    assert len(others) == 7
    assert len(first.written) > 10
    for other in others:
        assert other.operations == first.operations
        assert other.written == first.written


def test_a_read_of_the_host_would_be_found():
    with pytest.raises(AssertionError, match="_local_scalar_dense waits"), Trace():
        bool(torch.ones(1).sum() > 0)
    with pytest.raises(AssertionError, match="index waits"), Trace():
        torch.ones(3)[torch.tensor([True, False, True])]


@pytest.mark.parametrize("plan", PLANS[1:])
def test_no_plan_takes_more_kernels_a_position_than_the_shared_layers(plan, monkeypatch):
    shared, found = (traces(name, monkeypatch, False, seed=3) for name in ("shared", plan))
    assert [trace.kernels for trace in found] == [trace.kernels for trace in shared]


def test_without_capture_nothing_waits_for_the_device_either(monkeypatch):
    found = traces(PLANS[1], monkeypatch, False, seed=3)
    assert len({trace.kernels for trace in found}) == 1

"""Kernels and bytes of one microbatch, counted without computing it: forward and backward on fake tensors.

`python benchmarks/training_bytes.py` counts what is dispatched for 22 documents in one row of 16,384 tokens at the
paper's size: every operator that is no view, and the bytes that it reads and writes, apart from matrix products and
attention. It runs on any machine; no number depends on it. Attention is one call a layer, as torch's variable-length
kernel does it, and a fused RMSNorm is the kernels of a CUDA device (one forward, two backward), since a CPU has none.
Shape suffixes: X tokens, A heads, E head size, H hidden size.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from math import prod
from unittest import mock

import torch
import torch.nn.functional as F
from timing import table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_step import DEPTH, SIZES, Size, make_documents, make_variant, packed

from unifork.models import masks
from unifork.models.masks import VARLEN
from unifork.models.modeling import UniForkModel
from unifork.models.warm_start import model_config

NOT_COUNTED = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "device", "_unsafe_view"}
"""Operators that move nothing."""
SDPA = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addmm_", SDPA, f"{SDPA}_backward"}
LOOK_UPS = {"index_select", "index", "embedding", "gather"}
"""Read as much of their table as they return."""
ADD_INTO = {"scatter_add_", "index_add_", "scatter_", "index_copy_", "index_put_", "_index_put_impl_"}
"""Change as much of their target as they are given."""
FILLS = {"zero_", "fill_", "copy_"}
"""Do not read what they write."""


def size_of(tensor: Tensor) -> int:
    """Bytes of a tensor, each place that is repeated by a stride of zero once."""
    distinct = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return prod(distinct) * tensor.element_size() if tensor.numel() else 0


class Traffic(TorchDispatchMode):
    """Counts kernels and bytes by operator while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.partition("::")[2]
        view = any(out.alias_info and not out.alias_info.is_write for out in function._schema.returns)
        if not (self.paused or view or name in NOT_COUNTED):
            self.kernels[name] += 1
            if name not in PRODUCTS:
                self.bytes[name] += traffic(name, args, result)
        return result

    def add(self, name: str, kernels: int, tensors: Iterable[Tensor]) -> None:
        """Kernels that others stand in for, by all that they read and write."""
        self.kernels[name] += kernels
        self.bytes[name] += sum(map(size_of, tensors))

    @contextmanager
    def pause(self):
        """Count nothing: what runs stands in for something else."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def traffic(name: str, args, result) -> int:
    """Bytes that an operator reads and writes."""
    read = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    if name in LOOK_UPS:
        return sum(map(size_of, [*read[1:], *written, *written]))
    if name in ADD_INTO:
        return sum(map(size_of, read[1:])) + 2 * size_of(read[-1])
    return sum(map(size_of, [*read[name in FILLS :], *written]))


class Norm(torch.autograd.Function):
    """A CUDA device's RMSNorm, which a CPU takes apart."""

    @staticmethod
    def forward(ctx, x_XH, weight_H, count):
        ctx.save_for_backward(x_XH, weight_H)
        ctx.count = count
        count.add("rms_norm", 1, (x_XH, weight_H, x_XH))
        with count.pause():
            return torch.empty_like(x_XH)

    @staticmethod
    def backward(ctx, grad_XH):
        x_XH, weight_H = ctx.saved_tensors
        ctx.count.add("rms_norm backward", 2, (grad_XH, x_XH, weight_H, x_XH, grad_XH, x_XH, weight_H))
        with ctx.count.pause():
            return torch.empty_like(x_XH), torch.empty_like(weight_H), None


class Attention(torch.autograd.Function):
    """The variable-length kernel: nothing of it but its call is counted."""

    @staticmethod
    def forward(ctx, query, key, value, count):
        ctx.save_for_backward(query, key, value)
        ctx.count = count
        count.add("attention", 1, ())
        with count.pause():
            return torch.empty_like(query)

    @staticmethod
    def backward(ctx, _):
        ctx.count.add("attention backward", 1, ())
        with ctx.count.pause():
            return *map(torch.empty_like, ctx.saved_tensors), None


def microbatch(size: Size, documents: int, row_tokens: int, bfloat16: str, plan: str | None = None) -> Traffic:
    """What a forward and a backward pass of a fresh model dispatch, of UniFork's without another plan.

    bfloat16: `none`, `autocast`, or `parameters`, which is what a bfloat16 stage has (its codebook is float32).
    """
    codes = {"codebook_size": size.codes, "code_channels": size.channels, "depth": DEPTH, "grid": size.grid}
    config = model_config(make_variant(size, plan), size.words, **codes)
    (batch, *_) = packed(make_documents(size, documents), row_tokens)
    count = Traffic()

    def norm(x_XH, _shape, weight_H, _eps):
        return Norm.apply(x_XH, weight_H, count)

    def attention(query, key, value, *_, **__):
        return Attention.apply(query, key, value, count)

    with ExitStack() as stack:
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = UniForkModel(config).train()
        model.set_attn_implementation(VARLEN)
        if bfloat16 == "parameters":
            for parameter in model.parameters():
                parameter.data = parameter.data.bfloat16()
        moved = {name: fake.from_tensor(value) for name, value in vars(batch).items() if isinstance(value, Tensor)}
        vars(batch).update(moved)
        stack.enter_context(mock.patch.object(F, "rms_norm", norm))
        stack.enter_context(mock.patch.object(masks, "one_by_one", attention))
        cast = torch.autocast("cpu", torch.bfloat16) if bfloat16 == "autocast" else nullcontext()
        with count:
            with cast:
                losses = model(batch)
            (losses.text_loss_sum + losses.image_loss_sum_D.sum()).backward()
    return count


RUNGS = {"float32": "none", "bfloat16 products (autocast)": "autocast", "bfloat16 parameters": "parameters"}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--row-tokens", type=int, default=16_384)
    parser.add_argument("--documents", type=int, default=22)
    parser.add_argument("--plan", help="another layer plan, such as mot or uni-x:6:6")
    parser.add_argument("--operators", type=int, default=16, help="how many of the largest operators to list")
    given = parser.parse_args()
    counts = {
        name: microbatch(SIZES[given.size], given.documents, given.row_tokens, way, given.plan)
        for name, way in RUNGS.items()
    }
    print(table(["microbatch", "kernels", "GB beside products and attention"], [
        [name, f"{count.kernels.total():,}", f"{count.bytes.total() / 1e9:,.1f}"] for name, count in counts.items()
    ]))  # fmt: skip
    for name, count in counts.items():
        print(f"\n{name}\n")
        print(table(["operator", "kernels", "GB"], [
            [operator, count.kernels[operator], f"{number / 1e9:,.2f}"]
            for operator, number in count.bytes.most_common(given.operators)
        ]))  # fmt: skip


if __name__ == "__main__":
    main()

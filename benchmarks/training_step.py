"""One optimizer step, ours against the parity path, and what each difference is worth.

`python benchmarks/training_step.py --size small` prints how fast a step is, then a ladder that
begins with the parity path and takes one step at a time towards ours. The parity path is what
reproduces the official loss: one document a row, padded to the longest of its task; the image head
with the published outer maps; a mask over the square of the row; one forward per task; the logits of
every token of the understanding rows and of all image positions whole and in float32. All rungs
compute the same function on the same documents and end with clipping and AdamW. They are timed in
turns in this process.

Documents: half generation, with captions of 15 to 89 tokens, half understanding, with 40 to 499
tokens of dialogue of which the last 60 % are supervised, all beside one image of 576 positions x 4
codes (36 for `tiny`); uniformly drawn, an outline of the paper's mix within its context of 1350.

What a rung can be worth at most where both ways multiply equally fast is the ratio of their products,
which is printed beside it. `small` has the proportions of `0.5b` (a head that costs 1.5 times the
decoder per position, tied words 0.4 times), so both have nearly the same bound.

Shape suffixes: B rows, T tokens, X = B*T, M image positions, D code depth, K codes, V words, H hidden size.
"""

import argparse
import copy
import resource
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from timing import alternate, interval, machine, ratio, table
from torch import Tensor, nn
from torch._dynamo.utils import counters

from unifork import batch as packing_of  # of an older tree, too, which has no `pack_step` there (decoding.py)
from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Batch, Document, pack
from unifork.config import HeadConfig, OptimizerConfig, Variant
from unifork.models.masks import VARLEN
from unifork.models.modeling import UniForkModel
from unifork.models.warm_start import create_model
from unifork.training.optimizer import make_optimizer
from unifork.vocabulary import TASKS

DEPTH = 4


@dataclass(frozen=True)
class Size:
    """A model, and how many documents a step has unless told otherwise."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    words: int
    codes: int
    channels: int
    grid: int
    head: HeadConfig
    documents: int


SIZES = {
    "tiny": Size(64, 4, 4, 2, 192, 800, 256, 64, 6, HeadConfig(layers=2, heads=8, head_dim=32), 8),
    "small": Size(128, 8, 2, 1, 704, 7168, 768, 128, 24, HeadConfig(layers=2, heads=4, head_dim=128), 12),
    "0.5b": Size(896, 24, 14, 2, 4864, 151_936, 16_384, 1024, 24, HeadConfig(layers=6, heads=32, head_dim=112), 48),
}
"""The heads are four times as wide as the hidden size, like the published one; `0.5b` is the paper's model, `small`
a third of its depth at a seventh of its width."""

COMPILED = "position-wise parts compiled"
RUNGS = {
    "parity path": (True, True),
    "folded head": (True, True),
    "packed rows, attention by document": (False, True),
    "fused loss": (False, False),
    "single forward (ours)": (False, False),
    COMPILED: (False, False),
}
"""What each rung multiplies beyond its model: whether rows are padded, text logits whole."""


def make_variant(size: Size, plan: str | None = None) -> Variant:
    """A model of a plan; without one UniFork's, half of the layers shared, half twice."""
    backbone = {
        "model_type": "qwen2", "hidden_size": size.hidden, "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    half = size.layers // 2
    plan = plan or f"shared*{half} task*{size.layers - half} norm:task"
    return Variant(plan=plan, backbone=backbone, head=size.head, stages=(), seed=0)


def make_model(size: Size, device: str, plan: str | None = None) -> UniForkModel:
    """A fresh model of a plan."""
    codebook = torch.randn(size.codes, size.channels, generator=torch.Generator().manual_seed(0))
    model = create_model(make_variant(size, plan), codebook, DEPTH, size.grid, "benchmark", size.words).train()
    model.to(torch.device(device))  # type: ignore[arg-type]
    model.set_attn_implementation(VARLEN)
    return model


def make_documents(size: Size, count: int) -> list[Document]:
    """The length mix of the module's first lines, the two tasks in turns."""
    rng = np.random.default_rng(0)
    P, documents = size.grid**2, []
    for number in range(count):
        task = TASKS[number % 2]
        text = int(rng.integers(15, 90) if task == "generation" else rng.integers(40, 500))
        image = [BEGIN_IMAGE] + [IMAGE] * P + [END_IMAGE]
        kinds = [TEXT] * text + image if task == "generation" else [TEXT] * 4 + image + [TEXT] * (text - 4)
        kinds_T = np.array(kinds, np.int64)
        ids_T = np.where(kinds_T == TEXT, rng.integers(0, size.words, len(kinds_T)), 0)
        loss_mask_T = np.zeros(len(kinds_T), bool)
        if task == "understanding":
            loss_mask_T[-int(0.6 * text) :] = True
        codes_ND = rng.integers(0, size.codes, (P, DEPTH))
        documents.append(Document(str(number), task, kinds_T, ids_T, loss_mask_T, codes_ND))
    return documents


def packed(documents: list[Document], row_tokens: int) -> list[Batch]:
    """Rows of whole documents, one row a microbatch."""
    packing = packing_of.pack_step([len(doc) for doc in documents], [doc.task for doc in documents], row_tokens)
    return [pack([[documents[number] for number in row]], packing.row_tokens, DEPTH) for row in packing.rows]


def padded(documents: list[Document]) -> list[Batch]:
    """One document a row, one batch per task, padded to its longest row."""
    per_task = [[document for document in documents if document.task == task] for task in TASKS]
    return [pack([[document] for document in some], max(map(len, some)), DEPTH) for some in per_task if some]


def whole_logits(model: UniForkModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Both losses from logits that exist whole, in float32; those of text at every token of a row that learns any."""
    hidden_BTH = model.hidden(batch)
    B, T, _ = hidden_BTH.shape
    source_MH = hidden_BTH.flatten(0, 1).index_select(0, batch.image_source_M)
    logits_MDK = model.image_head(source_MH, batch.image_target_MD, model.codebook).float()
    image_loss = F.cross_entropy(logits_MDK.flatten(0, 1), batch.image_target_MD.flatten(), reduction="sum")
    if not len(batch.text_target_S):
        return model.text_logits(hidden_BTH[:, :0]).sum().float(), image_loss
    labels_X = batch.text_ids_BT.new_full((B * T,), -100).index_copy(0, batch.text_source_S, batch.text_target_S)
    logits_XV = model.text_logits(hidden_BTH).float().flatten(0, 1)
    return F.cross_entropy(logits_XV, labels_X, ignore_index=-100, reduction="sum"), image_loss


def fused(model: UniForkModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Both losses as the model computes them."""
    found = model(batch)
    return found.text_loss_sum, found.image_loss_sum_D.sum()


class Step:
    """One way to do a step: its model, its batches, its loss."""

    def __init__(
        self,
        model: UniForkModel,
        batches: list[Batch],
        loss: Callable[[UniForkModel, Batch], tuple[Tensor, Tensor]],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.loss, self.dtype = model, loss, dtype
        self.device = model.codebook.device
        self.batches = [batch.to(self.device) for batch in batches]
        self.words = sum(len(batch.text_target_S) for batch in batches)
        self.codes = sum(batch.image_target_MD.numel() for batch in batches)
        config = OptimizerConfig(learning_rate=1e-6, schedule="constant", warmup_steps=0)
        self.optimizer = make_optimizer(config, model.parameters())
        self.value = torch.zeros(())

    def __call__(self) -> None:
        """Forward, backward, clip, update."""
        total = []
        for batch in self.batches:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                text, image = self.loss(self.model, batch)
            value = text / self.words + image / self.codes
            value.backward()
            total.append(value.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        self.value = torch.stack(total).sum()


def products(model: UniForkModel, documents: list[Document], padded: bool, whole: bool) -> float:
    """FLOPs of a step that learns everything, as `unifork plan` counts them.

    padded: every document is as long as the longest of its task and multiplies the square of its mask
    instead of the causal half. whole: every token of understanding meets the words, not the supervised ones.
    """
    from unifork.training.flops import Length, document_flops  # not in every tree that `decoding.py` compares with

    trained = {name for name, _ in model.named_parameters()}
    longest = {doc.task: max(len(other) for other in documents if other.task == doc.task) for doc in documents}
    dense, total = model.config.backbone_config(), 0.0
    with torch.device("meta"):
        outline = UniForkModel(model.config)
    for document in documents:
        T, image = longest[document.task] if padded else len(document), int((document.kinds_T != TEXT).sum())
        supervised = T if whole and document.task == "understanding" else int(document.loss_mask_T.sum())
        positions = len(document.codes_ND) * (document.task == "generation")
        total += document_flops(outline, document.task, Length(T - image, image, supervised, positions), trained)
        if padded:
            total += 3 * dense.num_hidden_layers * 2 * dense.hidden_size * T * (T - 1)
    return total


def ladder(ours: UniForkModel, documents: list[Document], row_tokens: int, dtype: torch.dtype) -> dict[str, Step]:
    """The rungs below ours, from the parity path up."""
    masked = copy.deepcopy(ours)
    masked.set_attn_implementation("sdpa")
    unfolded = copy.deepcopy(masked)
    unfolded.image_head.set_form(folded=False)
    per_task = [[document for document in documents if document.task == task] for task in TASKS]
    rows = [batch for some in per_task for batch in packed(some, row_tokens)]
    return {
        "parity path": Step(unfolded, padded(documents), whole_logits, dtype),
        "folded head": Step(masked, padded(documents), whole_logits, dtype),
        "packed rows, attention by document": Step(copy.deepcopy(ours), rows, whole_logits, dtype),
        "fused loss": Step(copy.deepcopy(ours), rows, fused, dtype),
    }


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--row-tokens", type=int, default=1350)
    parser.add_argument("--documents", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="autocast; weights float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--activation-checkpointing", nargs="*", default=[], help="kinds of layers, and head")
    parser.add_argument("--compile", action="store_true", help="one more rung, with torch.compile")
    parser.add_argument("--ours-only", action="store_true", help="no ladder: the peak memory is then that of our step")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size, dtype, device = SIZES[given.size], getattr(torch, given.dtype), given.device
    documents = make_documents(size, given.documents or size.documents)
    ours = make_model(size, device)
    ours.set_activation_checkpointing(given.activation_checkpointing)
    rows = packed(documents, given.row_tokens)
    ways = {"single forward (ours)": Step(ours, rows, fused, dtype)}
    if not given.ours_only:
        ways = {**ladder(ours, documents, given.row_tokens, dtype), **ways}
    if given.compile:
        compiled = copy.deepcopy(ours)
        compiled.compile_parts()
        ways[COMPILED] = Step(compiled, rows, fused, dtype)
    seconds = alternate(ways, given.pairs, device)
    tokens, useful = sum(map(len, documents)), products(ours, documents, *RUNGS["single forward (ours)"])
    step, targets = (
        interval(seconds["single forward (ours)"]),
        sum(int(doc.loss_mask_T.sum()) + doc.codes_ND.size * (doc.task == "generation") for doc in documents),
    )
    from unifork.training.flops import peak_flops

    peak = None if device == "cpu" else peak_flops(torch.cuda.get_device_name())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    memory = memory if device == "cpu" else torch.cuda.max_memory_allocated()
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{machine(device)}; {given.dtype}; size {given.size}, {count / 1e6:.1f} M parameters, row_tokens "
          f"{given.row_tokens}, {len(documents)} documents of {tokens} tokens, fill "
          f"{tokens / sum(batch.kinds_BT.numel() for batch in rows):.2f}, {given.pairs} pairs\n")  # fmt: skip
    print(table(["our step", "value"], [
        ["seconds (median, 95 % interval)", step],
        ["useful supervised targets a second", f"{targets / step.median:,.0f}"],
        ["tokens a second", f"{tokens / step.median:,.0f}"],
        ["TFLOPs by formula", f"{useful / 1e12:.3f}"],
        ["TFLOP/s", f"{useful / step.median / 1e12:.3f}"],
        ["MFU", f"{useful / step.median / peak:.1%}" if peak else "unknown"],
        ["peak memory of the process, GiB", f"{memory / 2**30:.2f}"],
    ]))  # fmt: skip
    if given.ours_only:
        return
    names = list(ways)
    multiplied = {name: products(way.model, documents, *RUNGS[name]) for name, way in ways.items()}
    print()
    print(table(["rung", "seconds", "times faster than the rung before", "than the parity path", "by products"], [
        [name, f"{interval(seconds[name]).median:.2f}",
         ratio(seconds[before], seconds[name]) if before else "", ratio(seconds[names[0]], seconds[name]),
         f"{multiplied[names[0]] / multiplied[name]:.2f}"]
        for before, name in zip([None, *names], names, strict=False)
    ]))  # fmt: skip
    losses = {name: f"{float(way.value):.5f}" for name, way in ways.items()}
    print(f"\nlosses of the last step: {losses}")
    if given.compile:
        graphs = counters["stats"]["unique_graphs"]
        Step(compiled, packed(documents[2:], given.row_tokens), fused, dtype)()
        print(
            f"compiled graphs: {graphs}, {counters['stats']['unique_graphs'] - graphs} more for a step of other lengths"
        )


if __name__ == "__main__":
    main()

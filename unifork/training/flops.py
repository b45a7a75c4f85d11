"""FLOPs of documents, and the share of a chip's peak that training reaches.

In: a model, a track's documents. Out: plain numbers.

FLOPs are counted by torch while the model's own code runs on one average document of each mixture
entry, forward and backward, with the parameters of the track trained and all others frozen: every
matrix product at two FLOPs per multiplication, the vocabulary at supervised text tokens alone, the
image head with all its depths at supervised positions. Of attention the causal half of the square
counts. Embeddings, norms and whatever is element by element are not counted; padding and recomputed
activations are not either, they lower the utilization.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Document, pack
from unifork.config import Lora
from unifork.documents.loader import TrackLoader
from unifork.models.masks import VARLEN
from unifork.models.modeling import UniForkModel
from unifork.training.optimizer import add_adapters, freeze_all_but
from unifork.vocabulary import Task

PEAK_TFLOPS: dict[str, float] = yaml.safe_load((Path(__file__).parents[1] / "chips.yaml").read_text())
"""Dense bfloat16 peak of a chip in TFLOP/s."""
BORDER_TOKENS = 2
"""Begin and end of an image."""
SAMPLE = 32
"""Documents of a track's first step that its FLOPs are counted on."""


@dataclass(frozen=True)
class Length:
    """Tokens of an average document of a mixture entry."""

    text: int
    image: int
    supervised_text: int
    supervised_positions: int


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a device by the name its driver gives, as `NVIDIA H100 PCIe`; None for one that is not listed."""
    plain = re.sub("[^a-z0-9]", "", device_name.lower())
    fitting = [chip for chip in PEAK_TFLOPS if chip.replace("-", "") in plain]
    return PEAK_TFLOPS[max(fitting, key=len)] * 1e12 if fitting else None


def flops_per_token(model: UniForkModel, loader: TrackLoader, trained: Iterable[str], lora: Lora | None) -> float:
    """FLOPs of a track's documents, forward and backward, by their tokens: of the first ones of its first step."""
    with torch.device("meta"):
        outline = UniForkModel(model.config)
    add_adapters(outline, lora, seed=0)
    plan = loader.plan(0, 1)
    documents = [loader.document(plan, number) for number in range(min(SAMPLE, len(plan.slots)))]
    return _flops(outline, documents, trained) / sum(map(len, documents))


def document_flops(model: UniForkModel, task: Task, length: Length, trained: Iterable[str]) -> float:
    """FLOPs of one document of a task, forward and backward. The model is on the meta device, and stays so trained."""
    return _flops(model, [_document(task, length, model.config.depth)], trained)


def _flops(model: UniForkModel, documents: list[Document], trained: Iterable[str]) -> float:
    freeze_all_but(model, chosen := set(trained))
    model.set_attn_implementation(VARLEN)  # each document, in isolated layers each modality, by itself
    batch = pack([documents], sum(map(len, documents)), model.config.depth).to("meta")
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: _causal_flops}) as counter:
        hidden_XH = model.hidden(batch).flatten(0, 1)
        # logits whole, which cost nothing here: the losses make them in chunks, again in the backward pass
        text_SV = model.text_logits(hidden_XH[batch.text_source_S])
        image_MDK = model.image_head(hidden_XH[batch.image_source_M], batch.image_target_MD, model.codebook)
        if chosen:
            (text_SV.sum() + image_MDK.sum()).backward()
    return float(counter.get_total_flops())


def _causal_flops(left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    """The batched products are attention's, a square of which only the causal half is needed."""
    batch, rows, inner = left
    return batch * rows * inner * right[-1]


def _document(task: Task, length: Length, depth: int) -> Document:
    positions, text = max(length.image - BORDER_TOKENS, 0), [TEXT] * length.text
    image = [BEGIN_IMAGE, *[IMAGE] * positions, END_IMAGE] if length.image else []
    kinds_T = np.array(text + image if task == "generation" else image + text)
    loss_mask_T = np.arange(len(kinds_T)) >= len(kinds_T) - length.supervised_text
    codes_ND = np.zeros((positions, depth), np.int64)
    return Document("", task, kinds_T, np.zeros_like(kinds_T), loss_mask_T, codes_ND, length.supervised_positions)

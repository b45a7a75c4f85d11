"""Small models and documents for the tests of `unifork.models`."""

import functools

import numpy as np
import torch
import transformers

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT, Batch, Document, pack
from unifork.config import HeadConfig, Variant
from unifork.models.modeling import UniForkModel
from unifork.models.warm_start import create_model, warm_start

VOCAB, DEPTH, GRID, CODES, CHANNELS = 97, 3, 3, 23, 8
BACKBONES = {
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,
    },
}
JOINT = ["shared", "unifork:2", "unifork:0", "mot", "hard-moe"]
"""Presets in which all tokens of a document see each other; the experts are the shared plan."""
PLANS = [*JOINT, "uni-x:1:1", "task_mlp*2 modality_isolated*2 norm:task"]


def codebook() -> torch.Tensor:
    return torch.randn(CODES, CHANNELS, generator=torch.Generator().manual_seed(5))


def new_model(plan: str, family: str = "qwen2", seed: int = 0, folded: bool = True, **first: float) -> UniForkModel:
    head = HeadConfig(layers=2, heads=2, head_dim=20, folded=folded)
    variant = Variant(plan=plan, backbone=BACKBONES[family], head=head, stages=(), seed=seed, **first)
    return create_model(variant, codebook(), DEPTH, GRID, "encoder", VOCAB)


def noisy_model(plan: str, family: str = "qwen2", seed: int = 0, folded: bool = True) -> UniForkModel:
    """A model in which every tensor matters and no two branches are alike."""
    model = new_model(plan, family, folded=folded)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = parameter.shape[1] ** -0.5 if parameter.dim() > 1 else 0.2
            shift = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.cache
def dense_model(family: str) -> transformers.PreTrainedModel:
    """A dense causal language model with noise in every weight."""
    values = dict(BACKBONES[family], vocab_size=VOCAB)
    config = transformers.CONFIG_MAPPING[values.pop("model_type")](**values)
    dense = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            shift = 1.0 if "norm" in name else 0.0
            parameter.copy_(shift + 0.2 * torch.randn(parameter.shape, generator=generator))
    return dense


def warm_model(plan: str, family: str) -> UniForkModel:
    model = new_model(plan, family)
    warm_start(model, dense_model(family).state_dict())
    return model.eval()


def understanding(seed: int, before: int = 2, answer: int = 4) -> Document:
    """Text, an image, text of which the last tokens are supervised."""
    rng = np.random.default_rng(seed)
    P = GRID * GRID
    kinds = np.array([TEXT] * before + [BEGIN_IMAGE] + [IMAGE] * P + [END_IMAGE] + [TEXT] * (answer + 2))
    ids = np.where(kinds == TEXT, rng.integers(0, VOCAB, len(kinds)), 0)
    supervised = np.arange(len(kinds)) >= len(kinds) - answer
    return Document(f"und{seed}", "understanding", kinds, ids, supervised, rng.integers(0, CODES, (P, DEPTH)))


def generation(seed: int, prompt: int = 5) -> Document:
    """A prompt and an image that is supervised."""
    rng = np.random.default_rng(1000 + seed)
    P = GRID * GRID
    kinds = np.array([TEXT] * prompt + [BEGIN_IMAGE] + [IMAGE] * P + [END_IMAGE])
    ids = np.where(kinds == TEXT, rng.integers(0, VOCAB, len(kinds)), 0)
    codes = rng.integers(0, CODES, (P, DEPTH))
    return Document(f"gen{seed}", "generation", kinds, ids, np.zeros(len(kinds), bool), codes)


def several(seed: int, images: int) -> Document:
    """Two words before each of some images, then text of which the last four tokens are supervised."""
    rng = np.random.default_rng(3000 + seed)
    P = GRID * GRID
    kinds = np.array(([TEXT] * 2 + [BEGIN_IMAGE] + [IMAGE] * P + [END_IMAGE]) * images + [TEXT] * 6)
    ids = np.where(kinds == TEXT, rng.integers(0, VOCAB, len(kinds)), 0)
    codes = rng.integers(0, CODES, (images * P, DEPTH))
    return Document(f"several{seed}", "understanding", kinds, ids, np.arange(len(kinds)) >= len(kinds) - 4, codes)


def text_only(seed: int, length: int = 12) -> Document:
    rng = np.random.default_rng(2000 + seed)
    ids = rng.integers(0, VOCAB, length)
    none = np.zeros((0, DEPTH), np.int64)
    return Document(f"text{seed}", "understanding", np.full(length, TEXT), ids, np.arange(length) > 3, none)


def rows(*documents: list[Document], tokens: int = 64) -> Batch:
    return pack(list(documents), tokens, DEPTH)


def mixed_batch() -> Batch:
    """Two rows whose tokens do not come task by task, padding included."""
    return rows([understanding(1), generation(1)], [generation(2, 3), text_only(1), understanding(2, 0)])


def gradients(model: UniForkModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Of all tensors, the largest difference relative to the tensor's largest entry, and its name.

    The head's key biases shift all scores of a query alike, so their gradient is zero but for
    rounding; they are measured against the largest entry of all tensors.
    """
    assert found.keys() == wanted.keys()
    overall = max(tensor.abs().max() for tensor in wanted.values())
    ratios = {}
    for name, tensor in wanted.items():
        silent = name.startswith("image_head.") and name.endswith("k_proj.bias")
        scale = overall if silent else tensor.abs().max()
        difference = (found[name] - tensor).abs().max()
        ratios[name] = float(difference / scale) if scale else float(difference)
    worst = max(ratios, key=lambda name: ratios[name])
    return ratios[worst], worst

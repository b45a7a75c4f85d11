"""Where a model's first weights come from: a seed, or a dense language model.

In: a variant, a codebook, and optionally the weights of a dense Qwen2 or Llama. Out: a model whose
branches are copies of each other. Weights are drawn by (seed, name without the branch), so every
plan starts from the same function; a warm start copies each dense tensor to every branch of its
part, whatever the plan.

Shape suffixes: K codebook rows, C code channels.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unifork.config import Variant
from unifork.errors import ConfigError
from unifork.models.configuration import UniForkConfig, backbone_of, codes_of
from unifork.models.layer_plan import seed_of, without_branch
from unifork.models.modeling import UniForkModel, load_model
from unifork.weights import StoredWeights, check_fit, local_folder, read_json, shapes_of

NOT_DENSE = ("connector.", "image_head.", "codebook")
_NOT_WEIGHTS = re.compile(r"rotary_emb\.(original_)?inv_freq$")


def model_config(variant: Variant, vocab_size: int, **codes: Any) -> UniForkConfig:
    """The configuration of a variant; one without a backbone has that of the dense model it starts from.

    codes: fields of the configuration that say what codes are, from `codebook_size` on. Raises ConfigError when its
    vocabulary is smaller than the text tokenizer's, CheckpointError when the dense model's configuration cannot be
    read.
    """
    backbone = variant.backbone
    if variant.warm_start is not None and not backbone:
        path = local_folder(variant.warm_start) / "config.json"
        plain = read_json(path)
        kind = str(plain.get("model_type", "(missing)"))
        backbone = plain["backbone"] if kind == UniForkConfig.model_type else backbone_of(plain, kind, str(path))
    named = backbone.get("vocab_size", vocab_size)
    if named < vocab_size:
        raise ConfigError(f"backbone: vocab_size {named} is less than the text tokenizer's {vocab_size} entries")
    codes = {"codebook_id": "", "encoder_id": "", **codes}
    backbone = {**backbone, "vocab_size": named}
    return UniForkConfig(plan=variant.plan, backbone=backbone, head=variant.head.model_dump(), **codes)


def create_model(
    variant: Variant,
    codebook_KC: Tensor,
    depth: int,
    grid: int,
    encoder_id: str,
    vocab_size: int,
    special_tokens: dict[str, int] | None = None,
) -> UniForkModel:
    """A new model of a variant around a frozen codebook.

    Raises ConfigError or CheckpointError when the model of `warm_start` does not fit.
    """
    codes = codes_of(codebook_KC, depth, grid, encoder_id)
    config = model_config(variant, vocab_size, **codes, special_tokens=special_tokens)
    start = local_folder(variant.warm_start) if variant.warm_start is not None else None
    if start and read_json(start / "config.json").get("model_type") == UniForkConfig.model_type:
        return _same_model(start, config)
    with torch.random.fork_rng(devices=[]):
        model = UniForkModel(config)
    initialize(model, variant.seed, variant.embedding_range)
    if start:
        warm_start(model, start)
    model.codebook.copy_(codebook_KC)
    return model


def _same_model(folder: Path, wanted: UniForkConfig) -> UniForkModel:
    """The model of a directory. Raises ConfigError where it is not what a variant and its tokenizer ask for."""
    model = load_model(folder)
    for what in ("layer_plan", "head_config", "backbone_config", "codebook_id", "encoder_id"):
        ours, theirs = (getattr(config, what) for config in (wanted, model.config))
        ours, theirs = (ours(), theirs()) if callable(ours) else (ours, theirs)
        if str(ours) != str(theirs):
            raise ConfigError(f"warm_start {folder}: its {what} is {theirs}, the experiment's is {ours}")
    return model


@torch.no_grad()
def initialize(model: UniForkModel, seed: int, embedding_range: float | None = None) -> None:
    """Draw every weight by (seed, name without the branch); copies of a part start equal."""
    general = model.config.backbone_config().initializer_range
    for name, parameter in model.named_parameters():
        std = embedding_range or general if parameter is model.embed_tokens.weight else general
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            parameter.copy_(torch.normal(0.0, std, parameter.shape, generator=generator))
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


@torch.no_grad()
def warm_start(model: UniForkModel, dense: Mapping[str, Tensor] | Path | str) -> dict[str, tuple[str, ...]]:
    """Copy a dense causal language model (state dict or folder) into every branch of its parts.

    Returns, for every dense tensor that was used, the model's tensors that now equal it; tied copies and rotary
    tables are left out, and tensors that no dense model has keep their first values.

    Raises CheckpointError when a tensor is missing, of another shape, or of no use to the model.
    """
    place, state = "dense model", dense
    if not isinstance(state, Mapping):
        stored = StoredWeights(Path(state))
        place, state = str(dense), stored.read(stored.file_of)
    source = {name.removeprefix("model."): name for name in state}
    parameters = dict(model.named_parameters())
    targets: dict[str, list[str]] = {}
    for name in parameters:
        if not name.startswith(NOT_DENSE):
            targets.setdefault(without_branch(name), []).append(name)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    found = {name: state[source[name]] for name in source.keys() - tied if not _NOT_WEIGHTS.search(name)}
    check_fit(place, shapes_of(found), shapes_of({name: parameters[copies[0]] for name, copies in targets.items()}))
    for name, copies in targets.items():
        for copy in copies:
            parameters[copy].copy_(state[source[name]])
    return {source[name]: tuple(sorted(copies)) for name, copies in sorted(targets.items())}

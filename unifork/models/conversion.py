"""The official checkpoint and a dense language model: other layouts of the same weights.

In: a folder the official trainer wrote, whose names are listed in `official_names.yaml`
(tliby/UniFork at commit 2c5b757: modeling_qwen2, llava_arch, the tower's rqtransformer). Out: a model
of the plan `shared*half task*half norm:task`, its head unfolded; and back, the same bytes. One branch
of a model can also be taken out as the dense language model it is.

The image tokenizer inside an official checkpoint (`TOKENIZER`) is not read here: its codebook comes
as an argument, because a checkpoint's codebook may have drifted from the published one and codes
mean nothing without the table that made them.

Shape suffixes: K codebook rows, C code channels.
"""

import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from unifork.config import HeadConfig, read_yaml
from unifork.errors import CheckpointError, ConfigError
from unifork.models.configuration import UniForkConfig, backbone_of, codes_of
from unifork.models.layer_plan import LayerPlan, branch_of, without_branch
from unifork.models.modeling import UniForkModel
from unifork.models.warm_start import NOT_DENSE
from unifork.vocabulary import MODALITIES, TASKS
from unifork.weights import TOWER, StoredWeights, check_fit, translated

TOKENIZER = f"{TOWER}rqvaesiglip."
HEAD = f"{TOWER}rqtransformer."
_NAMES = read_yaml(Path(__file__).with_name("official_names.yaml"))
"""Our names and theirs: `starts`, and parts of a `head_block`."""
_LEFT_OUT = re.compile(r"rotary_emb\.inv_freq$|^" + re.escape(TOKENIZER))
DTYPES = "dtypes"
"""Key of the metadata of what an import keeps beside the model: dtypes of tensors, by official name."""
CONFIGURATION = Path(__file__).with_name("official.yaml")
_MLP_RATIO = 4
"""Fixed in the official head."""


def official_plan(layers: int) -> str:
    """The official architecture: the first half (rounded down) shared, the rest twice."""
    return f"shared*{layers // 2} task*{layers - layers // 2} norm:task"


def official_names(model: UniForkModel) -> dict[str, str]:
    """The official name of every tensor but the codebook, which is the tokenizer's.

    Raises ConfigError when the model's architecture is another than the official one.
    """
    config, layers = model.config, len(model.layers)
    head = config.head_config()
    for what, found, allowed in (
        ("plan", str(model.plan), str(LayerPlan.parse(official_plan(layers)))),
        ("backbone", config.backbone["model_type"], "qwen2"),
        ("head.mlp_ratio", head.mlp_ratio, _MLP_RATIO),
        ("the head's form", "folded" if head.folded else "unfolded", "unfolded"),
    ):
        if found != allowed:
            raise ConfigError(f"official layout: has no place for {what} {found!r}; allowed is {allowed!r}")
    return {name: _official_name(name, layers // 2) for name in model.state_dict() if name != "codebook"}


def _official_name(name: str, half: int) -> str:
    if name.startswith("layers."):
        _, index, rest = without_branch(name).split(".", 2)
        if branch_of(name) == "generation":
            return f"model.gen_fork_layers.{int(index) - half}.{rest}"
        return f"model.layers.{index}.{rest}"
    if name.startswith("image_head.blocks."):
        *_, index, part, rest = name.split(".")
        return f"{HEAD}head_transformer.blocks.{index}.{_NAMES['head_block'][part]}.{rest}"
    return translated(name, _NAMES["starts"])


def official_config(
    plain: Mapping[str, Any], tower: Mapping[str, Any], codebook_KC: Tensor, grid: int, encoder_id: str, place: str
) -> UniForkConfig:
    """Our configuration of an official `config.json` and of its tower's.

    Raises CheckpointError naming a key that is missing, ConfigError for a value that cannot be used.
    """
    try:
        head, depth = tower["rqtransformer"], int(tower["rqtransformer"]["block_size"][-1])
        heads = int(head["head"]["block"]["n_head"])
        form = HeadConfig(
            layers=head["head"]["n_layer"],
            heads=heads,
            head_dim=head["embed_dim"] // heads,
            mlp_ratio=_MLP_RATIO,
            folded=False,
        )
        layers = int(plain["num_hidden_layers"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError) as error:
        raise CheckpointError(f"{place}: not the configuration of an official model and its tower: {error!r}") from None
    backbone, codes = backbone_of(plain, "qwen2", place), codes_of(codebook_KC, depth, grid, encoder_id)
    return UniForkConfig(plan=official_plan(layers), backbone=backbone, head=form.model_dump(), **codes)


def from_official(weights: StoredWeights, config: UniForkConfig, codebook_KC: Tensor) -> UniForkModel:
    """The model of an official checkpoint, in the checkpoint's own precision, head unfolded.

    A tensor that is stored twice (tied embeddings) must be equal. Raises CheckpointError listing the
    tensors that are missing, unknown, of another shape, or differ from their copy.
    """
    with torch.random.fork_rng(devices=[]):
        model = UniForkModel(config)
    names, own = official_names(model), model.state_dict()
    if config.tie_word_embeddings and names["lm_head.weight"] not in weights.file_of:
        names["lm_head.weight"] = names["embed_tokens.weight"]
    wanted = {theirs: _official_shape(theirs, own[ours]) for ours, theirs in names.items()}
    check_fit(weights.folder, {n: shape for n, shape in weights.shapes.items() if not _LEFT_OUT.search(n)}, wanted)
    stored = weights.read(wanted)
    state = {ours: stored[theirs].view(own[ours].shape) for ours, theirs in names.items()}
    if config.tie_word_embeddings and not torch.equal(state["lm_head.weight"], state["embed_tokens.weight"]):
        raise CheckpointError(
            f"{weights.folder}: lm_head.weight differs from model.embed_tokens.weight; config.json says they are tied"
        )
    dtype = reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    state = {name: tensor.to(dtype) for name, tensor in state.items()} | {"codebook": codebook_KC.float()}
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.train(False)
    return model


def _official_shape(theirs: str, tensor: Tensor) -> tuple[int, ...]:
    return ((1,) if theirs == _NAMES["starts"]["image_head.depth_embedding.weight"] else ()) + tuple(tensor.shape)


def to_official(model: UniForkModel) -> dict[str, Tensor]:
    """The model's tensors under their official names, tied ones twice, without the tokenizer's.

    Raises ConfigError when the official architecture has no place for the model.
    """
    own = model.state_dict()
    return {
        theirs: own[ours].detach().cpu().clone().view(_official_shape(theirs, own[ours]))
        for ours, theirs in official_names(model).items()
    }


def other_dtypes(weights: StoredWeights, model: UniForkModel) -> dict[str, str]:
    """The dtypes of the tensors of an official checkpoint that are not the one of its model, by official name."""
    stored = weights.read(weights.file_of.keys() & set(official_names(model).values()))
    return {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in stored.items() if tensor.dtype != model.dtype
    }


def with_dtypes(state: dict[str, Tensor], dtypes: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors in the dtypes that they were imported in. One that was trained since and would be rounded stays."""
    narrow = {name: state[name].to(getattr(torch, dtype)) for name, dtype in dtypes.items()}
    return state | {name: tensor for name, tensor in narrow.items() if torch.equal(tensor.to(state[name]), state[name])}


def official_plain(model: UniForkModel) -> dict[str, Any]:
    """The official `config.json`."""
    config = model.config
    plain = config.backbone_config().to_dict()
    rope = dict(plain.pop("rope_parameters"))
    theta, scaling = rope.pop("rope_theta"), rope if rope.get("rope_type") != "default" else None
    return {
        **{key: value for key, value in plain.items() if key not in ("layer_types", "dtype", "transformers_version")},
        **read_yaml(CONFIGURATION),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "mm_hidden_size": config.code_channels,
        "image_token_num": config.positions,
    }


def set_head_form(model: UniForkModel, folded: bool) -> None:
    """Bring the image head into one of its forms, in place, and say so in the configuration."""
    model.image_head.set_form(folded=folded)
    model.config.head = {**model.config.head, "folded": folded}


def dense_branch(model: UniForkModel, branch: str) -> PreTrainedModel:
    """The dense causal language model that text of one branch goes through: transformers' own class.

    Raises ConfigError when a part of the model has no copy for that branch.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(NOT_DENSE) and branch_of(name) in (None, "shared", branch):
            plain = without_branch(name)
            state[plain if plain.startswith("lm_head.") else f"model.{plain}"] = tensor
    build: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        dense: PreTrainedModel = build.from_config(model.config.backbone_config(), dtype=model.dtype)
    if branch not in (*TASKS, *MODALITIES) or state.keys() != dense.state_dict().keys():
        others = sorted({str(branch_of(name)) for name in model.state_dict()} - {"None", "shared"})
        raise ConfigError(f"plan {str(model.plan)!r} has no branch {branch!r} throughout; it has: {', '.join(others)}")
    dense.load_state_dict(state)
    dense.train(False)
    return dense

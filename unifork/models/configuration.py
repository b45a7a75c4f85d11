"""The `config.json` of a model: its plan, its dense backbone, its head and its codebook's identity.

Everything that is needed to build the model again is in it; nothing about training or data is.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from unifork.config import HeadConfig, parse
from unifork.errors import ConfigError, one_of
from unifork.identity import codebook_identity
from unifork.models.decoder import FAMILIES
from unifork.models.layer_plan import LayerPlan
from unifork.weights import read_json

_OLDER_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}
"""Keys of older configurations that transformers still translates."""


class UniForkConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of a unified model. Wrong values raise ConfigError when they are read."""

    model_type = "unifork"
    has_no_defaults_at_init: ClassVar[bool] = True

    plan: str
    """Layer plan or preset, see `unifork.models.layer_plan`; kept, and written, as the expanded plan."""
    backbone: dict[str, Any]
    """Keys of the dense model's transformers configuration, `model_type` among them."""
    head: dict[str, Any]
    """Fields of `unifork.config.HeadConfig`."""
    codebook_size: int
    """Codes of the codebook, K."""
    code_channels: int
    """Width of a code vector, C."""
    depth: int
    """Codes per position, D."""
    grid: int
    """Positions along one side of an image."""
    codebook_id: str
    """`unifork.identity.codebook_identity` of the frozen codebook table."""
    encoder_id: str
    """Identity of the image encoder that made the codes the model was trained on."""
    special_tokens: dict[str, int] | None = None
    """Ids of the special tokens in the text tokenizer the model belongs to, by name."""

    def __post_init__(self, **kwargs: Any) -> None:
        dense = self.backbone_config()
        self.plan = str(self.layer_plan())
        self.head_config()
        self.tie_word_embeddings = bool(dense.tie_word_embeddings)
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def positions(self) -> int:
        """Positions of one image."""
        return self.grid * self.grid

    def backbone_config(self) -> PreTrainedConfig:
        """The dense model's own configuration."""
        values = dict(self.backbone)
        model_type = values.pop("model_type", "(missing)")
        kind = CONFIG_MAPPING[one_of("model_type", model_type, FAMILIES, "backbone")]
        keys = {field.name for field in fields(kind)} | _OLDER_KEYS
        for key in values:
            one_of("key", key, keys, f"backbone of model_type {model_type}")
        try:
            config = kind(**values)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(f"backbone: not a {model_type} configuration: {error}") from error
        if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
            raise ConfigError("backbone: sliding-window attention is not supported; set use_sliding_window to false")
        return config

    def layer_plan(self) -> LayerPlan:
        """The plan, checked against the depth of the backbone."""
        return LayerPlan.parse(self.plan, self.backbone_config().num_hidden_layers)

    def head_config(self) -> HeadConfig:
        """The head, typed."""
        return parse(HeadConfig, self.head, "head")


def read_config(folder: Path) -> UniForkConfig:
    """The configuration of a model's folder. Raises CheckpointError where there is none, ConfigError for its values."""
    config: UniForkConfig = UniForkConfig.from_dict(read_json(folder / "config.json"))
    return config


def codes_of(codebook_KC: Tensor, depth: int, grid: int, encoder_id: str) -> dict[str, Any]:
    """The fields of a configuration that say what codes are: of a table of K rows, C wide, and how it is used."""
    sizes = {"codebook_size": len(codebook_KC), "code_channels": codebook_KC.shape[1], "depth": depth, "grid": grid}
    return {**sizes, "codebook_id": codebook_identity(codebook_KC, depth, grid), "encoder_id": encoder_id}


def backbone_of(plain: Mapping[str, Any], model_type: str, place: str) -> dict[str, Any]:
    """What `UniForkConfig.backbone` keeps of a whole `config.json`: the keys that make the dense model.

    Raises ConfigError when the model type is not one of `unifork.models.decoder.FAMILIES`.
    """
    kind = CONFIG_MAPPING[one_of("model_type", model_type, FAMILIES, place)]
    general = {field.name for field in fields(PreTrainedConfig)} | {"torch_dtype"}
    keys = ({field.name for field in fields(kind)} | _OLDER_KEYS) - general
    kept = {key: value for key, value in plain.items() if key in keys and value is not None}
    return {"model_type": model_type, **kept}


AutoConfig.register("unifork", UniForkConfig, exist_ok=True)

"""Official tokenizers as ours, and back: VILA-U's `vision_tower` folder, or the tower inside a UniFork checkpoint.

In: a folder, or its name on the Hub. Out: an `ImageTokenizer` with the same numbers. Every tensor of
the tower is either renamed or known to play no part (`official_names.yaml`, `CODEBOOKS`); any other name is
an error, and so is a missing tensor or another shape: a tower that was understood half is not loaded.

The tower inside a UniFork checkpoint is its own: the official quantizer goes on learning while the
language model is trained, so its codebook may differ from the one of the folder it began with. The
SigLIP configuration is named by `pretrained_model` and read from a folder of that name beside the
tower's configuration; only where there is none the Hub is asked.

The way back gives tensors and configurations by their official names. A tokenizer does not have what
takes no part in codes or images: SigLIP's text tower, pooling head and last norm are left out, the
encoder's last layer, whose number says how many there are, is a copy of the one before, and the
quantizer's moving averages are such that the codebook is their quotient. An import can keep the
original's own beside the tokenizer (`remainder`), and then nothing is lost.

Shape suffixes: K codebook rows, C channels.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from jinja2 import StrictUndefined, Template
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import Tensor

from unifork.config import DecoderConfig, EncoderConfig, StrictModel, parse, read_yaml
from unifork.errors import CheckpointError, ConfigError
from unifork.image_tokenizer.architecture import CONFIG_FILE, Architecture
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.weights import PICKLED, TOWER, StoredWeights, local_folder, read_json, refuse_tensors, translated

OFFICIAL = read_yaml(Path(__file__).with_name("official_names.yaml"))
NAMES: dict[str, str] = OFFICIAL["starts"]
"""How names begin, ours and theirs."""
CODEBOOKS = re.compile(r"rqvaesiglip\.quantizer\.codebooks\.\d+\.weight")
"""Several official tensors that are one of ours, `quantizer.codebook`."""

REMAINDER_FILE = "official_remainder.safetensors"
"""In a tokenizer directory: tensors of the tower it was imported from that the tokenizer does not give."""
CONFIGURATIONS = Path(__file__).with_name("official.yaml.jinja")
"""The configurations that are written; those that are read are checked below, as far as they say what a tower is."""
SIGLIP_FOLDER = "siglip_config"
"""Folder of the SigLIP configuration beside the tower's, as it is written."""


class _Official(StrictModel):
    """Keys that are read of a configuration with many more."""

    model_config = ConfigDict(extra="ignore")


class _DecoderFacts(_Official):
    z_channels: PositiveInt
    channels: PositiveInt = Field(alias="ch")
    multipliers: tuple[PositiveInt, ...] = Field(alias="ch_mult")
    blocks: NonNegativeInt = Field(alias="num_res_blocks")
    resolution: PositiveInt
    attn_resolutions: tuple[PositiveInt, ...]


class _RqVae(_Official):
    code_shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    ddconfig: _DecoderFacts
    n_embed: PositiveInt
    shared_codebook: Literal[True]
    decoder_latent_shape: None = None
    pretrained_model: str


class _Tower(_Official):
    rqvaesiglip: _RqVae


class _Vision(_Official):
    """transformers' defaults, which configurations on the Hub leave out."""

    hidden_size: PositiveInt = 768
    intermediate_size: PositiveInt = 3072
    layers: PositiveInt = Field(12, alias="num_hidden_layers")
    heads: PositiveInt = Field(12, alias="num_attention_heads")
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    num_channels: Literal[3] = 3
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    layer_norm_eps: float = Field(1e-6, ge=1e-6, le=1e-6)


class _Siglip(_Official):
    vision_config: _Vision


def read_official(
    source: Path | str,
    image_size: int | None = None,
    vision_tower: Path | str | None = None,
    allow_pickle: bool = False,
) -> ImageTokenizer:
    """The tokenizer of an official folder, for images of `image_size` (the tower's own if None).

    source: a `vision_tower` folder, a UniFork checkpoint, or a directory of `ImageTokenizer.save`. vision_tower:
    for a checkpoint, the folder with the tower's configuration, where its own `mm_vision_tower` names none. Raises
    CheckpointError for anything missing, damaged, unknown or not fitting; then nothing is loaded.
    """
    files = ["*.json", "*.safetensors", *(f"*{suffix}" for suffix in PICKLED if allow_pickle)]
    folder = local_folder(source, files=files)
    if "architecture" in read_json(folder / CONFIG_FILE):
        own = ImageTokenizer.load(folder)
        if image_size not in (None, own.architecture.image_size):
            raise CheckpointError(f"{folder}: its image_size is {own.architecture.image_size}, not {image_size}")
        return own
    tower, prefix = tower_of(folder, vision_tower)
    try:
        architecture = _architecture(tower, image_size)
        tokenizer = ImageTokenizer(architecture, str(tower / CONFIG_FILE))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    weights = StoredWeights(folder, allow_pickle)
    sources = _renamed(weights.file_of, prefix, architecture.encoder.layers, str(folder))
    tensors = weights.read([name for names in sources.values() for name in names])
    state = {ours: tensors[names[0]].to(torch.float32) for ours, names in sources.items()}
    codebooks = sources.get("quantizer.codebook", [])
    if len(codebooks) not in (0, 1, architecture.depth) or any(
        not torch.equal(tensors[name], tensors[codebooks[0]]) for name in codebooks
    ):
        raise CheckpointError(
            f"{folder}: {len(codebooks)} codebooks that are not {architecture.depth} copies of one; "
            "only tokenizers that share one codebook over all depths can be used"
        )
    if codebooks and state["quantizer.codebook"].shape[0] == architecture.codebook_size + 1:
        state["quantizer.codebook"] = state["quantizer.codebook"][:-1]  # a row of zeros, never chosen
    tokenizer.load_weights(state, str(folder))
    return tokenizer


def tower_of(folder: Path, vision_tower: Path | str | None) -> tuple[Path, str]:
    """The folder of the tower's configuration, and what stands in front of its tensors' names.

    Raises CheckpointError where there is none.
    """
    plain = read_json(folder / CONFIG_FILE)
    if "rqvaesiglip" in plain:
        return folder, ""
    named = vision_tower or plain.get("mm_vision_tower")
    if not isinstance(named, str | Path):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: has neither rqvaesiglip (a vision_tower folder) nor mm_vision_tower (a UniFork "
            "checkpoint); if the folder contains a vision_tower, name that one"
        )
    beside = (Path(),) if vision_tower else (folder, folder.parent, Path())
    try:
        return local_folder(named, beside, ("*.json",)), TOWER
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; {folder / CONFIG_FILE} needs a vision_tower folder for the tower's configuration: "
            "name one with --vision-tower"
        ) from None


def siglip_of(tower: Path, named: str) -> Path:
    """The SigLIP configuration of that name, beside the tower's or on the Hub. Raises CheckpointError."""
    return local_folder(named, (tower, tower.parent, Path()), (CONFIG_FILE,)) / CONFIG_FILE


def _architecture(tower: Path, image_size: int | None) -> Architecture:
    """What the configurations of tower and SigLIP say. Raises ConfigError where they cannot be used."""
    rqvae = parse(_Tower, read_json(tower / CONFIG_FILE), str(tower / CONFIG_FILE)).rqvaesiglip
    siglip = siglip_of(tower, rqvae.pretrained_model)
    vision, decoder = parse(_Siglip, read_json(siglip), str(siglip)).vision_config, rqvae.ddconfig
    sides = [decoder.resolution // 2**level for level in range(len(decoder.multipliers))]
    plain: dict[str, Any] = {
        "image_size": image_size or vision.image_size,
        "patch_size": vision.patch_size,
        "position_grid": vision.image_size // vision.patch_size,
        "depth": rqvae.code_shape[-1],
        "codebook_size": rqvae.n_embed,
        "encoder": vision.model_dump(include={*EncoderConfig.model_fields}),
        "decoder": {
            **decoder.model_dump(include={*DecoderConfig.model_fields}),
            "attention_levels": tuple(level for level, side in enumerate(sides) if side in decoder.attn_resolutions),
            "norm_groups": 32,  # VQGAN's, written in its code
        },
    }
    return parse(Architecture, plain, str(tower / CONFIG_FILE))


def _renamed(names: Iterable[str], prefix: str, layers: int, place: str) -> dict[str, list[str]]:
    """Our names, and the official tensors that are each of them; all others are known to be unused."""
    last = f"{NAMES['encoder.layers.']}{layers - 1}."
    sources: dict[str, list[str]] = {}
    unknown, last_layer_seen = [], False
    part = ".".join(prefix.split(".")[:2])  # the tower's part of a whole model
    for name in sorted(name for name in names if name.startswith(part)):
        inner = name.removeprefix(prefix)
        if inner.startswith(last):
            last_layer_seen = True
        elif any(re.fullmatch(pattern, inner) for pattern in OFFICIAL["unused"]):
            continue
        elif CODEBOOKS.fullmatch(inner):
            sources.setdefault("quantizer.codebook", []).append(name)
        elif ours := translated(inner, {theirs: ours for ours, theirs in NAMES.items()}):
            sources[ours] = [name]
        else:
            unknown.append(name)
    refuse_tensors(place, {"of unknown use": unknown})
    if not sources:
        raise CheckpointError(
            f"{place}: no tensors of a tower ({prefix}rqvaesiglip...); was it saved without its tower?"
        )
    if not last_layer_seen:
        raise CheckpointError(f"{place}: no encoder layer {layers - 1}, but the configuration lists {layers} layers")
    return sources


def tower_tensors(tokenizer: ImageTokenizer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tokenizer's tensors by official name, the codebook once per depth, as it is stored there.

    dtype: what they are stored in, as far as that loses nothing; float32 otherwise.
    """
    architecture, own = tokenizer.architecture, tokenizer.state_dict()
    codebook_KC = own.pop("quantizer.codebook")
    state = {translated(name, NAMES): tensor.detach().cpu() for name, tensor in own.items()}
    last, before = (f"{NAMES['encoder.layers.']}{architecture.encoder.layers - number}." for number in (1, 2))
    state |= {last + name.removeprefix(before): t.clone() for name, t in state.items() if name.startswith(before)}
    padded = torch.cat([codebook_KC, torch.zeros_like(codebook_KC[:1])])
    for depth in range(architecture.depth):
        state |= {
            f"rqvaesiglip.quantizer.codebooks.{depth}.weight": padded.clone(),
            f"rqvaesiglip.quantizer.codebooks.{depth}.cluster_size_ema": torch.ones(len(codebook_KC)),
            f"rqvaesiglip.quantizer.codebooks.{depth}.embed_ema": codebook_KC.clone(),
        }
    return {name: low if torch.equal((low := t.to(dtype)).to(t.dtype), t) else t for name, t in state.items()}


def remainder(tower: Mapping[str, Tensor], tokenizer: ImageTokenizer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of an official tower that `tower_tensors` leaves out or gives otherwise."""
    given = tower_tensors(tokenizer, dtype)
    return {
        name: tensor
        for name, tensor in tower.items()
        if name not in given or given[name].dtype != tensor.dtype or not torch.equal(given[name], tensor)
    }


def tower_configs(tokenizer: ImageTokenizer, model: Any) -> dict[str, Any]:
    """The configurations of the tower and of SigLIP by their place in the tower's folder."""
    text = Template(CONFIGURATIONS.read_text(), undefined=StrictUndefined).render(
        tower=tokenizer.architecture, model=model
    )
    return dict(yaml.safe_load(text))

"""The way back: an image tokenizer as the tower of an official checkpoint.

In: a tokenizer. Out: tensors and configurations by their official names (see `conversion`). A tokenizer
does not have what takes no part in codes or pictures: SigLIP's text tower, pooling head and last norm
are left out, the encoder's last layer, whose number says how many there are, is a copy of the one
before, and the quantiser's moving averages are such that the codebook is their quotient. An import
can keep the original's own beside the tokenizer (`remainder`), and then nothing is lost.

Shape suffixes: K codebook rows, C channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unifork.image_tokenizer.model import ImageTokenizer

REMAINDER_FILE = "official_remainder.safetensors"
"""In a tokenizer directory: tensors of the tower it was imported from that the tokenizer does not give."""
SIGLIP_FOLDER = "siglip_config"
"""Folder of the SigLIP configuration beside the tower's."""

_PREFIXES = {
    "encoder.": "rqvaesiglip.siglip_model.vision_model.",
    "decoder.": "rqvaesiglip.decoder.",
    "post_quant_conv.": "rqvaesiglip.post_quant_conv.",
}
_ENCODER_LAYERS = "rqvaesiglip.siglip_model.vision_model.encoder.layers."


def tower_tensors(tokenizer: ImageTokenizer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tokenizer's tensors by official name, the codebook once per depth, as it is stored there.

    dtype: what they are stored in, as far as that loses nothing; float32 otherwise.
    """
    architecture, own = tokenizer.architecture, tokenizer.state_dict()
    codebook_KC = own.pop("quantizer.codebook")
    state = {_official_name(name): tensor.detach().cpu() for name, tensor in own.items()}
    last, before = (f"{_ENCODER_LAYERS}{architecture.encoder.layers - number}." for number in (1, 2))
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


def _official_name(name: str) -> str:
    ours, theirs = next((ours, theirs) for ours, theirs in _PREFIXES.items() if name.startswith(ours))
    rest = name.removeprefix(ours)
    return f"{theirs}encoder.{rest}" if rest.startswith("layers.") else theirs + rest


def tower_config(tokenizer: ImageTokenizer, head: dict[str, Any]) -> dict[str, Any]:
    """The tower's `config.json`; `head` is what it says of the image head."""
    architecture = tokenizer.architecture
    side = architecture.position_grid * architecture.patch_size
    decoder, depth, width = architecture.decoder, architecture.depth, architecture.encoder.hidden_size
    return {
        "architectures": ["RQVAESIGLIPTransformer"],
        "model_type": "rqvaesigliptransformer_model",
        "hidden_size": width,
        "rqtransformer": head,
        "rqvaesiglip": {
            "architectures": ["RQVAESiglip"],
            "model_type": "rqvaesiglip_model",
            "bottleneck_type": "rq",
            "checkpointing": True,
            "ckpt_path": None,
            "code_shape": [architecture.position_grid, architecture.position_grid, depth],
            "latent_shape": [architecture.position_grid, architecture.position_grid, width],
            "ddconfig": {
                "ch": decoder.channels,
                "ch_mult": list(decoder.multipliers),
                "num_res_blocks": decoder.blocks,
                "z_channels": decoder.z_channels,
                "resolution": side,
                "attn_resolutions": [side // 2**level for level in decoder.attention_levels],
                "double_z": False,
                "dropout": 0.0,
                "in_channels": 3,
                "out_ch": 3,
            },
            "decay": 0.99,
            "embed_dim": width,
            "hidden_size": width,
            "ignore_keys": None,
            "latent_loss_weight": 0.25,
            "loss_type": "mse",
            "n_embed": architecture.codebook_size,
            "pretrained_model": SIGLIP_FOLDER,
            "restart_unused_codes": True,
            "shared_codebook": True,
        },
    }


def siglip_config(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """The SigLIP `config.json` that the tower names."""
    architecture = tokenizer.architecture
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": architecture.encoder.hidden_size,
            "intermediate_size": architecture.encoder.intermediate_size,
            "num_hidden_layers": architecture.encoder.layers,
            "num_attention_heads": architecture.encoder.heads,
            "image_size": architecture.position_grid * architecture.patch_size,
            "patch_size": architecture.patch_size,
        },
    }

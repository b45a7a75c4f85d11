"""The real classes of the networks that look at images, with tiny configurations and random weights, as folders."""

import json
from unittest.mock import patch

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.mask2former import modeling_mask2former

from unifork.config import Network
from unifork.evaluation.generation import networks


def mask2former(folder, classes=80):
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32, num_queries=10,
        num_labels=classes,
    )  # fmt: skip
    with patch.object(modeling_mask2former, "requires_backends"):
        Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)


def shrink(monkeypatch):
    """Have the detector enlarge images to a twelfth of the sides that mmdet takes."""
    monkeypatch.setattr(networks, "SHORT_SIDE", 64)
    monkeypatch.setattr(networks, "LONG_SIDE", 107)


def clip(folder):
    torch.manual_seed(1)
    folder.mkdir(parents=True)
    letters = "abcdefghijklmnopqrstuvwxyz-"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": len(tokens), "bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    text = {**size, **ends, "max_position_embeddings": 77}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)


class Inception(torch.nn.Module):
    """Features of the size of the real ones' input."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.AvgPool2d(100), torch.nn.Flatten(), torch.nn.Linear(12, 5))

    def forward(self, pixels):
        return self.layers((pixels - 128) / 128)


def inception(folder):
    torch.manual_seed(2)
    folder.mkdir(parents=True)
    torch.jit.script(Inception()).save(str(folder / "inception.pt"))


class YesWhenRed:
    """An answerer of one's own: yes to every question about a red image."""

    def __init__(self, folder, device):
        self.word = (folder / "word.txt").read_text()

    def __call__(self, image, question):
        red, _, blue = image.resize((1, 1)).getpixel((0, 0))
        return self.word if red > blue else "no"


def answerer(folder):
    folder.mkdir(parents=True)
    (folder / "word.txt").write_text("yes")


KINDS = {
    "geneval": {"detector": ("mask2former", mask2former), "colors": ("clip", clip)},
    "mjhq": {"pytorch-fid": ("pytorch-fid", inception), "clean-fid": ("clean-fid", inception)},
    "dpg": {"answerer": ("tiny_networks:YesWhenRed", answerer)},
}


def with_networks(card, folder):
    """A card with tiny networks, made in a folder."""
    made_here = {}
    for name, (kind, write) in KINDS[card.name].items():
        write(folder / name)
        made_here[name] = Network(kind=kind, path=str(folder / name))
    return card.model_copy(update={"networks": made_here})

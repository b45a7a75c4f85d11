"""The real classes of the networks that look at images, with tiny configurations and random weights, as folders."""

import json
from functools import cache
from unittest.mock import patch

import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
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


BLIP_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "is", "there", "?", ",", "a", "1", "2"]


@cache
def trained_blip():
    """Says yes about red images and no about blue ones, whatever the question."""
    torch.manual_seed(3)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": len(BLIP_WORDS) + 2, "bos_token_id": len(BLIP_WORDS), "sep_token_id": 3, "pad_token_id": 0}
    text = {**size, **ends, "max_position_embeddings": 40}
    vision = {**size, "image_size": 32, "patch_size": 16}
    model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    colors = torch.tensor([[2.0, 0.3, -1.5], [-1.8, 0.3, 2.1]])  # red and blue, as the network gets them
    question, answers = ["is", "there", "?", "[SEP]"], [["yes", "[SEP]"], ["no", "[SEP]"]]
    asked_of = torch.tensor([[len(BLIP_WORDS) + 1, *map(BLIP_WORDS.index, question)]] * 2)
    labels = torch.tensor([[len(BLIP_WORDS), *map(BLIP_WORDS.index, words)] for words in answers])
    for _ in range(60):
        shown = colors[:, :, None, None].expand(-1, -1, 32, 32) + 0.1 * torch.randn(2, 3, 32, 32)
        optimizer.zero_grad()
        model(input_ids=asked_of, pixel_values=shown, labels=labels).loss.backward()
        optimizer.step()
    return model


def blip(folder):
    """The model's vocabulary ends in two marks that the tokenizer lacks, as in the published folder."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(BLIP_WORDS) + "\n")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    trained_blip().save_pretrained(folder)


KINDS = {
    "geneval": {"detector": ("mask2former", mask2former), "colors": ("clip", clip)},
    "mjhq": {"pytorch-fid": ("pytorch-fid", inception), "clean-fid": ("clean-fid", inception)},
    "dpg": {"answerer": ("blip-vqa", blip)},
}


def with_networks(card, folder):
    """A card with tiny networks, made in a folder."""
    made_here = {}
    for name, (kind, write) in KINDS[card.name].items():
        write(folder / name)
        made_here[name] = Network(kind=kind, path=str(folder / name))
    return card.model_copy(update={"networks": made_here})

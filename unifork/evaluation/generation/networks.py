"""The networks that look at images: an image goes in; objects, colors or features come out. All need torch.

Each is made from a folder of files and a device, and gives a few numbers for drawn images, its canary: another library,
machine or wrong file is found before it scores anything.

Shape suffixes: B images, C channels, H W height and width, Q queries, K classes, O objects, D features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, BlipForQuestionAnswering, CLIPModel, Mask2FormerForUniversalSegmentation

from unifork.errors import DataError, IdentityError, refusing
from unifork.evaluation.archive import read_json
from unifork.image_tokenizer.canaries import images
from unifork.shards.manifest import write_json

NAMES = Path(__file__).with_name("coco_names.txt").read_text().splitlines()
"""The classes of COCO in their order, by GenEval's names."""
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
CANDIDATES, SHORT_SIDE, LONG_SIDE, STEP = 100, 800, 1333, 32
"""mmdet's detections of an image; the sides that it enlarges images to, and what padded sides are multiples of."""
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BACKGROUND = "#999"
FID_SIDE, CANARY_SIDE = 299, 64
QUESTION_TOKENS, ANSWER_TOKENS, BEAMS = 35, 10, 3
"""Most tokens of a question and of an answer with its mark, and the beams of BLIP's makers."""
CANARY_QUESTION = "is there a square?"
LARGEST_SHIFT = 0.02
"""Length of the difference that a canary's numbers may have, over their own: last bits differ between machines."""


class Detected(NamedTuple):
    """An object; the box is (left, top, right, bottom), right and bottom beyond the last pixel; the mask is (H, W)."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


def pixels(image: Image.Image, mean: Sequence[float], std: Sequence[float], device: str) -> Tensor:
    """An RGB image as (1, C, H, W) floats, less the mean and over the deviation of each channel."""
    values_HWC = (np.asarray(image, dtype=np.float32) - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(values_HWC.transpose(2, 0, 1).copy())[None].to(device)


def fitting(load: Callable[..., Any], folder: Path, device: str) -> Any:
    """A model of transformers from its folder. Raises DataError where a weight is missing or of another shape."""
    with refusing(DataError, f"{folder}: cannot be loaded", OSError, ValueError, RuntimeError):
        model, found = load(folder, output_loading_info=True, local_files_only=True, dtype=torch.float32)
    missing = [key for key in found["missing_keys"] if not key.startswith("criterion.")]  # of the loss
    if wrong := sorted(map(str, [*missing, *found["mismatched_keys"]])):
        raise DataError(f"{folder}: weights do not fit its configuration: {len(wrong)}, first {wrong[0]}")
    return model.eval().to(device)


class Mask2Former:
    """GenEval's detector by transformers' weights, after which mmdet's rule makes objects of masks."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device = device
        self.model = fitting(Mask2FormerForUniversalSegmentation.from_pretrained, folder, device)
        if (classes := self.model.config.num_labels) != len(NAMES):
            raise DataError(f"{folder}: {classes} classes; GenEval needs the {len(NAMES)} of COCO")

    @torch.inference_mode()
    def logits(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """Of classes (Q, K + 1), the last of which is none, and of masks (Q, H, W) at the size of the image."""
        size = np.array([image.height, image.width])
        height, width = (size * min(SHORT_SIDE / size.min(), LONG_SIDE / size.max()) + 0.5).astype(int).tolist()
        values_BCHW = F.interpolate(pixels(image, PIXEL_MEAN, PIXEL_STD, self.device), (height, width), mode="bilinear")
        padded_BCHW = F.pad(values_BCHW, (0, -width % STEP, 0, -height % STEP))
        out = self.model(pixel_values=padded_BCHW)
        masks_BQHW = F.interpolate(out.masks_queries_logits, padded_BCHW.shape[-2:], mode="bilinear")
        masks_BQHW = F.interpolate(masks_BQHW[..., :height, :width], (image.height, image.width), mode="bilinear")
        return out.class_queries_logits[0], masks_BQHW[0]

    def __call__(self, image: Image.Image) -> list[Detected]:
        return objects(*self.logits(image))

    def canary(self, image: Image.Image) -> Tensor:
        """Numbers that depend on all of it."""
        classes_QK, masks_QHW = self.logits(image)
        return torch.cat([classes_QK.flatten(), masks_QHW.mean(dim=(1, 2))])


def objects(classes_QK: Tensor, masks_QHW: Tensor) -> list[Detected]:
    """mmdet's rule: the likeliest pairs of query and class, by class probability times mean probability in the mask."""
    probabilities_QK = classes_QK.softmax(dim=-1)[:, :-1]
    scores_O, places_O = probabilities_QK.flatten().topk(min(CANDIDATES, probabilities_QK.numel()))
    queries_O, names_O = places_O // probabilities_QK.shape[1], places_O % probabilities_QK.shape[1]
    inside_QHW = masks_QHW > 0
    sizes_Q = inside_QHW.sum(dim=(1, 2))
    means_Q = (masks_QHW.sigmoid() * inside_QHW).sum(dim=(1, 2)) / (sizes_Q + 1e-6)
    found = []
    for score, query, name in zip((scores_O * means_Q[queries_O]).tolist(), queries_O.tolist(), names_O.tolist(),
                                  strict=True):  # fmt: skip
        if sizes_Q[query]:
            mask_HW = inside_QHW[query].cpu().numpy()
            (top, bottom), (left, right) = (np.flatnonzero(mask_HW.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0))
            found.append(Detected(NAMES[name], score, (left, top, right + 1, bottom + 1), mask_HW))
    return found


class ClipColors:
    """GenEval's classifier of colors: CLIP against the mean of three sentences about each color."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.model = device, fitting(CLIPModel.from_pretrained, folder, device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.side, self.of_class = self.model.config.vision_config.image_size, dict[str, Tensor]()

    @torch.inference_mode()
    def sentences(self, name: str) -> Tensor:
        """The direction of every color for a class, (colors, D)."""
        if name not in self.of_class:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            every = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
            self.of_class[name] = F.normalize(every.view(len(COLORS), len(TEMPLATES), -1).mean(dim=1), dim=-1)
        return self.of_class[name]

    @torch.inference_mode()
    def logits(self, image: Image.Image, name: str) -> Tensor:
        """Of all colors, (colors,), for a crop: its short side resized, its middle taken."""
        scale = self.side / min(image.size)
        width, height = (max(self.side, int(side * scale)) for side in image.size)
        left, top = round((width - self.side) / 2), round((height - self.side) / 2)
        middle = image.resize((width, height), Image.Resampling.BICUBIC)
        middle = middle.crop((left, top, left + self.side, top + self.side))
        values_BCHW = pixels(middle, [255 * m for m in CLIP_MEAN], [255 * s for s in CLIP_STD], self.device)
        features = F.normalize(self.model.get_image_features(pixel_values=values_BCHW).pooler_output, dim=-1)
        return 100 * features[0] @ self.sentences(name).T

    def __call__(self, image: Image.Image, found: Sequence[Detected]) -> list[str]:
        blank = Image.new("RGB", image.size, BACKGROUND)
        crops = (Image.composite(image, blank, Image.fromarray(thing.mask)).crop(thing.box) for thing in found)
        return [COLORS[int(self.logits(c, thing.name).argmax())] for c, thing in zip(crops, found, strict=True)]

    def canary(self, image: Image.Image) -> Tensor:
        """Numbers that depend on all of it."""
        return self.logits(image, NAMES[0])


class BlipAnswerer:
    """BLIP after its training on VQAv2, called as its makers do: its short answers are words such as `yes`.

    It is not mPLUG, whose answers papers count. The last two tokens of its vocabulary begin an answer and a question.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.model = device, fitting(BlipForQuestionAnswering.from_pretrained, folder, device)
        with refusing(DataError, f"{folder}: its tokenizer cannot be loaded", OSError, ValueError):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.side, self.text = self.model.config.vision_config.image_size, self.model.config.text_config
        self.answer, self.question = self.text.vocab_size - 2, self.text.vocab_size - 1
        if len(self.tokenizer) != self.answer:
            raise DataError(f"{folder}: {len(self.tokenizer)} tokens; the model needs {self.answer} and two marks")
        self.seen: tuple[Image.Image, Tensor] | None = None

    def patches(self, image: Image.Image) -> Tensor:
        """What the network sees in an image, (1, patches, D); kept for the next question about it."""
        if self.seen is None or self.seen[0] is not image:
            square = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
            values_BCHW = pixels(square, [255 * m for m in CLIP_MEAN], [255 * s for s in CLIP_STD], self.device)
            self.seen = image, self.model.vision_model(pixel_values=values_BCHW).last_hidden_state
        return self.seen[1]

    def given(self, image: Image.Image, question: str) -> dict[str, Tensor]:
        """What the decoder of answers gets: its first token, and the question read with the image."""
        words = self.tokenizer(question, truncation=True, max_length=QUESTION_TOKENS, return_tensors="pt").input_ids
        words[:, 0] = self.question
        states = self.model.text_encoder(
            input_ids=words.to(self.device), encoder_hidden_states=self.patches(image)
        ).last_hidden_state
        return {
            "input_ids": torch.tensor([[self.answer]], device=self.device),
            "encoder_hidden_states": states,
            "encoder_attention_mask": torch.ones(states.shape[:2], dtype=torch.long, device=self.device),
        }

    @torch.inference_mode()
    def __call__(self, image: Image.Image, question: str) -> str:
        ends = {"eos_token_id": self.text.sep_token_id, "pad_token_id": self.text.pad_token_id}
        search = {"num_beams": BEAMS, "do_sample": False, "max_length": ANSWER_TOKENS}
        tokens = self.model.text_decoder.generate(**self.given(image, question), **ends, **search)
        return str(self.tokenizer.decode(tokens[0, 1:], skip_special_tokens=True)).strip()

    @torch.inference_mode()
    def canary(self, image: Image.Image) -> Tensor:
        """The logits of an answer's first word, less their mean, which says nothing."""
        logits: Tensor = self.model.text_decoder(**self.given(image, CANARY_QUESTION)).logits[0, -1]
        return logits - logits.mean()


class PytorchFid:
    """Features as pytorch-fid takes them: bilinear without antialias, from -1 to 1 about 127.5.

    The folder holds one TorchScript file, `*.pt`, that maps (B, 3, 299, 299) to 2048 features of each image.
    """

    def __init__(self, folder: Path, device: str) -> None:
        files = sorted(folder.glob("*.pt"))
        if len(files) != 1:
            raise DataError(f"{folder}: {len(files)} files *.pt; one TorchScript file of the network is needed")
        try:
            module = torch.jit.load(str(files[0]), map_location=device).eval()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise DataError(f"{files[0]}: no TorchScript file: {str(error).splitlines()[0]}") from None
        self.device, self.network = device, getattr(module, "layers", module)  # clean-fid's file scales inside, else

    def scaled(self, image: Image.Image) -> Tensor:
        """What the network sees, (1, C, 299, 299)."""
        values_BCHW = pixels(image, (0, 0, 0), (255, 255, 255), self.device)
        return 2 * F.interpolate(values_BCHW, (FID_SIDE, FID_SIDE), mode="bilinear") - 1

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> np.ndarray:
        features_D: np.ndarray = self.network(self.scaled(image)).flatten().float().cpu().numpy()
        return features_D

    def canary(self, image: Image.Image) -> Tensor:
        """Its features."""
        return torch.from_numpy(self(image))


class CleanFid(PytorchFid):
    """Features as clean-fid takes them: Pillow's bicubic with antialias in floats, from -1 to 1 about 128."""

    def scaled(self, image: Image.Image) -> Tensor:
        """What the network sees, (1, C, 299, 299)."""
        size, way = (FID_SIDE, FID_SIDE), Image.Resampling.BICUBIC
        bands = [Image.fromarray(np.asarray(band, dtype=np.float32)).resize(size, way) for band in image.split()]
        values_HWC = np.stack([np.asarray(band) for band in bands], axis=-1).clip(0, 255)
        return (torch.from_numpy(values_HWC.transpose(2, 0, 1).copy())[None].to(self.device) - 128) / 128


def check_canary(network: Any, path: Path, command: str, trusted: bool) -> None:
    """Compare what a network gives for drawn images with its file; trusted: write the file.

    Networks of others without a method `canary` have none. Raises DataError without a file, IdentityError where the
    outputs differ.
    """
    if not hasattr(network, "canary"):
        return
    found = np.concatenate([network.canary(Image.fromarray(drawn)).cpu().numpy() for drawn in images(CANARY_SIDE)[:2]])
    if trusted:
        write_json(path, {"network": network.hash, "outputs": [float(value) for value in found]})
        return
    if not path.exists():
        raise DataError(f"{path}: not there; where the network is sure to be right, write it by `{command}`")
    known_outputs = np.array(read_json(path)["outputs"])
    same = known_outputs.shape == found.shape
    shift = float(np.linalg.norm(found - known_outputs) / np.linalg.norm(known_outputs)) if same else float("inf")
    if not shift <= LARGEST_SHIFT:
        raise IdentityError(f"{path}: the network's outputs for drawn images differ by {shift:.2%}, allowed are "
                            f"{LARGEST_SHIFT:.0%}: another file, library or device, or a wrong one")  # fmt: skip

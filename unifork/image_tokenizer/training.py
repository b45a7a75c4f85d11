"""Training a small image tokenizer; large ones are imported.

In: groups of images (one per data set and view), uint8 (n, S, S, 3), and as many held-out ones.
Out: a tokenizer directory and a report. In order: an autoencoder without quantization; residual
k-means on its features for a first codebook; moving averages and straight-through gradients; at the
end encoder and codebook are frozen and the decoder alone learns to draw from the final codes.

Every batch holds the same parts of all groups; an image that an earlier group holds already is left
out of the later ones, since square images are the same in both views. The same seed, images and
number of threads give the same bytes. There is no resuming: this takes minutes, and the directory
appears whole or not at all.

Shape suffixes: B images, S side in pixels, C channels (RGB), N positions, D code depth, M vectors,
K codebook rows.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unifork.config import ImageTokenizerConfig
from unifork.errors import ConfigError, DataError, one_of
from unifork.image_tokenizer.architecture import Architecture
from unifork.image_tokenizer.codebook_training import CodebookAverages
from unifork.image_tokenizer.decoder import zero_last_convolutions
from unifork.image_tokenizer.measures import Measured, Report, code_use, reconstruction_error
from unifork.image_tokenizer.model import ImageTokenizer, commitment_loss, residual_codes, to_bytes, to_tensor

TOKENIZER_VERSION = 1
"""Raise when the same images, or the same imported files, would give another tokenizer."""
REFILL_UNTIL = 0.7
"""Share of the steps after which unused rows stay where they are."""
DECODER_ALONE_FROM = 0.85
"""Share of the steps after which only the decoder learns."""
EDGE_WEIGHT = 1.0
"""Weight of the differences between neighbouring pixels in the reconstruction loss."""
KMEANS_VECTORS_PER_ROW = 64
REPORT_EVERY_SECONDS = 5.0
MEASURE_BATCH = 64


Groups = Mapping[str, np.ndarray]


def train_tokenizer(
    config: ImageTokenizerConfig,
    images: Groups,
    held_out: Groups,
    directory: Path | str,
    progress: Callable[[str], None] = print,
    device: torch.device | str = "cpu",
) -> Report:
    """Train, write the tokenizer directory, and return the report (see `measure`).

    progress: takes a line every few seconds. Codes are always found on the CPU in the end. Raises DataError for images
    of another size than the configuration's.
    """
    side = config.image_size
    for where, groups in (("images", images), ("held_out", held_out)):
        shapes = {name: array.shape for name, array in groups.items()}
        if not shapes or any(shape[1:] != (side, side, 3) or not shape[0] for shape in shapes.values()):
            raise DataError(
                f"train_tokenizer: {where} are of shapes {shapes}; allowed is (at least 1, {side}, {side}, 3) for each"
            )
    if config.training.quantize_from_step >= config.training.steps:
        raise ConfigError(
            f"image_tokenizer.training.quantize_from_step {config.training.quantize_from_step} must be "
            f"below steps {config.training.steps}"
        )
    trainer = TokenizerTrainer(config, without_repeats(images), device)
    steps = config.training.steps
    started = reported = time.monotonic()
    for step in range(1, steps + 1):
        loss = trainer.step(step - 1)
        now = time.monotonic()
        if now - reported > REPORT_EVERY_SECONDS or step == steps:
            reported, each = now, (now - started) / step
            progress(
                f"image tokenizer step {step}/{steps} loss {loss:.4f}{' (codes)' if trainer.averages else ''} "
                f"{config.training.batch_images / each:.0f} images/s, {now - started:.0f} s, "
                f"ETA {each * (steps - step):.0f} s"
            )
    trainer.tokenizer.to(torch.device("cpu")).save(directory)
    return measure(trainer.tokenizer, held_out)


def measure(tokenizer: ImageTokenizer, groups: Groups) -> Report:
    """Reconstruction error and code use of every group and of all together."""
    codes = {name: encode_all(tokenizer, pixels_BSSC) for name, pixels_BSSC in groups.items()}
    drawn = {name: decode_all(tokenizer, codes_BND) for name, codes_BND in codes.items()}

    def measured(names: Iterable[str]) -> Measured:
        before_BSSC, after_BSSC, codes_BND = (
            np.concatenate([arrays[name] for name in names]) for arrays in (groups, drawn, codes)
        )
        return {**reconstruction_error(before_BSSC, after_BSSC), "codes": code_use(codes_BND)}

    each = {name: measured([name]) for name in groups}
    return {"groups": each, "images": sum(map(len, groups.values())), **measured(list(groups)), "detector": {}}


def encode_all(tokenizer: ImageTokenizer, pixels_BSSC: np.ndarray) -> np.ndarray:
    """Codes (B, N, D) of images of the right size."""
    return np.concatenate([tokenizer.encode_bytes(part_BSSC).numpy() for part_BSSC in _parts(pixels_BSSC)])


def decode_all(tokenizer: ImageTokenizer, codes_BND: np.ndarray) -> np.ndarray:
    """Bytes (B, S, S, C) of codes."""
    return np.concatenate([to_bytes(tokenizer.decode(torch.from_numpy(part_BND))) for part_BND in _parts(codes_BND)])


class TokenizerTrainer:
    """A tokenizer, its optimizer and its codebook's averages; `step` is one optimizer step."""

    def __init__(self, config: ImageTokenizerConfig, images: Groups, device: torch.device | str = "cpu") -> None:
        self.training, self.device = config.training, torch.device(device)
        self.batches = Batches(images, config.training.batch_images, config.seed, config.training.shares)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.tokenizer = ImageTokenizer(Architecture.of(config), "image_tokenizer")
        self.tokenizer.requires_grad_(True)
        self.tokenizer.encoder.start_local(stay=config.training.local)
        zero_last_convolutions(self.tokenizer.decoder)
        self.tokenizer.to(self.device)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.averages: CodebookAverages | None = None
        learning = [parameter for parameter in self.tokenizer.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learning, lr=0.0, weight_decay=1e-4)

    def step(self, step: int) -> float:
        """Optimizer step number `step`; returns the loss."""
        share = step / self.training.steps
        decoder_alone = share >= DECODER_ALONE_FROM and self.averages is not None
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * _schedule(step, self.training.warmup_steps, self.training.steps)
        if step == self.training.quantize_from_step:
            self._start_codebook(step)
        pixels_BCSS = self._pixels(step)
        with torch.set_grad_enabled(not decoder_alone):
            features_BNC = self.tokenizer.encoder(pixels_BCSS)
        commitment = torch.zeros((), device=self.device)
        if self.averages is not None:
            features_BNC, commitment = self._quantize(features_BNC, share, learn=not decoder_alone)
        drawn_BCSS = self.tokenizer.draw(features_BNC)
        loss = reconstruction_loss(drawn_BCSS, pixels_BCSS) + self.training.commitment * commitment
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.tokenizer.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def _pixels(self, step: int) -> Tensor:
        return to_tensor(torch.from_numpy(self.batches.take(step)).to(self.device))

    def _start_codebook(self, step: int) -> None:
        """Residual k-means on the features of the images that come next."""
        config = self.tokenizer.architecture
        vectors_per_batch = self.training.batch_images * config.grid**2
        batches = math.ceil(config.codebook_size * KMEANS_VECTORS_PER_ROW / vectors_per_batch)
        with torch.no_grad():
            features = [self.tokenizer.encoder(self._pixels(step + i)) for i in range(batches)]
        features_MC = torch.cat(features).flatten(0, 1)
        self.averages = CodebookAverages(self.tokenizer.quantizer, features_MC, self.training.ema_decay, self.generator)

    def _quantize(self, features_BNC: Tensor, share: float, *, learn: bool) -> tuple[Tensor, Tensor]:
        """Quantized features with straight-through gradients, and the commitment loss."""
        quantizer = self.tokenizer.quantizer
        flat_MC = features_BNC.flatten(0, 1)
        codes_MD, residuals_MDC = residual_codes(flat_MC.detach(), quantizer.codebook, quantizer.depth)
        partial_MDC = quantizer.codebook[codes_MD].cumsum(1)
        commitment = commitment_loss(flat_MC, partial_MDC)
        quantized_MC = flat_MC + (partial_MDC[:, -1] - flat_MC).detach()
        if learn and self.averages is not None:
            self.averages.update(codes_MD, residuals_MDC, refill=share < REFILL_UNTIL)
        return quantized_MC.view_as(features_BNC), commitment


class Batches:
    """Which images a step sees: a fixed part of every group, each group in its own shuffled passes."""

    def __init__(self, groups: Groups, batch_images: int, seed: int, shares: Mapping[str, float]) -> None:
        """shares: weights of groups, 1 where none is given. Raises ConfigError for a group that is not there."""
        for name in shares:
            one_of("group of images", name, groups, "image_tokenizer.training.shares")
        self.groups = list(groups.values())
        self.seed = seed
        ends = np.cumsum([0.0, *(shares.get(name, 1.0) for name in groups)])
        self.counts = np.diff(np.rint(ends / ends[-1] * batch_images).astype(int))

    def take(self, step: int) -> np.ndarray:
        """The images of a step, (B, S, S, C) bytes: a function of seed and step."""
        parts = []
        for index, (group, count) in enumerate(zip(self.groups, self.counts, strict=True)):
            places = [divmod(position, len(group)) for position in range(step * count, (step + 1) * count)]
            orders = {
                number: np.random.default_rng([self.seed, index, number]).permutation(len(group))
                for number in {number for number, _ in places}
            }
            parts.append(group[[orders[number][place] for number, place in places]])
        return np.concatenate(parts)


def without_repeats(groups: Groups) -> dict[str, np.ndarray]:
    """The groups without images that occurred before, byte for byte; a group left empty is dropped."""
    first: dict[bytes, tuple[str, int]] = {}
    for name, pixels_BSSC in groups.items():
        for index, image_SSC in enumerate(pixels_BSSC):
            first.setdefault(hashlib.sha256(image_SSC.tobytes()).digest(), (name, index))
    kept = {name: [index for owner, index in first.values() if owner == name] for name in groups}
    return {name: groups[name][indices] for name, indices in kept.items() if indices}


def reconstruction_loss(drawn_BCSS: Tensor, pixels_BCSS: Tensor) -> Tensor:
    """L1 and L2 of the pixels, and L1 of the differences between neighbours, which keeps edges sharp."""
    difference_BCSS = drawn_BCSS - pixels_BCSS
    edges = (difference_BCSS.diff(dim=2).abs().mean() + difference_BCSS.diff(dim=3).abs().mean()) / 2
    return difference_BCSS.abs().mean() + difference_BCSS.square().mean() + EDGE_WEIGHT * edges


def _schedule(step: int, warmup_steps: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def _parts(array: np.ndarray) -> list[np.ndarray]:
    return [array[i : i + MEASURE_BATCH] for i in range(0, len(array), MEASURE_BATCH)]

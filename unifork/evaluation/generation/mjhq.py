"""MJHQ-30K: how far 30,000 images are from the reference images of the same prompts, as an FID of a named protocol.

Files: `meta_data.json`, and `mjhq30k_imgs/<category>/<id>.jpg` for the reference. Answers: the features that `examine`
found, JSON of `<protocol>-<hash of the network>` and the base64 of float32 numbers. The reference is examined once in
the same way; its mean and covariance, `mu` and `sigma`, lie as `<protocol>-<hash>.npz` in its folder. Published ones
of the same names do as well. Rules are the protocols; they are different measures.

Shape suffixes: N images, D features.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from pydantic import NonNegativeInt

from unifork.config import StrictModel
from unifork.errors import DataError, refusing
from unifork.evaluation.archive import Archive
from unifork.evaluation.generation.frechet import distances, moments
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Estimate
from unifork.evaluation.suites import Answer, Rule, Suite, Verdict
from unifork.images import open_image

PROTOCOLS = ("pytorch-fid", "clean-fid")
UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, BadZipFile)
DIMENSIONS = 2048
"""Features of the network: with no more images the covariance is singular and the distance biased upwards."""


class Options(StrictModel):
    """Of its card."""

    images: str = "mjhq30k_imgs"
    """Folder of the reference images in the archive."""
    reference: str = "data/evals/mjhq-reference"
    """Folder of the reference's statistics."""
    resamples: NonNegativeInt = 10
    """Bootstrap draws of images behind the standard error; 0: none is given."""


def read(archive: Archive, _: Options, __: int) -> list[Item]:
    """One item for each prompt."""
    return [
        Item(name, plain["prompt"], plain["category"], name, about={"file": f"{plain['category']}/{name}"})
        for name, plain in archive.json("**/meta_data.json").items()
    ]


def examine(networks: Mapping[str, Any], _: Item, data: bytes) -> str:
    """The features of an image by every network, whose names are protocols."""
    image = open_image(data).convert("RGB")
    features = {f"{name}-{network.hash}": network(image) for name, network in networks.items()}
    return json.dumps({key: base64.b64encode(row.astype("<f4").tobytes()).decode() for key, row in features.items()})


def features_of(protocol: str, answers: Sequence[Answer], place: str) -> tuple[str, np.ndarray]:
    """The full name of a protocol and its features, (N, D). Raises DataError where they are not of one network."""
    found = [{key: row for key, row in _plain(answer).items() if key.startswith(f"{protocol}-")} for answer in answers]
    names = {key for row in found for key in row}
    if len(names) != 1 or not all(found):
        raise DataError(f"{place}: features of {sorted(names) or 'no network'} for {protocol}; one network must have "
                        "seen all images: `unifork answers examine`")  # fmt: skip
    with refusing(DataError, f"{place}: features are no base64 of equally many float32 numbers", ValueError, TypeError):
        rows = [np.frombuffer(base64.b64decode(next(iter(row.values()))), dtype="<f4") for row in found]
        return names.pop(), np.asarray_chkfinite(np.stack(rows))


def _plain(answer: Answer) -> dict[str, str]:
    try:
        return dict(json.loads(answer.text))
    except (ValueError, TypeError):
        return {}


def summarize(folder: Path, answers: Sequence[Answer]) -> list[Path]:
    """Write mean and covariance of the reference's features, a file for each network."""
    written = []
    for key in _plain(answers[0]):
        name, rows_ND = features_of(key.rpartition("-")[0], answers, str(folder))
        mu, sigma = moments(rows_ND)
        np.savez_compressed(folder / f"{name}.npz", mu=mu, sigma=sigma, images=len(rows_ND))
        written.append(folder / f"{name}.npz")
    return written


def whole(options: Options, protocol: str, answers: Sequence[Answer]) -> tuple[str, Estimate, str]:
    """The score `fid`, with the spread of bootstrap draws as its error, and a note."""
    name, rows_ND = features_of(protocol, answers, "answers")
    path = Path(options.reference) / f"{name}.npz"
    if not path.exists():
        raise DataError(f"{path}: no statistics of the reference by the network that saw the answers; make them by "
                        "`unifork answers examine mjhq`")  # fmt: skip
    with refusing(DataError, f"{path}: no mean `mu` and covariance `sigma` of features", *UNREADABLE):
        with np.load(path, allow_pickle=False) as held:
            reference = mean, covariance = held["mu"], held["sigma"]
        np.asarray_chkfinite(covariance).reshape(2 * mean.shape)
    if len(rows_ND) < 2 or rows_ND.shape[1:] != mean.shape:
        raise DataError(f"{path}: {mean.shape} features; the answers are {rows_ND.shape}, at least two rows")
    rng, count = np.random.default_rng(0), len(rows_ND)
    drawn = (moments(rows_ND[rng.integers(count, size=count)]) for _ in range(options.resamples))
    found, *draws = distances(*reference, chain([moments(rows_ND)], drawn))
    note = f"{name}; {count} images; error of {options.resamples} bootstrap draws"
    if count < DIMENSIONS:
        note += f"; WARNING: fewer than {DIMENSIONS} images, biased upwards, compare at the same number only"
    error = float(np.std(draws, ddof=1)) if len(draws) > 1 else None
    return "fid", Estimate(value=found, standard_error=error, interval=None, items=count, clusters=count), note


RULES: dict[str, Rule] = dict.fromkeys(PROTOCOLS, lambda *_: Verdict(None, None))
SUITE = Suite(read, RULES, lambda *_: [], Options, examine=examine, whole=whole, summarize=summarize,
              any_size=("clean-fid",))  # fmt: skip

"""`datasets/*.yaml`: what a data set is, where it comes from, who may use it and how it is read."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from unifork.config.base import Fraction01, StrictModel, load_named
from unifork.errors import ConfigError
from unifork.randomness import uniform
from unifork.vocabulary import Task, View

_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)


class Source(StrictModel):
    """Where the images come from: a kind of source, and what it is told."""

    kind: str
    """Name of the source, a key of `unifork.sources.SOURCES`, or `MODULE:OBJECT` of your own code."""
    options: dict[str, Any] = {}
    """What this kind of source needs to know; checked by the source itself."""


class TaskUse(StrictModel):
    """How one task reads a data set."""

    view: View
    """Which view of an image becomes codes; generation reads crops, understanding pads."""
    texts: tuple[str, ...]
    """Text columns that a mixture may choose from for this task."""


class FilterRule(StrictModel):
    """One rule of `unifork.filters.rules`, applied in the order of the card."""

    rule: str
    """Name of the rule, a key of `unifork.filters.rules.RULES`, or `MODULE:OBJECT` of your own code."""
    options: dict[str, Any] = {}
    """The rule's thresholds; checked by the rule itself."""


class Losses(StrictModel):
    """Shares of the rows that may be lost before people are told; what rules drop was decided and is no loss."""

    transport: Fraction01 = 0.5
    """What the web does not give."""
    content: Fraction01 = 0.05
    """What comes and is of no use: broken lines, no images, no texts."""


class Shrink(StrictModel):
    """Larger images are re-encoded at download; all others stay as received."""

    longest_side: PositiveInt
    """In pixels; an image with a longer side is resized to it."""
    format: Literal["jpeg", "webp", "png"] = "jpeg"
    """Of the images that are resized. A JPEG has no transparency: it is laid over `matte`."""
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    """Of JPEG and WebP."""


class Card(StrictModel):
    """One data set: what it is, where it comes from, who may use it and how it is read."""

    name: str
    """Name of the data set; the file is called the same."""
    title: str
    """One line for people."""
    homepage: str
    """Where the data set is described by its makers."""
    license: str
    """SPDX identifier of the images' license, or a short name where none exists."""
    attribution: str
    """Whom to credit, as the license asks."""
    redistribute_codes: bool
    """Whether codes, which can be decoded to images, may be published."""
    source: Source
    matte: tuple[int, int, int] = (255, 255, 255)
    """RGB color (0 to 255) put behind transparent images."""
    encoder_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", exclude_if=lambda dtype: dtype == "float32"
    )
    """Number type of the image tokenizer's encoder for this set's codes; in half precision some are others."""
    columns: tuple[str, ...] = ()
    """Source columns kept beside the fixed ones."""
    tasks: dict[Task, TaskUse]
    """The tasks this set serves."""
    filters: tuple[FilterRule, ...] = ()
    """Rules of the filter stage, in order."""
    losses: Losses = Losses()
    """Above them download and filter print a warning, which the report shows too."""
    text_only: Literal["keep", "drop"] = Field(default="drop", exclude_if=lambda choice: choice == "drop")
    """Whether rows without an image are rows like all others, read by the branch that reads text, or quarantined."""
    several_images: Literal["keep", "drop"] = Field(default="drop", exclude_if=lambda choice: choice == "drop")
    """Whether rows of several images are rows like all others, each image where its mark stands, or quarantined."""
    shrink: Shrink | None = None
    """None: images are kept as received."""
    held_out: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the rows that nothing is trained on, chosen by hash of the key; stages are validated on them."""
    reader: str | None = None
    """Reads what an image shows, to say how much of it survives the codes: a name of
    `unifork.image_tokenizer.readers.READERS` or MODULE:OBJECT; None where images cannot be read exactly."""

    def holds_out(self, key: str) -> bool:
        """Whether a row is held out: the same in every experiment, and a larger share adds rows."""
        return uniform("held out", key) < self.held_out

    def __hash__(self) -> int:
        return hash(self.name)  # options are dicts; equal cards have equal names


def load_card(name: str, folder: Path | str = "datasets") -> Card:
    """The card of a data set. Raises ConfigError when the file and its name disagree."""
    return load_named(Card, "data set", name, Path(folder))


def expanded(text: str) -> Path:
    """A path of a card with `~` and environment variables filled in. Raises ConfigError.

    Tasks and manifests keep the text as the card has it: what a variable holds reaches no file, and a
    variable that is named like a credential is refused, since error messages show paths.
    """
    for name in (braced or plain for braced, plain in _VARIABLE.findall(text)):
        if _SECRET.search(name):
            raise ConfigError(f"{text!r}: a path must not hold ${name}; credentials do not belong in paths")
        if name not in os.environ:
            raise ConfigError(f"{text!r}: the environment variable {name} is not set")
    return Path(os.path.expandvars(text)).expanduser()


def located(text: str) -> Path:
    """An existing file or folder of a card. Raises ConfigError."""
    path = expanded(text)
    try:
        found = path.exists()
    except (OSError, ValueError):  # too long a name, or letters that no name has
        found = False
    if not found:
        raise ConfigError(f"{text!r}: no such file or folder (relative paths start in {os.getcwd()!r})")
    return path

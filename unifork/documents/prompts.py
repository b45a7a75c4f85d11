"""Prompt templates: what a sample of each stage reads like, and which part is supervised.

A template (`templates.yaml`) is a text with three kinds of mark: `<image>` stands for the image, `{name}` for a
field, and what is between `[[` and `]]` is what an understanding model is taught to write. Marks
count in templates only: whatever a caption or a dialogue says is text, special tokens included.

A dialogue becomes a system text and exchanges that are safe to train on, or the reason why not: nothing is guessed and
nothing is cut: a wrong mask is trained on silently. The image stands in front of the question whose turn has the
marker `<image>`, wherever in the turn the marker is (official code, data_utils); in front of the first question where
no turn has one. Several images stand where their markers are.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from unifork.config import MixtureEntry, read_yaml
from unifork.errors import ConfigError, Rejected, one_of
from unifork.shards.schema import CONVERSATIONS, IMAGE_MARK, ROLES
from unifork.vocabulary import DROPPED_PROMPT, TURN_START, Task

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Border = Literal["letters", "count"]
"""Which token is the first that is supervised, where a token can cross the border between given and supervised.

`letters`: the first that holds supervised letters alone. `count`: the one after as many tokens as the
given text has by itself, whatever it holds (official code): it can be one too early or too late.
"""


@dataclass(frozen=True)
class Template:
    """How rows of one text column are written for one task."""

    task: Task
    text: str = ""
    """For captions and plain texts: the whole sample with `{caption}`."""
    opening: str = ""
    """For dialogues: what stands before the first exchange; `{system}` is the dialogue's own text or SYSTEM."""
    turn: str = ""
    """For dialogues: one exchange with `{user}` and `{assistant}`; the image stands in one of them."""
    first_turn_only: bool = False
    """Whether later exchanges are left out."""
    border: Border = "letters"
    once: str = ""
    """A text that must stand once in every exchange, or nothing of the sample is supervised (official code)."""

    @property
    def images(self) -> int | None:
        """Images that every sample has; None for dialogues, which have those of their rows."""
        return None if self.turn else self.text.count(IMAGE_MARK)


INSTRUCTION = "Provide a one-sentence caption for the image."
TEMPLATES: dict[str, Template] = {
    name: Template(**fields) for name, fields in read_yaml(Path(__file__).with_name("templates.yaml")).items()
}


def template_named(name: str, place: str) -> Template:
    """A template by name. Raises ConfigError listing the known ones."""
    return TEMPLATES[one_of("prompt template", name, TEMPLATES, place)]


def template_for(entry: MixtureEntry, place: str) -> Template:
    """The template of a mixture entry. Raises ConfigError where it is not for its task or its kind of text."""
    template = template_named(entry.template, place)
    if template.task != entry.task:
        raise ConfigError(f"{place}: template {entry.template!r} is for {template.task}, the entry says {entry.task}")
    if bool(template.turn) != (entry.text == CONVERSATIONS):
        kind = CONVERSATIONS if template.turn else "captions"
        raise ConfigError(f"{place}: template {entry.template!r} is for {kind}, the entry reads {entry.text!r}")
    return template


@dataclass(frozen=True)
class Piece:
    """A stretch of a written sample.

    text: None where the image stands. supervised: a model is taught to write it. control: special
    tokens in it are control tokens; true of a template's own words, never of a field's.
    """

    text: str | None
    supervised: bool = False
    control: bool = False


IMAGE_PIECE = Piece(None)

_MARKS = re.compile(r"(<image>|\[\[|\]\]|\{\w+\})")


def laid_out(form: str, fields: Mapping[str, str]) -> list[Piece]:
    """A template's text as pieces, with its fields filled in."""
    pieces, supervised = [], False
    for number, part in enumerate(_MARKS.split(form)):
        if part == IMAGE_MARK:
            pieces.append(IMAGE_PIECE)
        elif part in ("[[", "]]"):
            supervised = part == "[["
        elif number % 2:
            pieces.append(Piece(fields[part[1:-1]], supervised))
        elif part:
            pieces.append(Piece(part, supervised, control=True))
    return pieces


UNCONDITIONAL = laid_out(f"{TURN_START}USER: {DROPPED_PROMPT}. ASSISTANT: {IMAGE_MARK}", {})
"""What a dropped prompt reads like, whatever the template (as in the official code)."""


@dataclass(frozen=True)
class Exchange:
    """One question with its answer; `image` says whether the image stands in front of the question."""

    question: str
    answer: str
    image: bool
    marked: bool = False
    """Whether images stand in the question, where its marks are."""


def dialogue(turns: Sequence[Mapping[str, str | None]], images: int) -> tuple[str, list[Exchange]]:
    """The system text and the exchanges of turns `{role, text}` that belong to so many images.

    The text is empty where the dialogue has none of its own. Raises Rejected with the reason when the turns cannot be
    read in exactly one way.
    """
    unknown = next((turn["role"] for turn in turns if turn["role"] not in ROLES), None)
    if unknown is not None or not all(turn["role"] for turn in turns):
        raise Rejected("broken_dialogue", f"unknown role {unknown!r}; known are {', '.join(ROLES)}")
    roles = [ROLES[str(turn["role"])] for turn in turns]
    texts = [turn["text"] or "" for turn in turns]
    system = ""
    if roles[:1] == ["system"]:
        system, roles, texts = texts[0], roles[1:], texts[1:]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise Rejected("broken_dialogue", f"roles are {roles[:6]}, not user and assistant in turn")
    questions, answers = texts[::2], texts[1::2]
    marks = _marks(system, questions, answers, images)
    exchanges = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        bare = question.replace(IMAGE_MARK, "").strip()
        if not bare and not marks[number]:
            raise Rejected("broken_dialogue", f"question {number + 1} is empty")
        if not answer.strip():
            raise Rejected("broken_dialogue", f"answer {number + 1} is empty")
        if images > 1:
            exchanges.append(Exchange(question.strip() if marks[number] else question, answer, False, marked=True))
        else:
            exchanges.append(Exchange(bare if IMAGE_MARK in question else question, answer, bool(marks[number])))
    return system if system.strip() else "", exchanges


def _marks(system: str, questions: list[str], answers: list[str], images: int) -> list[int]:
    """Images of each question."""
    if IMAGE_MARK in system:
        raise Rejected("broken_dialogue", "an image marker inside the system turn")
    if any(IMAGE_MARK in answer for answer in answers):
        raise Rejected("broken_dialogue", "an image marker inside an answer")
    marks = [question.count(IMAGE_MARK) for question in questions]
    if images == 1 and not any(marks):
        marks[0] = 1
    if sum(marks) != images:
        raise Rejected("broken_dialogue", f"image markers: {sum(marks)}, images: {images}")
    return marks


def written(template: Template, value: Any, images: int = 1) -> list[Piece]:
    """One row as pieces. value: a caption, or a list of turns `{role, text}`; images: how many the row has.

    Raises Rejected with the reason when the value does not fit the template.
    """
    if not value:
        raise Rejected("no_text", "no text")
    if template.text:
        if not isinstance(value, str):
            raise Rejected("broken_text", f"a caption is expected, {CONVERSATIONS} were given")
        if images != template.images:
            reason = "several_images" if images > 1 else "image_without_place" if images else "no_image"
            raise Rejected(reason, f"images: {images}, the template has a place for {template.images}")
        return laid_out(template.text, {"caption": _without_mark(value) if images else value})
    if isinstance(value, str):
        raise Rejected("broken_text", f"{CONVERSATIONS} are expected, a caption was given")
    system, exchanges = dialogue(value, images)
    if system and "{system}" not in template.opening:
        raise Rejected("broken_dialogue", "a system turn, the template has no place for it")
    parts = [_exchange(template, exchange) for exchange in exchanges[: 1 if template.first_turn_only else None]]
    if sum(part.count(IMAGE_PIECE) for part in parts) != images:
        raise Rejected("broken_dialogue", "the image belongs to a later question, the template writes only the first")
    parts[0] = laid_out(template.opening, {"system": system or SYSTEM}) + parts[0]
    supervisable = not template.once or all(_read(part).count(template.once) == 1 for part in parts)
    return [piece if supervisable else replace(piece, supervised=False) for part in parts for piece in part]


def question(template: Template, user: str, before: Sequence[Exchange] = (), image: bool = True) -> list[Piece]:
    """What a model is given to answer: the sample up to the supervised part.

    before: the exchanges of the dialogue so far. image: whether this question has the image in front of it.
    """
    if image and template.images == 0:
        raise Rejected("image_without_place", "the template has no place for an image")
    if template.text:
        last = laid_out(template.text, {"caption": ""})
    else:
        last = _exchange(template, Exchange(_without_mark(user), "", image))
    written = laid_out(template.opening, {"system": SYSTEM}) if template.turn else []
    written += [piece for exchange in before for piece in _exchange(template, exchange)]
    return written + list(takewhile(lambda piece: not piece.supervised, last))


def _exchange(template: Template, exchange: Exchange) -> list[Piece]:
    form = template.turn
    if not exchange.image:
        form = form.replace(f"{IMAGE_MARK}\n", "")
    elif not exchange.question:
        form = form.replace(f"{IMAGE_MARK}\n", IMAGE_MARK)
    pieces = laid_out(form, {"user": exchange.question, "assistant": exchange.answer})
    return [part for piece in pieces for part in _split(piece)] if exchange.marked else pieces


def _split(piece: Piece) -> Iterator[Piece]:
    """What people wrote, with an image at each mark in it."""
    for number, text in enumerate((piece.text or "").split(IMAGE_MARK)):
        if number or piece.text is None:
            yield IMAGE_PIECE
        if text:
            yield replace(piece, text=text)


def _read(pieces: list[Piece]) -> str:
    return "".join(IMAGE_MARK if piece.text is None else piece.text for piece in pieces)


def _without_mark(value: str) -> str:
    if IMAGE_MARK in value:
        raise Rejected("broken_text", f"the text contains the mark {IMAGE_MARK}")
    return value

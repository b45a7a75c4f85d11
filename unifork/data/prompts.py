"""Prompt templates as data: what a sample of each stage reads like, and which part is learned.

A template is a text with three kinds of mark: `<image>` stands for the picture, `{name}` for a
field, and what is between `[[` and `]]` is what an understanding model is taught to write. The
formats are those of the official code (its stages 1.0 to 5.0); `docs/reproducing.md` compares them
with the paper.
"""

import re
from dataclasses import dataclass
from typing import Any

from unifork.data.schema import CONVERSATIONS
from unifork.errors import UniForkError
from unifork.vocabulary import DROPPED_PROMPT, TURN_END, TURN_START, Task

IMAGE_MARK = "<image>"
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Unusable(UniForkError):
    """A row from which no document can be made; the message is the reason it is quarantined for."""


@dataclass(frozen=True)
class Template:
    """How rows of one text column are written for one task.

    text: for captions, the whole sample with `{caption}`.
    opening, turn: for dialogues, the beginning and one exchange with `{user}` and `{assistant}`;
    the picture stands in the first exchange. first_turn_only: later exchanges are left out.
    """

    task: Task
    text: str = ""
    opening: str = ""
    turn: str = ""
    first_turn_only: bool = False


INSTRUCTION = "Provide a one-sentence caption for the image."
GENERATE = f"{TURN_START}USER: {{caption}} ASSISTANT: {IMAGE_MARK}"

TEMPLATES: dict[str, Template] = {
    "generate-class": Template("generation", f"{TURN_START}{{caption}}{IMAGE_MARK}"),
    "name-class": Template("understanding", f"{TURN_START}{IMAGE_MARK}[[{{caption}}]]"),
    "generate-plain": Template("generation", f"{{caption}}{IMAGE_MARK}"),
    "caption-plain": Template("understanding", f"{IMAGE_MARK}\n{INSTRUCTION}[[{{caption}}{TURN_END}]]"),
    "generate": Template("generation", GENERATE),
    "answer-plain": Template(
        "understanding", turn=f"{IMAGE_MARK}\n{{user}}[[{{assistant}}{TURN_END}]]", first_turn_only=True
    ),
    "answers-plain": Template("understanding", turn=f"{IMAGE_MARK}\n{{user}}[[{{assistant}}{TURN_END}]]"),
    "caption": Template(
        "understanding",
        f"{TURN_START}{SYSTEM} USER: {IMAGE_MARK}\n{INSTRUCTION} ASSISTANT:[[ {{caption}}{TURN_END}]]",
    ),
    "answer": Template(
        "understanding",
        opening=f"{TURN_START}{SYSTEM} ",
        turn=f"USER: {IMAGE_MARK}\n{{user}} ASSISTANT:[[ {{assistant}}{TURN_END}]]",
    ),
}

UNCONDITIONAL = f"{TURN_START}USER: {DROPPED_PROMPT}. ASSISTANT: {IMAGE_MARK}"
"""What a dropped prompt reads like, whatever the template (as in the official code)."""


def written(template: Template, value: Any) -> str:
    """The marked text of one row: a caption, or a list of turns `{role, text}`.

    Raises Unusable with the reason when the value does not fit the template.
    """
    if not value:
        raise Unusable("no text")
    if template.text:
        if not isinstance(value, str):
            raise Unusable(f"a caption is expected, {CONVERSATIONS} were given")
        return template.text.replace("{caption}", _plain(value))
    exchanges = list(_exchanges(value))
    parts = [template.opening]
    for number, (user, assistant) in enumerate(exchanges[:1] if template.first_turn_only else exchanges):
        turn = template.turn if number == 0 else template.turn.replace(f"{IMAGE_MARK}\n", "")
        parts.append(turn.replace("{user}", _plain(user)).replace("{assistant}", _plain(assistant)))
    return "".join(parts)


def question(template: Template, user: str) -> str:
    """What a model is given to answer: the first exchange up to the learned part."""
    text = template.opening + template.turn.replace("{user}", _plain(user)) if template.turn else template.text
    return text.split("[[")[0]


@dataclass(frozen=True)
class Segment:
    """A stretch of text between pictures, with the character spans that are learned."""

    text: str
    learned: list[tuple[int, int]]


def segments(marked: str) -> list[Segment]:
    """Cut a marked text at the pictures and take the `[[ ]]` marks out."""
    parts = []
    inside = False
    for stretch in marked.split(IMAGE_MARK):
        text, spans = "", []
        for piece in re.split(r"(\[\[|\]\])", stretch):
            if piece == "[[":
                inside, start = True, len(text)
            elif piece == "]]":
                inside = False
                spans.append((start, len(text)))
            else:
                text += piece
        parts.append(Segment(text, spans))
    if inside:
        raise Unusable("a learned part crosses a picture")
    return parts


def _plain(value: str) -> str:
    """A field's text. Marks inside it would be taken for the template's, so they end the row."""
    for mark in (IMAGE_MARK, "[[", "]]", TURN_START, TURN_END):
        if mark in value:
            raise Unusable(f"the text contains the mark {mark}")
    return value


def _exchanges(turns: list[dict[str, str]]) -> list[tuple[str, str]]:
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) or not roles:
        raise Unusable(f"roles are {roles[:6]}, not user and assistant in turn")
    texts = [turn["text"].replace(f"{IMAGE_MARK}\n", "").replace(f"\n{IMAGE_MARK}", "") for turn in turns]
    return list(zip(texts[::2], texts[1::2], strict=True))

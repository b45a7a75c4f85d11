"""Dialogues as they come -> a system text and exchanges that are safe to train on, or the reason why not.

In: turns `{role, text}` of a shard, or a row of a LLaVA or InternVL json. Out: a `Dialogue`. Nothing
is guessed and nothing is cut: a dialogue that cannot be read in exactly one way is refused with a
reason, because a wrong mask is learned silently.

The picture stands in front of the question whose turn has the marker `<image>`, wherever in the turn
the marker is (official code, data_utils); in front of the first question where no turn has one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unifork.errors import UniForkError

IMAGE_MARK = "<image>"

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
"""Names of the roles; `human` and `gpt` are those of LLaVA and InternVL."""


class Unusable(UniForkError):
    """A row from which no document can be made; the message is the reason it is quarantined for."""


@dataclass(frozen=True)
class Exchange:
    """One question with its answer; `picture` says whether the picture stands in front of the question."""

    question: str
    answer: str
    picture: bool


@dataclass(frozen=True)
class Dialogue:
    """What a template writes; `system` is None where the dialogue has no text of its own for it."""

    system: str | None
    exchanges: list[Exchange]


def turns_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns `{role, text}` of a LLaVA or InternVL row (`image`, `conversations` of `{from, value}`).

    Roles are renamed where they are known and kept where not: `dialogue` judges them. Raises Unusable
    when the row has more than one picture or no list of turns.
    """
    images = pictures_of(row)
    if len(images) > 1:
        raise Unusable(f"{len(images)} pictures, a row holds one")
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Unusable("conversations is not a list of turns")
    roles = [str(turn.get("from")) for turn in turns]
    return [
        {"role": ROLES.get(role, role), "text": str(turn.get("value") or "")}
        for role, turn in zip(roles, turns, strict=True)
    ]


def pictures_of(row: Mapping[str, Any]) -> list[str]:
    """Paths of a row's pictures: `image` is a path, a list of paths, empty or absent."""
    images = row.get("image") or []
    return [images] if isinstance(images, str) else list(images)


def dialogue(turns: Sequence[Mapping[str, str | None]], pictures: int) -> Dialogue:
    """Read turns `{role, text}` that belong to `pictures` pictures (0 or 1).

    Raises Unusable with the reason when they cannot be read in exactly one way.
    """
    unknown = next((turn["role"] for turn in turns if turn["role"] not in ROLES), None)
    if unknown is not None or not all(turn["role"] for turn in turns):
        raise Unusable(f"unknown role {unknown!r}; known are {', '.join(ROLES)}")
    roles = [ROLES[str(turn["role"])] for turn in turns]
    texts = [turn["text"] or "" for turn in turns]
    system = None
    if roles[:1] == ["system"]:
        system, roles, texts = texts[0], roles[1:], texts[1:]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise Unusable(f"roles are {roles[:6]}, not user and assistant in turn")
    questions, answers = texts[::2], texts[1::2]
    place = _place_of_picture(system or "", questions, answers, pictures)
    exchanges = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        asked = question.replace(IMAGE_MARK, "").strip() if IMAGE_MARK in question else question
        if not asked.strip() and number != place:
            raise Unusable(f"question {number + 1} is empty")
        if not answer.strip():
            raise Unusable(f"answer {number + 1} is empty")
        exchanges.append(Exchange(asked, answer, number == place))
    return Dialogue(system if system and system.strip() else None, exchanges)


def _place_of_picture(system: str, questions: list[str], answers: list[str], pictures: int) -> int | None:
    """The number of the question that the picture stands in front of."""
    if pictures > 1:
        raise Unusable(f"{pictures} pictures, a document holds one")
    if IMAGE_MARK in system:
        raise Unusable("an image marker inside the system turn")
    if any(IMAGE_MARK in answer for answer in answers):
        raise Unusable("an image marker inside an answer")
    marks = [number for number, question in enumerate(questions) for _ in range(question.count(IMAGE_MARK))]
    if len(marks) > pictures:
        raise Unusable(f"image markers: {len(marks)}, pictures: {pictures}")
    return marks[0] if marks else 0 if pictures else None

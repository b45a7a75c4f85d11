"""What an answer says: a text goes in; yes, no, a letter or a normalized text comes out, None for anything else.

Rules and scores of benchmarks are built from these readings. Those of their makers are kept as published, because
reported numbers rest on them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from unifork.config import read_yaml
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, accuracy
from unifork.evaluation.suites import Answer, Rule, Verdict

LETTERS = "ABCDEFGH"
"""Of choices."""
YES_NO = ("yes", "no")
LABELS = read_yaml(Path(__file__).with_name("labels.yaml"))
"""Names of tasks and types, by benchmark."""


def pope_yes(answer: str) -> bool:
    """POPE's own rule: no if the first sentence has the word `No`, `no` or `not`, otherwise yes.

    An empty answer, `NO` and `no!` are all yes.
    """
    words = answer.split(".", maxsplit=1)[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def mme_yes(answer: str) -> bool | None:
    """MME's own rule: yes or no in the first four letters, nothing stripped: `nothing` is no, `oh yes` is neither."""
    begin = answer.lower()[:4]
    return True if "yes" in begin else False if "no" in begin else None


def strict_yes(answer: str) -> bool | None:
    """True for `yes`, False for `no`, in any case and with or without a full stop; None for anything else."""
    return {"yes": True, "no": False}.get(normalized(answer))


def normalized(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def yes_no(read: Callable[[str], bool | None]) -> Rule:
    """The rule of questions whose truth is `yes` or `no`."""
    words = {True: "yes", False: "no", None: None}
    return letter(lambda text, _: words[read(text)])


def letter(read: Callable[[str, Mapping[str, str]], str | None]) -> Rule:
    """The rule of questions with choices, `about["options"]` by letter, whose truth is a letter."""

    def rule(item: Item, answer: Answer) -> Verdict:
        reading = read(answer.text, item.about.get("options", {}))
        return Verdict(reading, float(reading == item.truth))

    return rule


def strict_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The bare letter, in any case and with or without a full stop."""
    found = normalized(answer).upper()
    return found if found in options else None


def exact_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """The text is the letter and nothing else (LLaVA's converter for SEED-Bench): `B.` and `c` are none."""
    return answer if answer in options else None


def choices(row: Mapping[str, Any], columns: Iterable[str]) -> dict[str, str]:
    """The choices of a row, by letter, up to the first column that holds nothing. Raises LookupError without any."""
    texts = takewhile(lambda text: text not in (None, ""), (row.get(column) for column in columns))
    if not (options := dict(zip(LETTERS, map(str, texts), strict=False))):
        raise LookupError(f"no choices in {row!r:.200}")
    return options


def with_choices(question: str, options: Mapping[str, str]) -> str:
    """A question with a line for every choice."""
    return "\n".join([question, *(f"{mark}. {text}" for mark, text in options.items())])


def exact(item: Item, answer: Answer) -> Verdict:
    """The rule of questions with a short answer: equality of normalized texts."""
    reading = normalized(answer.text)
    return Verdict(reading or None, float(reading == normalized(str(item.truth))))


def by_type(items: Sequence[Item], right_I: np.ndarray, weight: float = 1.0) -> list[Measure]:
    """Accuracy over all questions, and over those of each `about["type"]`."""
    types_I = np.array([item.about["type"] for item in items])
    members = {f"accuracy_{name}": types_I == name for name in sorted({*types_I.tolist()} - {"all"})}
    members = {"accuracy": types_I != "", **members}
    return [accuracy(name, right_I, members_I, weight=weight) for name, members_I in members.items()]


def commonest(groups: Sequence[str], answers: Sequence[str]) -> dict[str, str]:
    """The most common answer of every group: what a model that sees nothing of an item but its group would say."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for group, answer in zip(groups, answers, strict=True):
        counts[group][answer] += 1
    return {group: min(found, key=lambda text: (-found[text], text)) for group, found in counts.items()}

"""DPG-Bench: 1,065 long prompts, four images each; a network answers questions that depend on each other.

Files: `dpg_bench.csv` and `prompts/<id>.txt` beside it. Answers: JSON of proposition_id and text for each image, what
`examine` writes, or a file of them (`question_id` is `<id>/<number of the image>`). A question counts when its answer
is exactly `yes` and those of the questions that it depends on are.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from unifork.config import StrictModel
from unifork.errors import DataError
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item, faults
from unifork.evaluation.statistics import Measure, accuracy
from unifork.evaluation.suites import Answer, Suite, Verdict
from unifork.images import open_image

TILES = 4
"""Images of a prompt: the tiles of one file, 2 x 2, row by row."""
YES = "yes"


def read(archive: Archive, _: StrictModel, __: int) -> list[Item]:
    """Four items for every prompt. Raises DataError for questions that depend on none of their prompt's.

    `about["official"]`: the questions that the official script has. It takes the first row for a heading, and where
    rows of a prompt are apart, the last ones alone.
    """
    path = archive.path("**/dpg_bench.csv")
    graphs: dict[str, dict[str, dict[str, Any]]] = {}
    official: dict[str, list[str]] = {}
    before = None
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file)):
            name, question = row["item_id"], str(int(row["proposition_id"]))
            parents = [str(int(parent)) for parent in row["dependency"].split(",") if int(parent)]
            graphs.setdefault(name, {})[question] = {"text": row["question_natural_language"], "parents": parents}
            if number:
                official[name] = [*(official[name] if name == before else ()), question]
                before = name
    if wrong := [name for name, graph in graphs.items() if any({*q["parents"]} - {*graph} for q in graph.values())]:
        raise DataError(f"{path}: {faults('prompts have questions that depend on no question of theirs', wrong)}")
    items = []
    for name, graph in graphs.items():
        text = archive.path(str(path.relative_to(archive.folder).parent / "prompts" / f"{name}.txt"))
        prompt = text.read_text(encoding="utf-8").strip()
        chance = float(np.mean([0.5 ** len(_needed(question, graph)) for question in graph]))
        for tile in range(TILES):
            about = {"file": name, "tile": tile, "official": official.get(name, [])}
            items.append(Item(f"{name}/{tile}", prompt, graph, name, chance=chance, about=about))
    return items


def _needed(question: str, graph: Mapping[str, Any]) -> set[str]:
    """A question and all that it depends on, directly or not."""
    found, waiting = set[str](), [question]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += graph[name]["parents"]
    return found


def examine(networks: Mapping[str, Any], item: Item, data: bytes) -> str:
    """What the network `answerer` answers to every question."""
    image = open_image(data).convert("RGB")
    return json.dumps({name: networks["answerer"](image, question["text"]) for name, question in item.truth.items()})


def official(item: Item, answer: Answer) -> Verdict:
    """The share of right questions as published: the questions that the script has, parents read in its order."""
    graph, order = item.truth, item.about["official"]
    if not order or any({*graph[question]["parents"]} - {*order} for question in order):
        return Verdict("", None, ("the official script fails on this prompt and leaves it out",))

    def share_of(yes: dict[str, bool]) -> float:
        for question in order:
            yes[question] = yes[question] and all(yes[parent] for parent in graph[question]["parents"])
        return sum(yes.values()) / len(yes)

    return _judged(answer, order, share_of)


def corrected(item: Item, answer: Answer) -> Verdict:
    """The share of right questions of all; one is right with all that it depends on, in whatever order."""
    needed = [_needed(question, item.truth) for question in item.truth]
    return _judged(answer, list(item.truth), lambda yes: sum(all(yes[n] for n in of) for of in needed) / len(needed))


def _judged(answer: Answer, order: Sequence[str], share_of: Callable[[dict[str, bool]], float]) -> Verdict:
    try:
        texts = dict(json.loads(answer.text))
        if odd := [question for question in order if not isinstance(texts[question], str)]:
            raise TypeError(f"{odd[0]}: {texts[odd[0]]!r} is no text")
        return Verdict(texts, share_of({question: texts[question] == YES for question in order}))
    except (ValueError, TypeError, KeyError) as error:
        return Verdict(None, 0.0, (f"not an answer to every question: {error}",))


def measures(_: Sequence[Item], right_I: np.ndarray, __: np.ndarray) -> list[Measure]:
    """The mean over images in percent; what the rule leaves out is not counted."""
    counted_I = ~np.isnan(right_I)
    return [accuracy("dpg", np.nan_to_num(right_I), counted_I, weight=100.0)]


SUITE = Suite(read, {"official": official, "corrected": corrected}, measures, examine=examine)

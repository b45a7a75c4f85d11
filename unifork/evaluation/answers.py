"""Answers in whatever file they come: official layouts are read as they are, joined to items, and written back.

In: a file of LLaVA's answers, a submission for VQA, GQA or SEED-Bench, a folder of MME's tool, or what `answer` wrote.
Out: one answer for every item. Answers are joined by id and prompt, never by place: ids of MME, SEED-Bench and others
are no keys, and two versions of POPE differ in their questions alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FunctionType
from typing import Any

from unifork.config import EvalCard
from unifork.errors import DataError
from unifork.evaluation.archive import read_json, read_text, table_rows
from unifork.evaluation.items import Item, faults
from unifork.evaluation.names import MADE_ON
from unifork.evaluation.suites import Answer
from unifork.registry import Registry
from unifork.shards.job import read_table
from unifork.shards.manifest import MANIFEST, read_manifest

FIELDS = (
    ("question_id", "text"), ("question_id", "answer"), ("questionId", "prediction"), ("question_id", "prediction"),
    ("index", "prediction"), ("filename", "correct"),
)  # fmt: skip
"""Names of id and answer: LLaVA's answers; submissions for VQA, GQA, SEED-Bench and MMBench, after a converter; results
of GenEval's scorer."""
MME_TAIL = "Please answer yes or no."
ESCAPES = {"\\": "\\", "\t": "t", "\n": "n", "\r": "r"}
"""Letters that would break a line of MME's tool, and what stands for them after a backslash."""
LETTERS = {mark: letter for letter, mark in ESCAPES.items()}
Rows = Sequence[tuple[Item, Answer | None]]
"""Items in their official order, with their answers as far as there are any."""
EXPORTS: Registry[FunctionType] = Registry(
    "format",
    FunctionType,
    {"llava": "unifork.evaluation.answers:llava"}
    | {name: f"unifork.evaluation.understanding.{name}:export" for name in ("mme", "vqa", "gqa", "seed")}
    | dict.fromkeys(("geneval", "mjhq", "dpg"), "unifork.evaluation.generation.layout:export"),
)
"""Layouts that answers are written in: functions of a card and rows that give texts or bytes by file name."""


def origin_of(answers: Path) -> dict[str, Any]:
    """`model`, `decoding` and `seed` of answers, as their folder says; of a file, which says nothing, its name.

    What decides the last bits of answers beside those, the device and torch, belongs to their decoding.
    """
    if not (answers / MANIFEST).exists():
        return {"model": str(answers), "decoding": "not recorded", "seed": None}
    manifest = read_manifest(answers)
    tables = [read_table(answers, shard, ["id"]) for shard in manifest.shards if shard.path.endswith(".parquet")]
    places = {place for table in tables if (place := (table.schema.metadata or {}).get(MADE_ON))}
    origin = {key: manifest.lineage[key] for key in ("model", "decoding", "seed")}
    for place in map(json.loads, sorted(places)):
        origin["decoding"] += f", on {place['device']} by torch {place['torch']}"
    return origin


def read_answers(path: Path) -> list[Answer]:
    """All answers of a file or folder. Raises DataError naming it and the formats that are read."""
    if (path / MANIFEST).exists():
        return list(_own(path))
    if path.is_dir():
        if not (files := sorted(path.glob("*.txt"))):
            raise DataError(f"{path}: no manifest.json, no <task>.txt of MME's tool; images: `unifork answers examine`")
        return [answer for file in files for answer in _mme(file)]
    plain = table_rows(path) if path.suffix == ".tsv" else read_json(path)
    rows = [row if isinstance(row, dict) else {} for row in (plain if isinstance(plain, list) else [plain])]
    fields = next((names for names in FIELDS if rows and rows[0].keys() >= {*names}), None)
    lacking = [f"entry {number}" for number, row in enumerate(rows, 1) if not row.keys() >= {*(fields or FIELDS[0])}]
    if lacking or fields is None:
        allowed = " or ".join(f"{a}, {b}" for a, b in FIELDS)
        where = f"of {len(rows)} entries {faults('lack them', lacking)}"
        raise DataError(f"{path}: no answers: every entry needs the keys {allowed}; {where}")
    name, given = fields
    if given == "text" and "image" in rows[0] and "prompt" not in rows[0]:
        raise DataError(f"{path}: these are questions: entries have an `image` and no `prompt`")
    kind, allowed = (bool, "true or false") if given == "correct" else (str, "a text, or null where it is empty")
    if odd := [f"{row[name]} has {row[given]!r:.99}" for row in rows if not isinstance(row[given], kind | None)]:
        raise DataError(f"{path}: {faults(f'values of {given!r} are not {allowed}', odd)}")
    texts = ["" if row[given] is None else str(row[given]) for row in rows]
    return [
        Answer(_key(row[name]), text, None, row.get("prompt"), given != "text")
        for row, text in zip(rows, texts, strict=True)
    ]


def _own(folder: Path) -> Iterator[Answer]:
    manifest = read_manifest(folder)
    if manifest.kind != "answers":
        raise DataError(f"{folder}: holds {manifest.kind}, not answers")
    for shard in manifest.shards:
        for row in read_table(folder, shard).to_pylist():
            yield Answer(row["id"], row["text"] or "", row["image"], row["prompt"])


def _mme(path: Path) -> Iterator[Answer]:
    """Lines `image, question, truth, answer` of one task."""
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), 1):
        parts = line.split("\t")
        if len(parts) != 4:
            raise DataError(f"{path}, line {number}: {len(parts)} fields; image, question, truth and answer are needed")
        text = re.sub(r"\\(.)", lambda found: LETTERS.get(found[1], found[0]), parts[3])
        yield Answer(f"{path.stem}/{parts[0]}", text, None, without_tail(parts[1]))


def escaped(text: str) -> str:
    """A text as one field of a line."""
    return "".join(f"\\{ESCAPES[letter]}" if letter in ESCAPES else letter for letter in text)


def llava(card: EvalCard, rows: Rows) -> dict[str, str]:
    """Answers as LLaVA's scripts write them: an object a line."""
    lines = [
        {"question_id": item.about.get("question_id", item.id), "prompt": card.answer.form(item.question)}
        | {"text": answer.text, "answer_id": item.id, "model_id": "unifork", "metadata": {}}
        for item, answer in rows
        if answer
    ]
    return {"llava.jsonl": "".join(json.dumps(line) + "\n" for line in lines)}


def without_tail(question: str) -> str:
    """A question of MME without its request, before which there may be two spaces."""
    return question.replace(MME_TAIL, "").strip()


def _key(name: Any) -> str:
    """An id; of an image in GenEval's layout, its prompt and number."""
    image = re.search(r"(?:^|/)(\d+)/samples/(\d+)\.png$", str(name))
    return f"{int(image[1]):05d}/{int(image[2]):04d}" if image else str(name).replace("/images/", "/")


def join(
    card: EvalCard, items: Sequence[Item], answers: Sequence[Answer], place: str, partial: bool = False
) -> dict[str, Answer]:
    """The answer of each item, by its id.

    A prompt may lack the tail of the card's form: LLaVA's files for MMBench do.
    items: all of the benchmark, also those that are not scored. partial: items may lack answers. Raises DataError
    that counts and names answers of another prompt, doubled and unknown ones, those that may be of several items, and
    items without an answer.
    """
    waiting: dict[str, list[Item]] = {}
    for item in items:
        for key in {item.id, _key(item.about.get("question_id", item.id))}:
            waiting.setdefault(key, []).append(item)
    found: dict[str, Answer] = {}
    wrong: dict[str, list[str]] = {}
    bare = {(answer.id, answer.text) for answer in answers if answer.prompt is None}
    several = Counter(name for name, _ in bare)
    for answer in answers:
        named = waiting.get(answer.id, [])
        fitting = [item for item in named if answer.prompt in (None, item.question, card.answer.form(item.question))]
        free = next((item for item in fitting if item.id not in found), None)
        if answer.prompt is None and len(named) > 1 and several[answer.id] > 1:
            wrong.setdefault("answers lack a prompt, and their id is that of several items", []).append(answer.id)
        elif free is not None:
            found[free.id] = answer
        elif fitting:
            wrong.setdefault("answers come twice", []).append(answer.id)
        elif named:
            wanted = card.answer.form(named[0].question)
            shown = f"{answer.id} has {answer.prompt!r:.200}, the item {wanted!r:.200}"
            wrong.setdefault("answers are to another prompt", []).append(shown)
        else:
            wrong.setdefault("answers are to no item", []).append(answer.id)
    scored = [item for item in items if not card.items.splits or item.split in card.items.splits]
    missing = [item.id for item in scored if item.id not in found]
    if missing and not partial:
        wrong["items have no answer"] = missing
    if wrong:
        raise DataError(f"{place}: {'; '.join(faults(what, names) for what, names in wrong.items())}")
    return found

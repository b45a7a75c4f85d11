"""GQA: open questions with a short answer; string equality on the balanced questions.

Files: `testdev_balanced_questions.json` (by id: question, imageId, answer, types), or the Hub's two Parquet tables in
folders whose names end in `instructions` and `images`. Rule: LLaVA's converter (full stops at the end go, lower case),
then the makers' comparison.
"""

import json
from collections.abc import Sequence

import numpy as np

from unifork.config import EvalCard, StrictModel
from unifork.evaluation.answers import Rows
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, share
from unifork.evaluation.suites import Answer, Suite, Verdict
from unifork.evaluation.understanding.answers import commonest, normalized


class Options(StrictModel):
    """Of its card."""

    images: str = "images"
    """Folder of the images, below that of the files."""


def read(archive: Archive, _: Options, __: int) -> list[Item]:
    """The balanced questions."""
    tables = [(row["id"], row) for _, row in archive.table("**/*instructions*/*.parquet")]
    places = {row["id"]: name for name, row in archive.table("**/*images*/*.parquet")}
    rows = tables or list(archive.json("**/testdev_balanced_questions.json").items())
    rows = [(name, row) for name, row in rows if row.get("isBalanced", True)]
    kinds = [str((row.get("types") or {}).get("structural", "all")) for _, row in rows]
    common = commonest(kinds, [row["answer"] for _, row in rows])
    return [
        Item(
            str(name), row["question"], row["answer"], row["imageId"], "all",
            places.get(row["imageId"], f"{row['imageId']}.jpg"), float(common[kind] == row["answer"]), {"type": kind},
        )
        for kind, (name, row) in zip(kinds, rows, strict=True)
    ]  # fmt: skip


def converted(answer: Answer) -> str:
    """What a submission holds: LLaVA's converter takes full stops from the end and capitals."""
    return answer.text if answer.converted else answer.text.rstrip(".").lower()


def official(item: Item, answer: Answer) -> Verdict:
    """Equality, nothing stripped but full stops at the end."""
    reading = converted(answer)
    return Verdict(reading, float(reading == item.truth))


def strict(item: Item, answer: Answer) -> Verdict:
    """Equality of normalized texts."""
    reading = normalized(answer.text)
    return Verdict(reading or None, float(reading == normalized(item.truth)))


def export(_: EvalCard, rows: Rows) -> dict[str, str]:
    """A submission."""
    return {"gqa.json": json.dumps([{"questionId": item.id, "prediction": converted(a)} for item, a in rows if a])}


def measures(items: Sequence[Item], right_I: np.ndarray, _: np.ndarray) -> list[Measure]:
    """Accuracy over all questions, and over those of each structural type."""
    kinds_I = np.array([item.about["type"] for item in items])
    found = [Measure("accuracy", (share(right_I, kinds_I != ""),), kinds_I != "")]
    for kind in sorted({*kinds_I.tolist()} - {"all"}):
        found.append(Measure(f"accuracy_{kind}", (share(right_I, kinds_I == kind),), kinds_I == kind))
    return found


SUITE = Suite(read, {"official": official, "strict": strict}, measures, Options)

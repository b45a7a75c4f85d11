"""GQA: open questions with a short answer; string equality on the balanced questions.

Files: `testdev_balanced_questions.json` (by id: question, imageId, answer, types), or the Hub's two Parquet tables in
folders whose names end in `instructions` and `images`. Rule: LLaVA's converter (full stops at the end go, lower case),
then the makers' comparison.
"""

import json

from unifork.config import EvalCard, StrictModel
from unifork.evaluation.answers import Rows
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item
from unifork.evaluation.suites import Answer, Suite, Verdict
from unifork.evaluation.understanding.answers import by_type, commonest, exact


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
    return Verdict(reading, float(reading == str(item.truth)))


def export(_: EvalCard, rows: Rows) -> dict[str, str]:
    """A submission."""
    return {"gqa.json": json.dumps([{"questionId": item.id, "prediction": converted(a)} for item, a in rows if a])}


RULES = {"official": official, "strict": exact}
SUITE = Suite(read, RULES, lambda items, right_I, _: by_type(items, right_I), Options)

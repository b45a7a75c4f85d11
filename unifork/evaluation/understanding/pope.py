"""POPE: is this object in the image? Three splits of the same images and the same positive questions.

Files (AoiDragon/POPE, output/coco): `coco_pope_{adversarial,popular,random}.json`, an object a line with question_id
(from 1 in each), image, text, label; or the Hub's Parquet with question, answer, category. Two versions exist, 8,910
and 9,000 questions; papers of LLaVA's kind report the mean of the three F1 on the first.
"""

from collections.abc import Sequence

import numpy as np

from unifork.config import StrictModel
from unifork.errors import one_of
from unifork.evaluation.archive import Archive
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, binary, mean
from unifork.evaluation.suites import Suite
from unifork.evaluation.understanding.answers import YES_NO, pope_yes, strict_yes, yes_no

SPLITS = ("adversarial", "popular", "random")
FIRST_ID = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
"""LLaVA's question file counts on from here in each split."""


class Options(StrictModel):
    """Of its card."""

    images: str = "val2014"
    """Folder of the images, below that of the files."""


def read(archive: Archive, _: Options, __: int) -> list[Item]:
    """All questions, split by split."""
    rows = [
        (row["category"], name, row["image_source"], row["question"], row["answer"]) for name, row in archive.table()
    ]
    for split in SPLITS if not rows else ():
        lines = archive.json(f"**/coco_pope_{split}.json*")
        rows += [(split, line["image"], line["image"], line["text"], line["label"]) for line in lines]
    items = []
    for split in SPLITS:
        chosen = [row[1:] for row in rows if one_of("category", row[0], SPLITS, row[1]) == split]
        for number, (image, source, question, label) in enumerate(chosen, 1):
            about = {"question_id": FIRST_ID[split] + number}
            items.append(Item(f"{split}/{number}", question, label.strip().lower(), source, split, image, 0.5, about))
    return items


def measures(items: Sequence[Item], right_I: np.ndarray, yes_I: np.ndarray) -> list[Measure]:
    """Five scores for each split, and their mean F1, which papers call POPE."""
    splits_I = np.array([item.split for item in items])
    labels_I = np.array([item.truth == "yes" for item in items], dtype=np.float64)
    found: list[Measure] = []
    for split in (name for name in SPLITS if name in splits_I):
        members_I = splits_I == split
        ratios = binary(yes_I, labels_I, right_I, members_I)
        found += [Measure(name, (ratio,), members_I, split) for name, ratio in ratios.items()]
    return [*found, mean("pope", [measure for measure in found if measure.name == "f1"], "all")]


SUITE = Suite(read, {"official": yes_no(pope_yes), "strict": yes_no(strict_yes)}, measures, Options, truths=YES_NO)

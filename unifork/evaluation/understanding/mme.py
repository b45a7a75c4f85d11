"""MME: two yes/no questions about every image, 14 tasks; a task scores 0 to 200, perception 2000, cognition 800.

Files: the release (`<task>/*.txt` beside the images, or `<task>/questions_answers_YN/*.txt` and `<task>/images/`), the
folder of its tool (`<task>.txt` with image, question, truth and any answer), or the Hub's Parquet.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from unifork.config import EvalCard, StrictModel
from unifork.errors import DataError, one_of
from unifork.evaluation.answers import MME_TAIL, Rows, escaped, without_tail
from unifork.evaluation.archive import Archive, read_text
from unifork.evaluation.items import Item
from unifork.evaluation.statistics import Measure, share, together, total
from unifork.evaluation.suites import Suite
from unifork.evaluation.understanding.answers import LABELS, YES_NO, mme_yes, strict_yes, yes_no

SUMS: dict[str, list[str]] = LABELS["mme"]
TASKS = (*SUMS["perception"], *SUMS["cognition"])
ENDINGS = (".jpg", ".png", ".jpeg")


def read(archive: Archive, _: StrictModel, __: int) -> list[Item]:
    """All questions, the two of an image one after the other."""
    items: list[Item] = []
    for task, image, place, question, truth in _rows(archive):
        name = f"{task}/{image}"
        about = {"question_id": name, "task": task, "file": image}
        number = sum(item.cluster == name for item in items[-2:])
        plain = without_tail(question)
        items.append(Item(f"{name}#{number}", plain, str(truth).strip().lower(), name, "all", place, 0.5, about))
    return items


def _rows(archive: Archive) -> Iterator[tuple[str, str, str, str, str]]:
    """Task, image, its name in the archive, question, truth."""
    for place, row in archive.table():
        name = str(row["question_id"]).rpartition("/")[2]
        yield one_of("category", row["category"], TASKS, place), name, place, row["question"], row["answer"]
    for task in TASKS:
        for path in sorted(archive.folder.glob(f"**/{task}.txt")):  # of the tool: without images
            for line in read_text(path).splitlines():
                image, question, truth = line.split("\t")[:3]
                yield task, image, f"{task}/{image}", question, truth
        for path in sorted(archive.folder.glob(f"**/{task}/**/*.txt")):
            lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
            folders = (path.parent, path.parents[1] / "images")
            beside = [folder / (path.stem + ending) for folder in folders for ending in ENDINGS]
            image_path = next((image for image in beside if image.exists()), None)
            if image_path is None or any(len(line) != 2 for line in lines):
                raise DataError(f"{path}: needs an image beside it or in `images`, and lines of question and answer")
            for question, truth in lines:
                yield task, image_path.name, str(image_path.relative_to(archive.folder)), question, truth


def measures(items: Sequence[Item], right_I: np.ndarray, _: np.ndarray) -> list[Measure]:
    """Accuracy + accuracy of whole images, in percent, for each task; their sums over perception and cognition."""
    tasks_I, images = np.array([item.about["task"] for item in items]), [item.cluster for item in items]
    found = {}
    for task in dict.fromkeys(tasks_I):
        members_I = tasks_I == task
        ratios = (share(right_I, members_I, 100.0), together(right_I, images, members_I, 100.0))
        found[str(task)] = Measure(str(task), ratios, members_I)
    whole = {name: tasks for name, tasks in SUMS.items() if found.keys() >= {*tasks}}
    return [*(total(name, [found[task] for task in tasks]) for name, tasks in whole.items()), *found.values()]


def export(_: EvalCard, rows: Rows) -> dict[str, str]:
    """Files of MME's tool: `<task>.txt` with image, question, truth, answer; what would break a line is escaped."""
    files: dict[str, str] = {}
    for item, answer in rows:
        text = escaped(answer.text if answer else "")
        line = [item.about["file"], f"{item.question} {MME_TAIL}", item.truth.capitalize(), text]
        name = f"{item.about['task']}.txt"
        files[name] = files.get(name, "") + "\t".join(line) + "\n"
    return files


SUITE = Suite(read, {"official": yes_no(mme_yes), "strict": yes_no(strict_yes)}, measures, truths=YES_NO)

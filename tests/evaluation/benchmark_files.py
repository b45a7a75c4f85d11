"""Small official files of every benchmark in each layout that is read, and the real answers of a published model.

Their images are cut from a photo: of Grace Hopper by the US Navy, in the public domain, which matplotlib brings along.
"""

import base64
import io
import json
import lzma
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.cbook import get_sample_data
from PIL import Image

from unifork.config import load_eval
from unifork.evaluation.archive import Archive
from unifork.evaluation.suites import suite_of

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "fixtures" / "real_answers"
TAIL = "\nAnswer the question using a single word or phrase."
NAMES = ("pope", "mme", "seed", "vqav2", "gqa", "mmbench_dev")
COLORS = ("red", "green", "blue")
MME_TASKS = {"existence": True, "artwork": False}
"""Task: whether its texts lie beside the images."""


def png(color="red", side=8):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), color).save(stream, "PNG")
    return stream.getvalue()


@cache
def photo(name, side=None, form="JPEG"):
    """An image file with another cut of the photo for each name: a square of a side, or of any size."""
    with Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)) as whole:
        rng = np.random.default_rng(zlib.crc32(repr(name).encode()))
        size = rng.integers(150, 400, 2) if side is None else (2 * side, 2 * side)
        left, top = (int(rng.integers(0, most - length)) for most, length in zip(whole.size, size, strict=True))
        cut = whole.crop((left, top, left + int(size[0]), top + int(size[1])))
    stream = io.BytesIO()
    (cut if side is None else cut.resize((side, side))).save(stream, form)
    return stream.getvalue()


def card_of(name, **changes):
    """A card that asks for no number of rows."""
    card = load_eval(name, ROOT / "datasets" / "evals")
    return card.model_copy(update={"items": card.items.model_copy(update={"rows": None, **changes})})


def items_of(name, folder, **changes):
    """A card, the archive of its files, and all its items."""
    card = card_of(name, **changes)
    suite, options = suite_of(card)
    archive = Archive(card, options, Path(folder))
    return card, archive, suite.read(archive, options, 0)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_text(content)
    else:
        path.write_text(json.dumps(content))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


# ------------------------------------------------------------------------------------- official files


def pope(folder):
    for split in ("adversarial", "popular", "random"):
        rows = []
        for color in COLORS:
            for truth in ("yes", "no"):
                text = f"Is there a {color if truth == 'yes' else split} thing in the image?"
                image = f"COCO_val2014_{color}.jpg"
                rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": truth})
                write(folder / "val2014" / image, photo(color))
        write(folder / f"coco_pope_{split}.json", lines(rows))


def mme(folder):
    for task, flat in MME_TASKS.items():
        for color in COLORS:
            place = folder / "MME_Benchmark_release_version" / task
            text = f"Is this {color}? Please answer yes or no.\tYes\nIs this black?  Please answer yes or no.\tNo\n\n"
            write(place / ("" if flat else "questions_answers_YN") / f"{color}.txt", text)
            write(place / ("" if flat else "images") / f"{color}.jpg", photo(color))


def seed(folder):
    questions = []
    for number in range(8):
        kind = "video" if number == 7 else "image"
        row = {"answer": "ABCD"[number % 4], "data_id": f"{number // 2}", "data_type": kind}
        row |= {f"choice_{mark}": f"thing {mark}" for mark in "abcd"}
        row |= {"question": f"What is {number}?", "question_id": str(100 + max(number, 1))}
        questions.append(row | {"question_type_id": 10 if kind == "video" else 1 + number % 2})
        write(folder / "SEED-Bench-image" / f"{number // 2}", photo(COLORS[number // 2 % 3]))
    write(folder / "SEED-Bench.json", {"questions": questions})


def vqav2(folder):
    questions, people = [], []
    for number in range(8):
        image = number // 2
        questions.append({"image_id": image, "question": f"What about {number}?", "question_id": 10 * number})
        texts = ["yes"] * 10 if number < 4 else ["2"] * 8 + ["two", "three"]
        answers = [{"answer": text, "answer_id": n, "answer_confidence": "yes"} for n, text in enumerate(texts, 1)]
        kind = "yes/no" if number < 4 else "number"
        people.append({"question_id": 10 * number, "answer_type": kind, "image_id": image, "answers": answers})
        people[-1]["multiple_choice_answer"] = texts[0]
        write(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg", photo(COLORS[image % 3]))
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", {"annotations": people})


def gqa(folder):
    questions = {}
    for number in range(9):
        kind, answer = ("verify", "yes" if number % 3 else "no") if number < 6 else ("query", "table")
        row = {"question": f"What about {number}?", "imageId": f"n{number // 3}", "answer": answer}
        questions[f"0{number}"] = row | {"isBalanced": number != 8, "types": {"structural": kind}}
        write(folder / "images" / f"n{number // 3}.jpg", photo(COLORS[number // 3]))
    write(folder / "testdev_balanced_questions.json", questions)


def mmbench_dev(folder):
    rows = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage"]
    for question, options in ((241, 4), (252, 3), (263, 2)):
        for turn in range(options):
            texts = [f"choice {(n + turn) % options}" for n in range(options)] + ["", ""]
            truth = "ABCD"[-turn % options]
            image = base64.b64encode(photo(COLORS[options - 2])).decode() if turn == 0 else str(question)
            hint = "Some words." if question == 252 else "nan"
            cells = [turn * 1_000_000 + question, f"Which of {question}?", hint, *texts[:4], truth, "any", image]
            rows.append("\t".join(map(str, cells)))
    write(folder / "mmbench_dev_20230712.tsv", "\n".join(rows) + "\n")


OFFICIAL = {"pope": pope, "mme": mme, "seed": seed, "vqav2": vqav2, "gqa": gqa, "mmbench_dev": mmbench_dev}


# ------------------------------------------------------------------------------------- the Hub's tables


def hub(name, folder, official):
    """What the Hub's tables hold of the same benchmark, from its official files."""
    _, archive, items = items_of(name, official)
    suite, _ = suite_of(archive.card)
    rows = []
    for item in items:
        image = {"bytes": suite.image(archive, item.image), "path": None} if item.split != "video" else None
        row = {"question": item.question, "answer": item.truth, "image": image}
        plain = item.about.get("question_id")
        if name == "pope":
            row |= {"category": item.split, "image_source": item.cluster, "question_id": "1"}
        elif name == "mme":
            row |= {"category": item.about["task"], "question_id": plain, "answer": item.truth.capitalize()}
            row["question"] += " Please answer yes or no."
        elif name == "seed":
            row |= {"question_id": plain, "question_type_id": item.about["type"], "data_id": item.cluster}
            row |= {"data_type": item.split, "question": item.question.partition("\n")[0], "image": image and [image]}
            row |= {f"choice_{mark.lower()}": text for mark, text in item.about["options"].items()}
        elif name == "vqav2":
            row |= {"answers": [{"answer": text, "answer_id": n} for n, text in enumerate(item.truth)], "answer": None}
            row |= {"question_id": int(item.id), "image_id": int(item.cluster), "answer_type": item.about["type"]}
            row |= {"multiple_choice_answer": item.truth[0]}
        elif name == "gqa":
            row |= {"id": item.id, "imageId": item.cluster, "types": {"structural": item.about["type"]}}
            row.pop("image")
        elif name == "mmbench_dev":
            options = {mark: item.about["options"].get(mark, "nan") for mark in "ABCD"}
            questions = f"Which of {item.cluster}?"
            row |= {"index": item.id, "question": questions, "hint": "Some words." if item.cluster == "252" else None}
            row |= options
        rows.append(row)
    if name == "gqa":
        table(folder / "testdev_balanced_instructions" / "testdev-0.parquet", rows)
        images = {item.cluster: suite.image(archive, item.image) for item in items}
        rows = [{"id": key, "image": {"bytes": data, "path": None}} for key, data in images.items()]
        table(folder / "testdev_balanced_images" / "testdev-0.parquet", rows)
    else:
        half = len(rows) // 2
        table(folder / "data" / "test-00000-of-00002.parquet", rows[:half])
        table(folder / "data" / "test-00001-of-00002.parquet", rows[half:])


# ----------------------------------------------------------------------------------------- the real answers


def real_pope(folder):
    """The official files of POPE in a folder; the rows of LLaVA's answers to them."""
    first = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    files, answers = {}, []
    for line in lzma.decompress((REAL / "pope.tsv.xz").read_bytes()).decode().splitlines():
        split, image, text, label, answer = line.split("\t")
        rows = files.setdefault(split, [])
        rows.append({"question_id": len(rows) + 1, "image": f"COCO_val2014_{int(image):012d}.jpg"})
        rows[-1] |= {"text": text, "label": label}
        answers.append({"question_id": first[split] + len(rows), "prompt": text + TAIL, "text": answer})
    for split, rows in files.items():
        write(folder / f"coco_pope_{split}.json", lines(rows))
    return answers


def real_mme(folder):
    """The files of MME's tool in a folder; the rows of LLaVA's answers."""
    files, answers = {}, []
    split_tasks = ("artwork", "celebrity", "landmark", "posters", "scene")
    for line in lzma.decompress((REAL / "mme.tsv.xz").read_bytes()).decode().splitlines():
        task, image, question, truth, answer = line.split("\t")
        files.setdefault(task, []).append(f"{image}\t{question}\t{truth}\tNo\n")
        prompt = question.replace("Please answer yes or no.", "").strip() + TAIL
        folder_of = f"{task}/images" if task in split_tasks else task
        answers.append({"question_id": f"{folder_of}/{image}", "prompt": prompt, "text": answer})
    for task, rows in files.items():
        write(folder / f"{task}.txt", "".join(rows))
    return answers

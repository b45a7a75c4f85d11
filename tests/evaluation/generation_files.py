"""Small official files of the benchmarks of generated images, and folders of images in their layouts."""

import json

from benchmark_files import card_of, items_of, lines, png, write

ONE = {"class": "dog", "count": 1}
PROMPTS = [
    {"tag": "single_object", "include": [ONE], "prompt": "a photo of a dog"},
    {"tag": "two_object", "include": [ONE, {"class": "cat", "count": 1}], "prompt": "a photo of a dog and a cat"},
    {
        "tag": "counting",
        "include": [{"class": "dog", "count": 2}],
        "exclude": [{"class": "dog", "count": 3}],
        "prompt": "a photo of two dogs",
    },
    {"tag": "colors", "include": [ONE | {"color": "red"}], "prompt": "a photo of a red dog"},
    {
        "tag": "position",
        "include": [ONE, {"class": "cat", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    },
    {
        "tag": "color_attr",
        "include": [ONE | {"color": "red"}, {"class": "cat", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red dog and a blue cat",
    },
]
QUESTIONS = [  # item_id, proposition_id, dependency
    ("first", 1, "0"), ("first", 2, "0"), ("first", 3, "2"),
    ("second", 1, "0"), ("second", 2, "3"), ("second", 3, "1"), ("second", 4, "1,2"),
    ("30", 1, "0"), ("30", 2, "1"),
]  # fmt: skip
"""Of `first` the official script skips a question; in `second` one depends on a later one."""


def geneval(folder):
    write(folder / "evaluation_metadata.jsonl", lines(PROMPTS))


def dpg(folder, questions=QUESTIONS):
    rows = ["item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
            "question_natural_language"]  # fmt: skip
    for name, number, dependency in questions:
        rows.append(f'{name},"a, b",,{number},"{dependency}",entity,whole,entity - whole (x),"Is {number}, there?"')
        write(folder / "prompts" / f"{name}.txt", f"A long prompt {name}\n")
    write(folder / "dpg_bench.csv", "\n".join(rows) + "\n")


def mjhq(folder, count=6):
    names = {f"{number:040x}": {"category": "art" if number % 2 else "food", "prompt": f"prompt {number}"}
             for number in range(count)}  # fmt: skip
    write(folder / "meta_data.json", json.dumps(names))


FILES = {"geneval": geneval, "dpg": dpg, "mjhq": mjhq}


def benchmark(name, folder, **changes):
    """A card and all items of small official files."""
    FILES[name](folder)
    card, _, items = items_of(name, folder, **changes)
    return card, items


def image_folder(items, folder, side=8, suffix=".png", image=png):
    """An image for every item in the official layout, each in another color; sides twice as long for four tiles."""
    for number, file in enumerate(dict.fromkeys(item.about["file"] for item in items)):
        grid = 2 if "tile" in items[0].about else 1
        write(folder / f"{file}{suffix}", image((40 * number % 256, 90, 255 - 20 * number % 256), grid * side))


__all__ = ["FILES", "PROMPTS", "QUESTIONS", "benchmark", "card_of", "image_folder"]

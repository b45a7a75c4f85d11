"""Images in the folders that official scorers read: such a folder is checked whole, and written from answers.

`about["file"]` of an item is its file without suffix; items that share one, told apart by `about["tile"]`, are the
tiles of a square grid. GenEval: `NNNNN/samples/NNNN.png` beside `NNNNN/metadata.jsonl`; MJHQ: `<category>/<id>.jpg`;
DPG-Bench: `<id>.png` of 2 x 2 tiles.
"""

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from PIL import Image

from unifork.config import EvalCard
from unifork.errors import DataError
from unifork.evaluation.answers import Rows
from unifork.evaluation.items import Item, faults
from unifork.images import measure, open_image, png
from unifork.sources import MAX_IMAGE_BYTES
from unifork.sources.archives import read_below

BESIDE = ("metadata.jsonl", "grid.png")
"""Files that GenEval's folders hold beside the images."""


Files = dict[str, tuple[str, str]]
"""Name and SHA-256 of the file that holds an item's image, by the item's id."""


def file_key(name: str) -> str:
    """A name without the leading zeros of its numbers, of which scripts write any."""
    return "/".join((part.lstrip("0") or "0") if part.isdigit() else part for part in name.split("/"))


def checked_images(card: EvalCard, items: Sequence[Item], folder: Path, equal: bool = True) -> Files:
    """Name and hash of the file of every item, by id. equal: all images must have the same size.

    Raises DataError that counts and names files that are missing, by prompt, or foreign, or no whole images.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() and path.name not in BESIDE:
            place = path.relative_to(folder)
            found.setdefault(file_key(place.with_suffix("").as_posix()), []).append(place.as_posix())
    wanted = {file_key(item.about["file"]): item for item in items}
    missing = Counter(item.cluster for key, item in wanted.items() if key not in found)
    wrong = [faults("prompts lack images", [f"{name} ({n})" for name, n in missing.items()])] if missing else []
    if foreign := [n for key, names in found.items() for n in (names[1:] if key in wanted else names)]:
        wrong.append(faults("files belong to no prompt", foreign))
    files, sizes, bad = dict[str, tuple[str, str]](), Counter[str](), list[str]()
    for key in wanted.keys() & found.keys():
        try:
            data = read_below(folder.resolve(), name := found[key][0], MAX_IMAGE_BYTES)
            width, height, *_ = measure(data)
            if "tile" in wanted[key].about and (width != height or width % 2):
                raise DataError(f"{width}x{height} is no grid of 2 x 2 square images")
            files[key] = name, sha256(data).hexdigest()
            sizes[f"{width}x{height}"] += 1
        except (OSError, ValueError, EOFError, DataError) as error:
            bad.append(f"{found[key][0]}: {error}")
    if bad:
        wrong.append(faults("images cannot be used", sorted(bad)))
    if equal and len(sizes) > 1:
        wrong.append("sizes differ: " + ", ".join(f"{size} ({n})" for size, n in sizes.most_common()))
    if wrong:
        raise DataError(f"{card.name}: {folder}: {'; '.join(wrong)}")
    return {item.id: files[file_key(item.about["file"])] for item in items}


def image_of(item: Item, folder: Path, name: str) -> bytes:
    """The image of an item in a file of the folder."""
    data = read_below(folder.resolve(), name, MAX_IMAGE_BYTES)
    if "tile" not in item.about:
        return data
    with open_image(data) as grid:
        side, (row, column) = grid.width // 2, divmod(item.about["tile"], 2)
        return png(grid.crop((column * side, row * side, (column + 1) * side, (row + 1) * side)))


def export(card: EvalCard, rows: Rows) -> dict[str, str | bytes]:
    """All images, and what official scorers read beside them. Raises DataError for answers without images."""
    files: dict[str, str | bytes] = {}
    grids: dict[str, Image.Image] = {}
    for item, answer in rows:
        if not answer or not answer.image:
            raise DataError(f"{card.name}: {item.id} has no image; every item needs an image of the answers")
        name = f"{item.about['file']}.png"
        if "metadata" in item.about:
            files[f"{name.partition('/')[0]}/metadata.jsonl"] = json.dumps(item.about["metadata"])
        if "tile" in item.about:
            image, (row, column) = open_image(answer.image), divmod(item.about["tile"], 2)
            grid = grids.setdefault(name, Image.new("RGB", (2 * image.width, 2 * image.width)))
            grid.paste(image, (column * image.width, row * image.width))
        else:
            files[name] = answer.image
    return files | {name: png(grid) for name, grid in grids.items()}

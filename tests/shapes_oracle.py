"""A perfect model of the world `shapes`: it reads images with the detector and generates what prompts say."""

import re

from PIL import Image

from unifork.documents.prompts import INSTRUCTION
from unifork.shapes.detector import detect
from unifork.shapes.language import NUMBERS, full_caption, noun
from unifork.shapes.world import (
    CELL,
    COLORS,
    RELATIONS,
    SHAPES,
    SIZE,
    Object,
    Scene,
    crop_objects,
    draw,
    held_out,
    relation,
)


def is_held_out(scene):
    """Whether the image or its center crop shows a composition that training never shows."""
    return held_out(scene.objects) or held_out(crop_objects(scene))


def answer(images, questions):
    return [_answer(_snapped(detect(image)), question) for image, question in zip(images, questions, strict=True)]


def _snapped(objects):
    """The objects with their centers on the lattice of the image or of its padded view, at half the size."""
    centers = [[4 * round((thing.box[i] + thing.box[i + 2]) / 8) for i in (0, 1)] for thing in objects]
    return [thing._replace(box=(x, y, x, y)) for thing, (x, y) in zip(objects, centers, strict=True)]


def _answer(objects, question):
    if question == INSTRUCTION:
        return full_caption(_scene(objects)) if objects else ""
    if match := re.fullmatch(r"Is there a (?:(\w+) )?(\w+) in the image\?", question):
        there = any(thing.shape == match[2] and match[1] in (None, thing.color) for thing in objects)
        return "yes" if there else "no"
    if match := re.fullmatch(r"What color (?:is|are) the (\w+)\?", question):
        return next((thing.color for thing in objects if match[1] in (thing.shape, noun(thing.shape, None, 2))), "")
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        named = [("objects", *(noun(thing.shape, color, 2) for color in (None, thing.color))) for thing in objects]
        return NUMBERS[sum(match[1] in names for names in named)]
    match = re.fullmatch(r"Is the (\w+) left of, right of, above or below the (\w+)\?", question)
    pair = [next((thing for thing in objects if thing.shape == shape), None) for shape in match.groups()]
    return (relation(*pair) or "") if all(pair) else ""


def generate_images(texts):
    return [_generate(text.removeprefix("a photo of ")) for text in texts]


def _generate(text) -> Image.Image:
    named = re.findall(rf"(a|two|three|four) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})", text)
    number = {"a": 1, "two": 2, "three": 3, "four": 4}
    things = [(shape, color or "black") for count, color, shape in named for _ in range(number[count])]
    cells = [(0, 0), (2, 2), (0, 2), (2, 0)]
    for name, (x, y) in RELATIONS.items():
        if f" {name} " in text:
            cells = [(1 + x, 1 + y), (1, 1)]
    boxes = [(CELL * x + 1, CELL * y + 1, CELL * x + 1 + SIZE, CELL * y + 1 + SIZE) for x, y in cells]
    return draw(_scene([Object(*thing, box) for thing, box in zip(things, boxes, strict=False)]))


def _scene(objects) -> Scene:
    return Scene(0, 0, "train", "colors", 48, 48, 0, tuple(objects))

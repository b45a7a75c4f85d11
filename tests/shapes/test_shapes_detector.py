"""The detector reads the world's own images exactly, and blurred or noisy ones nearly always."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from unifork.config import load_card
from unifork.image_tokenizer.readers import read_back
from unifork.images import crop_view, pad_view
from unifork.shapes.detector import detect, same_objects
from unifork.shapes.world import COLORS, Object, crop_objects, draw, mask, scene

SCENES = [scene(5, index, "train" if index % 2 else "held_out") for index in range(300)]


def crop(this):
    return Image.fromarray(crop_view(draw(this), 48, None))


def padded_objects(this):
    side = max(this.width, this.height)
    move = [(side - this.width) / 2, (side - this.height) / 2] * 2
    boxes = [tuple(round((p + d) * 48 / side) for p, d in zip(thing.box, move, strict=True)) for thing in this.objects]
    return [Object(thing.shape, thing.color, box) for thing, box in zip(this.objects, boxes, strict=True)]


def test_whole_images_are_read_exactly():
    assert all(sorted(detect(draw(this))) == sorted(this.objects) for this in SCENES)


def test_crops_are_read_exactly():
    assert all(sorted(detect(crop(this))) == sorted(crop_objects(this)) for this in SCENES)


def test_padded_images_are_read_through_their_gray_bars():
    wide = [this for this in SCENES if this.width != this.height]
    read = [detect(Image.fromarray(pad_view(draw(this), 48, None))) for this in wide]
    right = [same_objects(objects, padded_objects(this), 1.5) for objects, this in zip(read, wide, strict=True)]
    assert np.mean(right) >= 0.99


@pytest.mark.parametrize(("blur", "noise"), [(0.8, 0), (0.8, 20), (1.3, 10)])
def test_mild_blur_and_noise_change_nothing(blur, noise):
    rng = np.random.default_rng(0)
    right = []
    for this in SCENES[:150]:
        blurred = np.asarray(crop(this).filter(ImageFilter.GaussianBlur(blur)), dtype=float)
        noisy = np.clip(blurred + rng.normal(0, noise, blurred.shape), 0, 255).astype(np.uint8)
        right.append(same_objects(detect(Image.fromarray(noisy)), crop_objects(this)))
    assert np.mean(right) >= 0.98


def test_half_objects_two_colored_objects_and_specks_are_not_objects():
    pixels = np.full((48, 48, 3), 250, dtype=np.uint8)
    pixels[1:15, 1:8] = COLORS["red"]  # half a square
    pixels[17:31, 17:24] = COLORS["red"]  # a square of two colors
    pixels[17:31, 24:31] = COLORS["blue"]
    pixels[40:44, 40:44] = COLORS["black"]
    assert detect(Image.fromarray(pixels)) == []


def test_neighbours_that_grew_together_are_taken_apart():
    pixels = np.full((48, 48, 3), 250, dtype=np.uint8)
    pixels[16:32, 0:32] = COLORS["green"]
    assert [(thing.shape, thing.color) for thing in detect(Image.fromarray(pixels))] == [("square", "green")] * 2


@pytest.mark.parametrize("color", [0, 127, 128, 255])
def test_plain_images_hold_nothing(color):
    assert detect(Image.new("L", (48, 48), color)) == []


def test_the_surest_object_comes_first():
    pixels = np.full((48, 48, 3), 250, dtype=np.uint8)
    pixels[1:15, 1:15][mask("square", 14)] = COLORS["red"]
    pixels[1:5, 1:5] = 250
    pixels[17:31, 17:31][mask("square", 14)] = COLORS["blue"]
    assert [thing.color for thing in detect(Image.fromarray(pixels))] == ["blue", "red"]


def test_readings_agree_in_any_order_but_not_with_objects_missing_moved_or_repainted():
    a, b = Object("circle", "red", (1, 1, 15, 15)), Object("square", "blue", (17, 1, 31, 15))
    assert same_objects([a, b], [b, a._replace(box=(3, 2, 16, 16))])
    assert not same_objects([a, b], [a])
    assert not same_objects([a], [a, b])
    assert not same_objects([a, a], [a, b])
    assert not same_objects([a], [a._replace(color="blue")])
    assert not same_objects([a], [a._replace(box=(17, 1, 31, 15))])


def test_the_cards_of_the_world_name_a_reader_that_counts_what_survives():
    before = np.stack([crop_view(draw(this), 48, None) for this in SCENES[:6]])
    after = before.copy()
    after[0] = 250
    for name in ("shapes", "shapes_classes"):
        assert read_back(load_card(name), before, after) == {"same": 5, "total": 6}

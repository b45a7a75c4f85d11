"""The world is a pure function of its key, keeps to its lattice and keeps held-out compositions out."""

import numpy as np
from shapes_oracle import is_held_out

from unifork.shapes.world import (
    CELL,
    COLORS,
    CROP,
    KINDS,
    SHAPES,
    SIZE,
    Draws,
    crop_objects,
    draw,
    mask,
    relation,
    scene,
)

TRAIN = [scene(0, index, "train") for index in range(1500)]


def test_a_scene_is_a_function_of_its_key_alone():
    assert scene(3, 7, "seen") == scene(3, 7, "seen")
    assert (
        len({scene(*key).objects for key in [(0, 1, "train"), (1, 1, "train"), (0, 2, "train"), (0, 1, "seen")]}) == 4
    )
    first = TRAIN[0]
    assert (first.kind, first.width, first.height, first.ground) == ("colors", 48, 48, 2)
    assert first.objects == (("circle", "red", (1, 17, 15, 31)),)


def test_draws_are_uniform_and_their_streams_independent_of_the_machine():
    draws = Draws("test", 1)
    assert [draws.below(100) for _ in range(5)] == [23, 1, 86, 50, 10]
    counts = np.bincount([draws.below(6) for _ in range(6000)])
    assert abs(counts - 1000).max() < 150
    assert sorted(draws.shuffled("abc")) == ["a", "b", "c"]


def test_training_never_shows_a_held_out_composition_and_held_out_scenes_always_do():
    assert not any(is_held_out(this) for this in TRAIN)
    assert not any(is_held_out(scene(0, index, "seen")) for index in range(300))
    assert all(is_held_out(scene(0, index, "held_out", kind)) for kind in KINDS for index in range(50))


def test_about_a_third_of_the_images_are_wide_or_tall_with_objects_outside_the_crop():
    wide = [this for this in TRAIN if this.width != this.height]
    assert 0.28 < len(wide) / len(TRAIN) < 0.39
    assert {(this.width, this.height) for this in wide} == {(96, 48), (48, 96)}
    assert all(len(crop_objects(this)) < len(this.objects) for this in wide)
    assert all(len(crop_objects(this)) == len(this.objects) for this in TRAIN if this.width == this.height)


def test_images_hold_one_to_four_objects_each_filling_its_own_cell_of_the_crop():
    for this in TRAIN:
        assert 1 <= len(this.objects) <= 4
        assert len(set(this.objects)) == len({thing.box for thing in this.objects}) == len(this.objects)
        for shape, color, (left, top, right, bottom) in crop_objects(this):
            assert shape in SHAPES
            assert color in COLORS
            assert (left % CELL, top % CELL) == (1, 1)
            assert (right - left, bottom - top) == (SIZE, SIZE)
            assert max(right, bottom) < CROP


def test_no_object_is_cut_by_the_border_of_the_crop():
    for this in TRAIN:
        dx, dy = (this.width - CROP) // 2, (this.height - CROP) // 2
        for left, top, right, bottom in (thing.box for thing in this.objects):
            inside = dx <= left < right <= dx + CROP and dy <= top < bottom <= dy + CROP
            outside = right <= dx or left >= dx + CROP or bottom <= dy or top >= dy + CROP
            assert inside != outside


def test_scenes_alone_hold_their_crop_only():
    scenes = [scene(0, index, "train", "colors", alone=True) for index in range(100)]
    assert {len(this.objects) for this in scenes} == {1}
    assert {(this.width, this.height) for this in scenes} == {(48, 48), (96, 48), (48, 96)}


def test_every_kind_shows_what_its_name_says():
    for kind in KINDS:
        for index in range(40):
            things = crop_objects(scene(1, index, "train", kind))
            shapes, colors = ({thing[i] for thing in things} for i in (0, 1))
            match kind:
                case "single_object" | "colors":
                    assert len(things) == 1
                case "counting":
                    assert 2 <= len(things) <= 4
                    assert len(shapes) == len(colors) == 1
                case _:
                    assert len(things) == len(shapes) == 2
            if kind == "position":
                assert relation(*things) is not None
            if kind == "color_attr":
                assert len(colors) == 2


def test_a_image_has_flat_colors_only():
    image = draw(TRAIN[0])
    assert (image.mode, image.size) == ("RGB", (48, 48))
    assert len(image.getcolors()) == 2
    assert (int(mask("circle", SIZE).sum()), COLORS["red"]) in image.getcolors()


def test_shapes_differ_in_many_pixels():
    masks = [mask(shape, SIZE) for shape in SHAPES]
    for i, shape_mask in enumerate(masks):
        for other in masks[:i]:
            assert (shape_mask & other).sum() / (shape_mask | other).sum() < 0.8

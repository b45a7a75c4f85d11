"""Captions, questions, prompts and rows say what the images show, and no more."""

import hashlib
import io
import json
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image

from unifork.config import parse
from unifork.errors import ConfigError
from unifork.shapes.language import class_name, crop_caption, full_caption, prompts
from unifork.shapes.questions import conversations
from unifork.shapes.source import ShapesOptions, rows
from unifork.shapes.world import COLORS, HELD_OUT_COLORS, KINDS, SHAPES, crop_objects, scene
from unifork.shards.task import Slice

SCENES = [scene(0, index, "train") for index in range(1500)]
NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}


def world_rows(seed, start, stop, **options):
    """Rows of the world as a card with these options has them."""
    return rows(parse(ShapesOptions, options, "card"), Slice(start, stop), seed)


def named_objects(caption):
    """What a caption names, as counts of (color or None, shape)."""
    found = Counter()
    for number, color, shape in re.findall(
        rf"(a|two|three|four) (?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})", caption
    ):
        found[color or None, shape] += NUMBERS[number]
    return found


def shown(objects, with_color=True):
    return Counter((thing.color if with_color else None, thing.shape) for thing in objects)


def test_captions_of_the_crop_tell_exactly_what_the_crop_shows():
    for this in SCENES:
        caption = named_objects(crop_caption(this).removeprefix("a photo of "))
        assert caption in (shown(crop_objects(this)), shown(crop_objects(this), with_color=False))
        assert caption.total() < len(this.objects) or this.width == this.height


def test_captions_of_the_whole_image_tell_all_of_it():
    assert all(named_objects(full_caption(this)) == shown(this.objects) for this in SCENES)


def test_wordings_are_few_and_like_genevals():
    of = {kind: {crop_caption(this) for this in SCENES if this.kind == kind} for kind in KINDS}
    assert "a photo of a circle" in of["single_object"]
    assert any(re.fullmatch(r"a photo of (two|three|four) \w+s", text) for text in of["counting"])
    assert any(re.fullmatch(r"a photo of a \w+ (left of|right of|above|below) a \w+", text) for text in of["position"])
    assert all(" and " in text for text in of["two_object"] | of["color_attr"])


def test_only_images_of_one_object_have_a_class():
    for this in SCENES:
        assert (class_name(this) is None) == (len(this.objects) > 1)
    assert {class_name(this) for this in SCENES if this.kind == "single_object"} == {*SHAPES, None}
    assert "black circle" in {class_name(this) for this in SCENES}


def test_dialogues_take_turns_and_are_short():
    for this in SCENES[:300]:
        turns = conversations(this)
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
        assert 10 <= len(turns) <= 16
        assert max(len(turn["text"].split()) for turn in turns[1::2]) <= 2


def test_yes_and_no_are_balanced_also_for_a_reader_who_sees_only_the_question():
    answers = defaultdict(Counter)
    for this in SCENES:
        texts = [turn["text"] for turn in conversations(this)]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            if answer in ("yes", "no"):
                answers[question][answer] += 1
    total = sum(counts.total() for counts in answers.values())
    assert abs(sum(counts["yes"] for counts in answers.values()) / total - 0.5) < 0.03
    assert sum(max(counts.values()) for counts in answers.values()) / total < 0.62


def test_many_negatives_are_made_of_parts_that_are_there():
    hard = negatives = 0
    for this in SCENES:
        texts = [turn["text"] for turn in conversations(this)]
        colors, shapes = {thing.color for thing in this.objects}, {thing.shape for thing in this.objects}
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            match = re.fullmatch(r"Is there a (\w+) (\w+) in the image\?", question)
            if match and answer == "no":
                assert match[1] in colors or match[2] in shapes
                negatives += 1
                hard += match[1] in colors and match[2] in shapes
    assert hard / negatives > 0.2


def test_training_never_names_a_held_out_colored_shape():
    for this in SCENES:
        text = " ".join([crop_caption(this), full_caption(this), *(turn["text"] for turn in conversations(this))])
        assert not any(f"{color} {shape}" in text for color, shape in HELD_OUT_COLORS)


def test_words_are_few():
    texts = [text for this in SCENES for text in (full_caption(this), *(turn["text"] for turn in conversations(this)))]
    assert len({word for text in texts for word in re.findall(r"\w+", text)}) < 60


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_the_two_splits_share_no_composition(kind):
    seen, held_out = ({prompt.text for prompt in prompts(kind, split, 700, 0)} for split in ("seen", "held_out"))
    assert (seen == held_out) if kind == "single_object" else not seen & held_out


def test_prompts_repeat_only_when_all_were_asked_and_carry_genevals_clauses():
    assert len({prompt.text for prompt in prompts("colors", "seen", 25, 1)}) == 25
    (prompt,) = prompts("position", "seen", 1, 0)
    first, name, second = re.fullmatch(r"a photo of a (\w+) (.+) a (\w+)", prompt.text).groups()
    assert [clause.name for clause in prompt.include] == [second, first]
    assert prompt.include[1].position == (name, 0)
    (prompt,) = prompts("counting", "seen", 1, 0)
    assert prompt.exclude[0].count == prompt.include[0].count + 1
    assert prompts("colors", "seen", 9, 1) != prompts("colors", "seen", 9, 2)


def test_training_uses_the_very_prompts_that_are_asked():
    captions = {crop_caption(scene(0, index, "train")) for index in range(8000)}
    for kind in ("single_object", "colors", "counting", "two_object"):
        assert {prompt.text for prompt in prompts(kind, "seen", 30, 0)} <= captions


def test_rows_are_the_same_whatever_range_asks_for_them():
    first = list(world_rows(2, 0, 6))
    assert first[4:] == list(world_rows(2, 4, 6))
    row = first[5]
    assert row["key"] == "shapes-00000005"
    assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
    assert Image.open(io.BytesIO(row["image"])).size == (row["width"], row["height"])
    assert (row["url"], row["license"]) == ("", "CC0-1.0")
    this = scene(2, 5, "train")
    assert (row["caption"], row["description"]) == (crop_caption(this), full_caption(this))
    assert [thing["shape"] for thing in json.loads(row["objects"])] == [thing.shape for thing in this.objects]


def test_single_scenes_all_have_a_class_which_is_also_the_caption():
    for row in world_rows(0, 0, 60, scenes="single"):
        assert len(json.loads(row["objects"])) == 1
        assert row["caption"].removeprefix("a photo of ") == f"a {row['class_name']}"


def test_exactly_one_row_in_n_is_corrupt_when_asked():
    broken = []
    for row in world_rows(0, 0, 50, corrupt_every=10):
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
        try:
            Image.open(io.BytesIO(row["image"])).convert("RGB")
        except OSError:
            broken.append(row["key"])
    assert broken == [f"shapes-{index:08d}" for index in (9, 19, 29, 39, 49)]


@pytest.mark.parametrize("options", [{"scenes": "singles"}, {"corrupt_every": 0}, {"split": "test"}])
def test_wrong_options_are_named(options):
    with pytest.raises(ConfigError, match=str(next(iter(options.values())))):
        list(world_rows(0, 0, 1, **options))

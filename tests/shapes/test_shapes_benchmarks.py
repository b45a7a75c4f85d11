"""A perfect model scores one, a random one chance, a constant one what its constancy earns."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shapes_oracle
from PIL import Image

from unifork.config import load_eval
from unifork.errors import ConfigError
from unifork.evaluation.answers import origin_of
from unifork.evaluation.archive import Archive
from unifork.evaluation.scoring import by_split, score_answers
from unifork.evaluation.suites import Answer, suite_of
from unifork.images import crop_view, open_image, pad_view, png
from unifork.shapes import understanding
from unifork.shapes.world import ASKED_SPLITS, KINDS, SINGLE_KINDS, Draws, crop_objects, draw, scene

NAMES = ("shapes-generation", "shapes-understanding")
SAMPLES = 40


@cache
def items_of(name, seed=0):
    card = load_eval(name)
    suite, _ = suite_of(card)
    return suite.read(None, suite.options(samples=SAMPLES), seed)


def image_of(item):
    return open_image(understanding.image(Archive, item.image))


def scores(name, items, outputs):
    """Scores and verdicts of texts or images."""
    answers = {}
    for item, output in zip(items, outputs, strict=True):
        text, image = (output, None) if isinstance(output, str) else ("", png(output))
        answers[item.id] = Answer(item.id, text, image)
    return score_answers(load_eval(name), items, answers, origin_of(Path("test")))


@cache
def perfect(name):
    items = items_of(name)
    if name == NAMES[0]:
        return shapes_oracle.generate_images([item.question for item in items])
    return shapes_oracle.answer([image_of(item) for item in items], [item.question for item in items])


def random_images(items):
    """Crops of images of the same split, other than those that chance is measured with."""
    scenes = [scene(99, number, item.split) for number, item in enumerate(items)]
    return [Image.fromarray(crop_view(draw(this), 48, None)) for this in scenes]


def random_answers(items):
    """Right answers to other questions of the same kind and split."""
    others = {
        (kind, split): understanding._questions(kind, split, 80, 99)
        for kind in understanding.KINDS
        for split in ASKED_SPLITS
    }
    return [
        Draws("random", number).pick(others[item.about["kind"], item.split])[1].answer
        for number, item in enumerate(items)
    ]


def by_name(scores, split):
    return {score.name: score for score in scores if score.split == split}


def assert_near_chance(score):
    """Within three standard errors, those that a score at chance would have if it was larger."""
    error = max((score.chance * (1 - score.chance) / score.items) ** 0.5, score.standard_error, 0.01)
    assert abs(score.value - score.chance) <= 3 * error, score


@pytest.mark.parametrize("name", NAMES)
def test_a_perfect_model_scores_one(name):
    found, verdicts = scores(name, items_of(name), perfect(name))
    assert {score.value for score in found if "yes_ratio" not in score.name} == {1.0}
    assert {score.value for score in found if "yes_ratio" in score.name} <= {0.5}
    assert all(verdict["verdicts"]["official"]["right"] == 1.0 for verdict in verdicts)
    json.dumps([verdicts, by_split(found)])


def test_images_generated_without_reading_the_prompt_score_chance():
    items = items_of(NAMES[0])
    found, _ = scores(NAMES[0], items, random_images(items))
    for split in ("seen", "held_out"):
        names = by_name(found, split)
        for kind in KINDS:
            assert_near_chance(names[kind])
        assert names["overall"].value == pytest.approx(np.mean([names[kind].value for kind in KINDS]))
        assert names["overall"].chance == pytest.approx(np.mean([names[kind].chance for kind in KINDS]))
        assert names["overall"].items == 6 * names["composed"].items / 5 == 240
        assert names["single_object"].chance > names["color_attr"].chance


def test_answers_to_other_questions_score_chance():
    items = items_of(NAMES[1])
    for score in scores(NAMES[1], items, random_answers(items))[0]:
        assert_near_chance(score)


def test_a_constant_yes_earns_half_and_a_constant_image_no_composition():
    items = items_of(NAMES[1])
    names = by_name(scores(NAMES[1], items, ["yes"] * len(items))[0], "seen")
    assert [names[f"yes_no_{name}"].value for name in ("accuracy", "recall", "yes_ratio")] == [0.5, 1.0, 1.0]
    assert names["color_exact"].value == names["caption_exact"].value == 0.0
    items = items_of(NAMES[0])
    blank = [Image.new("RGB", (48, 48), "white")] * len(items)
    assert {score.value for score in scores(NAMES[0], items, blank)[0]} == {0.0}


def test_an_empty_answer_is_yes_for_pope_and_nothing_for_the_strict_reading():
    items = items_of(NAMES[1])
    names = by_name(scores(NAMES[1], items, [""] * len(items))[0], "seen")
    assert names["yes_no_accuracy"].value == 0.5
    assert names["yes_no_accuracy_strict"].value == 0.0
    assert names["yes_no_accuracy_strict"].unread == 1.0


def test_items_are_balanced_new_images_and_about_what_their_split_says():
    items = items_of(NAMES[1])
    assert len(items) == len({item.id for item in items}) == 2 * 5 * 40
    for split in ("seen", "held_out"):
        answers = [item.truth for item in items if item.about["kind"] == "yes_no" and item.split == split]
        assert answers.count("yes") == answers.count("no") == 20
    for item in items:
        seed, split, index = item.image.split("/")
        assert shapes_oracle.is_held_out(scene(int(seed), int(index), split)) == (split == "held_out")
    assert items == items_of.__wrapped__(NAMES[1]) != items_of(NAMES[1], 1)


def test_understanding_from_crops_of_wide_images_fails_and_from_pads_does_not():
    """What swapping the two views costs: outside the crop are objects the questions speak of."""
    wide = [(item, image) for item in items_of(NAMES[1]) if (image := image_of(item)).width != image.height]

    def right(view):
        images = [Image.fromarray(view(image, 48, None)) for _, image in wide]
        answers = shapes_oracle.answer(images, [item.question for item, _ in wide])
        return np.mean([answer == item.truth for answer, (item, _) in zip(answers, wide, strict=True)])

    assert right(pad_view) == 1.0
    assert right(crop_view) < 0.7


def test_captions_of_crops_are_wrong_on_many_whole_images():
    """Generation must learn from crops: a wide image shows more than its caption tells."""
    wide = [this for this in (scene(0, index, "train") for index in range(600)) if this.width != this.height]
    single = [this for this in wide if this.kind not in SINGLE_KINDS]
    shapes = [{thing.shape for thing in this.objects} != {t.shape for t in crop_objects(this)} for this in single]
    assert len(wide) > 150
    assert np.mean(shapes) > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_pages_find_the_scores_that_are_there(name):
    show, (found, _) = load_eval(name).show, scores(name, items_of(name), perfect(name))
    assert {score.split for score in found} == set(show.splits)
    assert {*show.scores, *show.headlines} <= {score.name for score in found}


def test_a_suite_is_a_suite():
    card = load_eval(NAMES[0])
    wrong = card.model_copy(update={"items": card.items.model_copy(update={"suite": "unifork.shapes.detector:READER"})})
    with pytest.raises(ConfigError, match=r"'unifork\.shapes\.detector:READER' is a Reader, not a Suite"):
        suite_of(wrong)

"""A perfect model scores one, a random one chance, a constant one what its constancy earns."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import shapes_oracle
from PIL import Image

from unifork.config import Benchmark
from unifork.errors import ConfigError, DataError
from unifork.evaluation.benchmarks import BENCHMARKS, Model, evaluate
from unifork.image_tokenizer.views import crop_view, pad_view
from unifork.shapes import generation, understanding
from unifork.shapes.world import ASKED_SPLITS, KINDS, SINGLE_KINDS, Draws, crop_objects, draw, scene

GENERATION = Benchmark(kind="unifork.shapes.generation:BENCHMARK", samples=40)
UNDERSTANDING = Benchmark(kind="unifork.shapes.understanding:BENCHMARK", samples=40)
PERFECT = Model(shapes_oracle.generate_images, shapes_oracle.answer)


def random_images(items):
    """Crops of images of the same split, other than those that chance is measured with."""
    scenes = [scene(99, number, item.split) for number, item in enumerate(items)]
    return [Image.fromarray(crop_view(draw(this), 48, None)) for this in scenes]


def random_answers(items):
    """Right answers to other questions of the same kind and split."""
    others = {
        (kind, split): understanding._items(kind, split, 80, 99)
        for kind in understanding.KINDS
        for split in ASKED_SPLITS
    }
    return [
        Draws("random", number).pick(others[item.kind, item.scene.split]).answer for number, item in enumerate(items)
    ]


def by_name(scores, split):
    return {score.name: score for score in scores if score.split == split}


def assert_near_chance(score):
    """Within three standard errors, those that a score at chance would have if it was larger."""
    error = max((score.chance * (1 - score.chance) / score.samples) ** 0.5, score.standard_error, 0.01)
    assert abs(score.value - score.chance) <= 3 * error, score


@pytest.mark.parametrize("config", [GENERATION, UNDERSTANDING], ids=lambda config: config.kind)
def test_a_perfect_model_scores_one(config):
    records, scores = evaluate(config, 0, PERFECT, "test")
    assert {score.value for score in scores if not score.name.endswith("yes_ratio")} == {1.0}
    assert {score.value for score in scores if score.name.endswith("yes_ratio")} <= {0.5}
    assert all(record["correct"] for record in records)
    json.dumps([records, [asdict(score) for score in scores]])


def test_images_generated_without_reading_the_prompt_score_chance():
    items = generation.prepare(GENERATION, 0)
    scores = generation.score(items, random_images(items))
    for split in ("seen", "held_out"):
        names = by_name(scores, split)
        for kind in KINDS:
            assert_near_chance(names[kind])
        assert names["overall"].value == pytest.approx(np.mean([names[kind].value for kind in KINDS]))
        assert names["overall"].samples == 6 * names["composed"].samples / 5 == 240
        assert names["single_object"].chance > names["color_attr"].chance


def test_answers_to_other_questions_score_chance():
    items = understanding.prepare(UNDERSTANDING, 0)
    for score in understanding.score(items, random_answers(items)):
        assert_near_chance(score)


def test_a_constant_yes_earns_half_and_a_constant_image_no_composition():
    yes = Model(shapes_oracle.generate_images, lambda images, questions: ["yes"] * len(questions))
    names = by_name(evaluate(UNDERSTANDING, 0, yes, "test")[1], "seen")
    assert [names[f"yes_no_{name}"].value for name in ("accuracy", "recall", "yes_ratio")] == [0.5, 1.0, 1.0]
    assert names["color_exact"].value == names["caption_exact"].value == 0.0
    blank = Model(lambda texts: [Image.new("RGB", (48, 48), "white")] * len(texts), shapes_oracle.answer)
    assert {score.value for score in evaluate(GENERATION, 0, blank, "test")[1]} == {0.0}


def test_an_empty_answer_is_yes_for_pope_and_nothing_for_the_strict_reading():
    items = understanding.prepare(UNDERSTANDING, 0)
    names = by_name(understanding.score(items, [""] * len(items)), "seen")
    assert names["yes_no_accuracy"].value == 0.5
    assert names["yes_no_strict_accuracy"].value == 0.0


def test_items_are_balanced_new_images_and_about_what_their_split_says():
    items = understanding.prepare(UNDERSTANDING, 0)
    assert len(items) == 2 * 5 * 40
    for split in ("seen", "held_out"):
        answers = [item.answer for item in items if item.kind == "yes_no" and item.scene.split == split]
        assert answers.count("yes") == answers.count("no") == 20
    assert all(shapes_oracle.is_held_out(item.scene) == (item.scene.split == "held_out") for item in items)
    assert items == understanding.prepare(UNDERSTANDING, 0) != understanding.prepare(UNDERSTANDING, 1)


def test_understanding_from_crops_of_wide_images_fails_and_from_pads_does_not():
    """What swapping the two views costs: outside the crop are objects the questions speak of."""
    items = [item for item in understanding.prepare(UNDERSTANDING, 0) if item.scene.width != item.scene.height]

    def right(view):
        images = [Image.fromarray(view(draw(item.scene), 48, None)) for item in items]
        answers = shapes_oracle.answer(images, [item.question for item in items])
        return np.mean([answer == item.answer for answer, item in zip(answers, items, strict=True)])

    assert right(pad_view) == 1.0
    assert right(crop_view) < 0.7


def test_captions_of_crops_are_wrong_on_many_whole_images():
    """Generation must learn from crops: a wide image shows more than its caption tells."""
    wide = [this for this in (scene(0, index, "train") for index in range(600)) if this.width != this.height]
    single = [this for this in wide if this.kind not in SINGLE_KINDS]
    shapes = [{thing.shape for thing in this.objects} != {t.shape for t in crop_objects(this)} for this in single]
    assert len(wide) > 150
    assert np.mean(shapes) > 0.5


def test_outputs_must_be_complete():
    lazy = Model(lambda texts: [], lambda images, questions: ["yes"])
    with pytest.raises(DataError, match="x: 0 outputs for 480 items"):
        evaluate(GENERATION, 0, lazy, "x")
    with pytest.raises(DataError, match="x: 1 outputs for 400 items"):
        evaluate(UNDERSTANDING, 0, lazy, "x")


@pytest.mark.parametrize("config", [GENERATION, UNDERSTANDING], ids=lambda config: config.kind)
def test_pages_are_told_of_scores_that_are_there(config):
    program = BENCHMARKS.find(config.kind, "test")
    _, scores = evaluate(config, 0, PERFECT, "test")
    assert {score.split for score in scores} == set(program.splits)
    assert {*program.first_scores, *program.headlines} <= {score.name for score in scores}


def test_the_image_of_a_record_is_the_one_that_was_asked_about():
    (records, _), items = evaluate(UNDERSTANDING, 3, PERFECT, "test"), understanding.prepare(UNDERSTANDING, 3)
    for record, item in list(zip(records, items, strict=True))[::25]:
        assert understanding.BENCHMARK.image(record["image"], 3) == draw(item.scene)
    assert understanding.BENCHMARK.image("train-of-thought", 3) is None


@pytest.mark.parametrize(
    "use", [lambda config: BENCHMARKS.find(config.kind, "x"), lambda config: evaluate(config, 0, PERFECT, "x")]
)
def test_an_unknown_kind_of_benchmark_is_named_with_what_is_known(use):
    with pytest.raises(ConfigError, match=r"x: unknown kind of benchmark 'shapes'.*Known: .*MODULE:OBJECT"):
        use(Benchmark(kind="shapes", samples=1))
    with pytest.raises(ConfigError, match=r"'unifork\.shapes\.detector:READER' is a Reader, not a Program"):
        use(Benchmark(kind="unifork.shapes.detector:READER", samples=1))

"""Networks that look at images: real classes with tiny weights through the same code, layouts, and what is refused."""

import json

import numpy as np
import pytest
import torch
from benchmark_files import png, write
from generation_files import benchmark, image_folder
from PIL import Image
from tiny_networks import BLIP_WORDS, blip, clip, inception, mask2former, shrink, with_networks
from torch.nn import functional as F
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from unifork.cluster import run_jobs
from unifork.config import Network
from unifork.errors import DataError, IdentityError
from unifork.evaluation.answers import EXPORTS, join, origin_of, read_answers
from unifork.evaluation.examining import Examiner, examine_job, load_networks, write_summary
from unifork.evaluation.generation.layout import checked_images
from unifork.evaluation.generation.networks import (
    COLORS,
    BlipAnswerer,
    CleanFid,
    ClipColors,
    Detected,
    Mask2Former,
    PytorchFid,
    objects,
)
from unifork.evaluation.scoring import score_answers
from unifork.evaluation.suites import Answer
from unifork.images import open_image
from unifork.shards.manifest import read_manifest


def image_of(side=(60, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (side[1], side[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ------------------------------------------------------------------------------------- objects from masks


def test_objects_are_mmdets():
    """Two queries, three classes: every pair is a candidate; boxes end beyond the last pixel of the mask."""
    classes = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 3.0]])
    masks = torch.full((2, 6, 8), -4.0)
    masks[0, 1:3, 2:7] = 4.0
    masks[1, 5, 0] = 1.0
    found = objects(classes, masks)
    assert len(found) == 6
    best = max(found, key=lambda thing: thing.score)
    assert best.name == "person"
    assert best.box == (2, 1, 7, 3)
    assert best.score == pytest.approx(float(classes[0].softmax(0)[0] * torch.sigmoid(torch.tensor(4.0))), rel=1e-5)
    assert best.mask.sum() == 10
    other = next(thing for thing in found if thing.name == "bicycle" and thing.box == (0, 5, 1, 6))
    assert other.score == pytest.approx(float(classes[1].softmax(0)[1] * torch.sigmoid(torch.tensor(1.0))), rel=1e-5)
    assert objects(classes, torch.full((2, 6, 8), -1.0)) == []


def test_at_most_a_hundred_candidates_are_taken_before_masks_count():
    classes, masks = torch.zeros(3, 81), torch.ones(3, 4, 4)
    classes[:, -1] = -9.0
    assert len(objects(classes, masks)) == 100


def test_the_detector_gives_logits_at_the_size_of_the_image(tmp_path):
    mask2former(tmp_path / "detector")
    detector = Mask2Former(tmp_path / "detector", "cpu")
    classes, masks = detector.logits(image_of())
    assert (classes.shape, masks.shape) == ((10, 81), (10, 40, 60))
    again = detector(image_of())
    assert [thing[:3] for thing in again] == [thing[:3] for thing in detector(image_of())]
    for thing in again:
        left, top, right, bottom = thing.box
        assert thing.mask.shape == (40, 60)
        assert thing.mask[top:bottom, left:right].sum() == thing.mask.sum()


def test_a_detector_of_other_classes_or_with_missing_weights_is_refused(tmp_path):
    mask2former(tmp_path / "few", classes=5)
    with pytest.raises(DataError, match="5 classes; GenEval needs the 80 of COCO"):
        Mask2Former(tmp_path / "few", "cpu")
    mask2former(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"num_queries": 12}))
    with pytest.raises(DataError, match=r"weights do not fit its configuration|cannot be loaded"):
        Mask2Former(tmp_path / "other", "cpu")
    with pytest.raises(DataError, match="cannot be loaded"):
        Mask2Former(tmp_path / "nowhere", "cpu")


def test_colors_are_those_of_the_classifiers_sentences(tmp_path):
    clip(tmp_path / "colors")
    network = ClipColors(tmp_path / "colors", "cpu")
    sentences = network.sentences("dog")
    assert sentences.shape == (10, 8)
    assert torch.allclose(sentences.norm(dim=-1), torch.ones(10), atol=1e-5)
    texts = ["a photo of a orange dog", "a photo of a orange-colored dog", "a photo of a orange object"]
    every = [
        network.model.get_text_features(**network.tokenizer([text], return_tensors="pt")).pooler_output
        for text in texts
    ]
    mean = torch.cat([F.normalize(row, dim=-1) for row in every]).mean(dim=0)
    assert torch.allclose(sentences[1], F.normalize(mean, dim=-1), atol=1e-5)
    mask = np.zeros((40, 60), dtype=bool)
    mask[10:30, 5:50] = True
    image, thing = image_of(), Detected("dog", 0.9, (5, 10, 50, 30), mask)
    shown = np.full((40, 60, 3), 0x99, dtype=np.uint8)
    shown[mask] = np.asarray(image)[mask]
    crop = Image.fromarray(shown).crop(thing.box)
    expected = COLORS[int(network.logits(crop, "dog").argmax())]
    assert network(image, [thing, thing]) == [expected, expected]
    outside = image.copy()
    outside.paste((0, 255, 0), (51, 31, 60, 40))
    assert network(outside, [thing]) == network(image, [thing])


def test_answers_are_those_of_the_models_own_search_with_the_makers_marks(tmp_path):
    blip(tmp_path / "answerer")
    network = BlipAnswerer(tmp_path / "answerer", "cpu")
    see = BlipImageProcessorPil(size={"height": 32, "width": 32})
    assert [network(Image.new("RGB", (50, 40), color), "Is there a 1?") for color in ("red", "blue")] == ["yes", "no"]
    for seed, question in enumerate(["Is there a 1?", "no 2, is a yes", "is there? " * 20]):
        image = image_of(seed=seed)
        tokens = [BLIP_WORDS.index(word) for word in question.lower().replace("?", " ?").replace(",", " ,").split()]
        asked_of = torch.tensor([[len(BLIP_WORDS) + 1, *tokens[:33], BLIP_WORDS.index("[SEP]")]])
        shown = see(image, return_tensors="pt").pixel_values
        assert torch.allclose(network.patches(image), network.model.vision_model(shown).last_hidden_state, atol=1e-5)
        found = network.model.generate(asked_of, shown, num_beams=3, max_length=10)
        assert found[0, 0] == len(BLIP_WORDS)
        assert network(image, question) == network.tokenizer.decode(found[0, 1:], skip_special_tokens=True)


def test_an_image_is_looked_at_once_for_all_questions_about_it(tmp_path, monkeypatch):
    blip(tmp_path / "answerer")
    network, looks = BlipAnswerer(tmp_path / "answerer", "cpu"), []
    network.model.vision_model.register_forward_hook(lambda *_: looks.append(1))
    red, blue = (Image.new("RGB", (40, 40), color) for color in ("red", "blue"))
    assert [network(image, q) for image in (red, blue, red) for q in ("is there?", "a 1?")] == [
        "yes", "yes", "no", "no", "yes", "yes",
    ]  # fmt: skip
    assert len(looks) == 3


def test_a_folder_that_is_no_answerers_is_refused(tmp_path):
    blip(tmp_path / "words")
    (tmp_path / "words" / "tokenizer.json").unlink()
    write(tmp_path / "words" / "vocab.txt", "\n".join([*BLIP_WORDS, "more"]))
    with pytest.raises(DataError, match="15 tokens; the model needs 14 and two marks"):
        BlipAnswerer(tmp_path / "words", "cpu")
    (tmp_path / "words" / "vocab.txt").unlink()
    with pytest.raises(DataError, match=r"its tokenizer cannot be loaded|tokens; the model needs 14"):
        BlipAnswerer(tmp_path / "words", "cpu")
    clip(tmp_path / "clip")
    with pytest.raises(DataError, match=r"weights do not fit its configuration|cannot be loaded"):
        BlipAnswerer(tmp_path / "clip", "cpu")


def test_the_canary_finds_a_configuration_with_another_number_of_heads(tmp_path):
    """Which loads without a word; the published answerer's early configurations were wrong in it."""
    card, _ = benchmark("dpg", tmp_path / "files")
    card = with_networks(card, tmp_path / "networks")
    load_networks(card, "cpu", trusted=True)
    load_networks(card, "cpu")
    path = tmp_path / "networks" / "answerer" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["num_attention_heads"] = 1
    path.write_text(json.dumps(config))
    with pytest.raises(IdentityError, match=r"canary\.json: the network's outputs for drawn images differ"):
        load_networks(card, "cpu")


def test_both_protocols_scale_images_as_published(tmp_path):
    inception(tmp_path / "fid")
    legacy, clean = (kind(tmp_path / "fid", "cpu") for kind in (PytorchFid, CleanFid))
    image = image_of((600, 500))
    values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    expected = 2 * F.interpolate(torch.from_numpy(values), (299, 299), mode="bilinear", align_corners=False) - 1
    assert torch.allclose(legacy.scaled(image), expected)
    band = np.asarray(image)[..., 1].astype(np.float32)
    resized = np.asarray(Image.fromarray(band).resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255)
    assert np.allclose(clean.scaled(image)[0, 1].numpy(), (resized - 128) / 128, atol=1e-6)
    assert float((legacy.scaled(image) - clean.scaled(image)).abs().mean()) > 0.1  # antialias
    flat = Image.new("RGB", (384, 384), (255, 0, 128))
    assert legacy.scaled(flat).amax().item() == pytest.approx(1.0)
    assert clean.scaled(flat).amax().item() == pytest.approx(127 / 128)
    module = torch.jit.load(str(tmp_path / "fid" / "inception.pt"))
    assert np.allclose(legacy(image), module.layers(legacy.scaled(image))[0].detach().numpy())
    assert legacy(image).shape == (5,)


def test_fid_needs_one_torchscript_file(tmp_path):
    tmp_path.joinpath("x.pt").write_bytes(b"state")
    with pytest.raises(DataError, match=r"x\.pt: no TorchScript file"):
        PytorchFid(tmp_path, "cpu")
    tmp_path.joinpath("y.pt").write_bytes(b"state")
    with pytest.raises(DataError, match=r"2 files \*\.pt; one TorchScript file"):
        PytorchFid(tmp_path, "cpu")


# ------------------------------------------------------------------------------------------ from end to end


@pytest.mark.parametrize("name", ["geneval", "mjhq", "dpg"])
def test_images_in_the_official_layout_are_examined_and_scored(name, tmp_path, monkeypatch):
    shrink(monkeypatch)
    card, items = benchmark(
        name, tmp_path / "files", options={} if name != "mjhq" else {"reference": str(tmp_path / "ref")}
    )
    card = with_networks(card, tmp_path / "networks")
    load_networks(card, "cpu", trusted=True)
    image_folder(items, tmp_path / "images")
    if name == "dpg":
        write(tmp_path / "images" / "30.png", png("red", 16))
    found = {}
    if name == "mjhq":
        card = card.model_copy(update={"score": card.score.model_copy(update={"rules": ("pytorch-fid", "clean-fid")})})
        image_folder(items, tmp_path / "archive" / "mjhq30k_imgs", side=9, suffix=".jpg")
        job, worker = examine_job(card, items, None, tmp_path / "ref", tmp_path / "archive")
        run_jobs([job], Examiner, *worker, "cpu")
        written = write_summary(card, tmp_path / "ref")
        hashes = read_manifest(tmp_path / "ref").lineage["networks"]
        assert [path.name for path in written] == [
            f"{kind}-{hashes[kind]}.npz" for kind in ("pytorch-fid", "clean-fid")
        ]
    for turn in ("first", "again"):
        job, worker = examine_job(card, items, tmp_path / "images", tmp_path / turn)
        run_jobs([job], Examiner, *worker, "cpu")
        answers = join(card, items, read_answers(tmp_path / turn), turn)
        scores, _ = score_answers(card, items, answers, origin_of(tmp_path / turn))
        found[turn] = [(score.name, score.value, score.decoding) for score in scores]
    assert found["first"] == found["again"]
    assert all(network.kind in found["first"][0][2] for network in card.networks.values())
    if name == "dpg":  # yes to both questions about the red images, no to all others
        assert found["first"][1][:2] == ("dpg_corrected", pytest.approx(100 / 3))
        assert {item.cluster for item in items if "yes" in answers[item.id].text} == {"30"}
    if name == "mjhq":
        assert [row[0] for row in found["first"]] == ["fid", "fid_clean-fid"]
        assert found["first"][0][1] != found["first"][1][1]


class RedDogs:
    """A detector that finds a dog of the whole image where it is red, and a sure cat that is not."""

    def __init__(self, folder, device):
        pass

    def __call__(self, image):
        mask = np.ones((image.height, image.width), dtype=bool)
        red = image.getpixel((0, 0))[0] > 128
        things = [Detected("cat", 0.25, (0, 0, 1, 1), mask), Detected("dog", 0.31 if red else 0.3, (0, 0, 8, 8), mask)]
        return things[::-1]


class AlwaysRed:
    def __init__(self, folder, device):
        pass

    def __call__(self, image, found):
        return ["red"] * len(found)


def test_what_a_detector_and_a_color_classifier_of_ones_own_find_is_judged(tmp_path):
    card, items = benchmark("geneval", tmp_path / "files")
    networks = {name: Network(kind=f"test_generation_networks:{kind}", path=str(tmp_path))
                for name, kind in (("detector", "RedDogs"), ("colors", "AlwaysRed"))}  # fmt: skip
    card = card.model_copy(update={"networks": networks})
    for item in items:
        red = item.id.endswith("0")
        write(tmp_path / "images" / f"{item.about['file']}.png", png("red" if red else "blue"))
    job, worker = examine_job(card, items, tmp_path / "images", tmp_path / "found")
    run_jobs([job], Examiner, *worker, "cpu")
    answers = join(card, items, read_answers(tmp_path / "found"), "found")
    scores = {
        score.name: score.value for score in score_answers(card, items, answers, origin_of(tmp_path / "found"))[0]
    }
    assert scores["single_object"] == scores["colors"] == 0.25
    assert scores["two_object"] == scores["counting"] == scores["color_attr"] == 0.0
    assert json.loads(answers["00003/0000"].text) == [["dog", "red", [0, 0, 8, 8], 0.31]]
    assert json.loads(answers["00000/0000"].text) == [["dog", "", [0, 0, 8, 8], 0.31]]
    assert json.loads(answers["00000/0001"].text) == []


@pytest.mark.parametrize("name", ["geneval", "mjhq", "dpg"])
def test_exports_are_the_official_layout_and_read_back(name, tmp_path):
    card, items = benchmark(name, tmp_path / "files")
    colors = {item.id: (5 * number % 256, 7, 9) for number, item in enumerate(items)}
    answers = {item.id: Answer(item.id, "", png(colors[item.id])) for item in items}
    files = EXPORTS.find(name, "test")(card, [(item, answers[item.id]) for item in items])
    for file, content in files.items():
        write(tmp_path / "out" / file, content)
    found = checked_images(card, items, tmp_path / "out")
    from unifork.evaluation.generation.layout import image_of as read_back

    for item in items:
        assert open_image(read_back(item, tmp_path / "out", found[item.id][0])).getpixel((0, 0)) == colors[item.id]
    if name == "geneval":
        assert json.loads((tmp_path / "out" / "00003" / "metadata.jsonl").read_text())["prompt"] == items[12].question
        assert len(files) == len(items) + len(items) // 4
    with pytest.raises(DataError, match=rf"{name}: {items[1].id} has no image"):
        EXPORTS.find(name, "test")(card, [(items[1], None)])

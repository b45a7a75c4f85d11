"""The pieces of a page: parts of a model, images as data, plots, surroundings, and the real tokenizer's codec."""

import base64
import io
import json
import subprocess

import numpy as np
import pytest
from PIL import Image
from report_samples import experiment

from unifork.config import load_eval
from unifork.config.evals import ShowPart
from unifork.errors import DataError
from unifork.evaluation.statistics import Score
from unifork.image_tokenizer.architecture import Architecture
from unifork.image_tokenizer.model import ImageTokenizer
from unifork.report.codec import load_codec
from unifork.report.images import LARGEST, shown_image
from unifork.report.plots import MOST_POINTS, Recorded, curves_of, loss_files, training_plots
from unifork.report.scores import measured
from unifork.report.surroundings import revision, surroundings
from unifork.report.tables import count, duration
from unifork.report.training import part_of


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("layers.14.self_attn.generation.q_proj.weight", "generation branch"),
        ("layers.0.mlp.shared.up_proj.weight", "shared trunk"),
        ("norm.image.weight", "image branch"),
        ("norm.shared.weight", "shared trunk"),
        ("embed_tokens.weight", "embeddings"),
        ("connector.linear1.bias", "connector"),
        ("image_head.norm.weight", "image head"),
        ("lm_head.weight", "text head"),
        ("codebook", "codebook"),
    ],
)
def test_parts_of_a_model(tensor, part):
    assert part_of(tensor) == part


def test_small_images_are_exact_and_large_ones_small():
    pixels = np.random.default_rng(0).integers(0, 256, (48, 30, 3), dtype=np.uint8)
    small = shown_image(Image.fromarray(pixels))
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(small.src.partition(",")[2])))) == pixels).all()
    large = shown_image(Image.new("CMYK", (4000, 1000)))
    assert (large.width, large.height) == (LARGEST, LARGEST // 4)
    assert large.src.startswith("data:image/jpeg")
    assert len(large.src) < 5000


def test_transparency_survives():
    clear = shown_image(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert Image.open(io.BytesIO(base64.b64decode(clear.src.partition(",")[2]))).getpixel((0, 0))[3] == 0


def test_long_histories_make_small_plots():
    history = [{"track": "joint", "step": step, "text_loss": 1 / (1 + step)} for step in range(20_000)]
    (plot,) = training_plots({"fork": [Recorded("s1", history)]}, {"fork": {0: "fork"}})
    assert len(plot.src) < 60 * MOST_POINTS + 10_000
    assert "20000 steps" in plot.alt


def test_plots_have_axes_of_tokens_and_documents_where_steps_have_them():
    step = {"track": "joint", "text_loss": 1.0, "tokens": 700.0, "documents": 16}
    plots = training_plots({"fork": [Recorded("s1", [step] * 9)]}, {"fork": {0: "fork"}})
    svg = base64.b64decode(plots[0].src.partition(",")[2]).decode()
    assert ">tokens<" in svg
    assert ">documents<" in svg


def test_speed_and_memory_are_drawn_over_the_steps_of_all_stages():
    history = [{"track": "joint", "step": step} for step in range(4)]
    rates = [{"finished_steps": 2, "tokens_per_second": 64.0, "documents_per_second": 2.0, "memory_gib": 0.5}]
    lines = {"fork": [Recorded("s1", history, rates), Recorded("s2", history, rates, before=4)]}
    titles = ("Tokens per second", "Documents per second", "Peak memory, GiB")
    assert [plot.title for plot in training_plots(lines, {"fork": {0: "fork"}})] == [*titles]
    assert curves_of(lines, titles[0])["fork", ""].tolist() == [[2, 64], [6, 64]]


def test_losses_are_metrics_and_plots():
    history = [{"track": "joint", "step": step, "text_loss": 4.0 - step} for step in range(3)]
    held_out = [{"part": "own-caption-generate", "finished_steps": 3, "text_loss": 2.5}]
    files = loss_files({"fork": [Recorded("s1", history, held_out)]})
    assert json.loads(files["losses.json"]) == {
        "fork.text_loss": 2.0,
        "fork.text_loss.held_out.own-caption-generate": 2.5,
    }
    assert files["losses/text_loss.csv"].decode().splitlines()[:2] == ["variant,of,step,value", "fork,,1,4"]
    assert len(files) == 2  # no file for a loss that was not recorded


@pytest.mark.parametrize(
    ("card", "name", "value", "chance", "text", "place"),
    [
        ("mme", "perception", 1500.0, 500.0, "1500.0 ± 0.100", (0.75, 0.25)),
        ("mme", "count", 50.0, 100.0, "50.0 ± 0.100", (0.25, 0.5)),
        ("pope", "pope", 0.8, 0.5, "0.800 ± 0.100", (0.8, 0.5)),
        ("pope", "pope", 7.5, 0.5, "7.500 ± 0.100", (None, None)),
        ("lower", "fid", 25.0, 150.0, "25.0 ± 0.100", (0.75, None)),
    ],
)
def test_scores_stand_on_the_scale_of_their_card(card, name, value, chance, text, place):
    shown = load_eval("mme" if card == "lower" else card)
    if card == "lower":
        shown = shown.model_copy(update={"show": ShowPart(scales={"fid": (100.0, 0.0)})})
    rest = {"items": 2, "clusters": 2, "rule": "official", "unread": 0.0, "missing": 0, "items_hash": "a"}
    rest |= {"model": "b", "decoding": "c", "seed": None, "interval": None}
    found = measured(Score(name, "all", value=value, standard_error=0.1, chance=chance, **rest), shown)
    assert found == (text, *(pytest.approx(number) if number is not None else None for number in place))


def test_numbers_as_people_write_them():
    assert count(9_999) == "9\u202f999"
    assert count(385_500_000) == "385.50\u202fM"
    assert [duration(seconds) for seconds in (None, 4.2, 600, 9000)] == ["not measured", "4 s", "10 min", "2 h 30 min"]


def test_the_revision_says_whether_it_is_clean(tmp_path, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert revision(tmp_path) == "not a git checkout"

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "file").write_text("one")
    (tmp_path / "dvc.lock").write_text("one")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    (tmp_path / "dvc.lock").write_text("two")
    assert revision(tmp_path).endswith(", clean")
    (tmp_path / "file").write_text("two")
    assert revision(tmp_path).endswith("with uncommitted changes in 1 file")


def test_surroundings_without_any_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    found = surroundings(tmp_path)
    assert found["revision"] == "not a git checkout"
    assert found["versions"]["torch"]
    assert found["gpus"] == []


def test_the_codec_of_a_real_tokenizer(tmp_path):
    config = experiment().image_tokenizer
    decoder = config.decoder.model_copy(update={"multipliers": (1, 1, 1, 1)})
    architecture = Architecture.of(config.model_copy(update={"decoder": decoder}))
    tokenizer = ImageTokenizer(architecture)
    tokenizer.save(tmp_path / "one")
    tokenizer.save(tmp_path / "two")
    codec = load_codec(tmp_path / "one")
    assert load_codec(tmp_path / "two") is codec
    assert codec.decode(np.zeros((3, 36, 2), dtype=np.uint16)).shape == (3, 48, 48, 3)
    assert codec.reconstruct(np.zeros((2, 48, 48, 3), dtype=np.uint8)).shape == (2, 48, 48, 3)
    with pytest.raises(DataError, match="allowed are"):
        codec.decode(np.zeros((3, 35, 2), dtype=np.int64))
    with pytest.raises(DataError, match="0 to 15"):
        codec.decode(np.full((1, 36, 2), 16))
    with pytest.raises(DataError, match="not there"):
        load_codec(tmp_path / "three")

"""`unifork plan`: numbers against arithmetic by hand, at the size of the paper."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from unifork import planning
from unifork.cli import app
from unifork.commands.plan import amount
from unifork.config import load_card
from unifork.errors import ConfigError
from unifork.experiments import resolve
from unifork.training.flops import peak_flops

ROOT = Path(__file__).parent.parent
PAPER = resolve("paper", ROOT / "experiments", ROOT / "datasets")
MODEL = planning.meta_model(PAPER, PAPER.variants["unifork"])
ASSUMED = planning.Assumptions()
CARDS = {name: load_card(name, ROOT / "datasets") for name in PAPER.datasets}


@cache
def tracks_of_the_paper() -> list[planning.TrackPlan]:
    """Without their FLOPs, which take long at this size; those of a document are compared below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "document_flops", lambda *_: 1.0)
        return list(planning.track_plans(PAPER, CARDS, "unifork", MODEL, ASSUMED))


# by hand from Qwen2.5-0.5B's shape: hidden 896, 2 of 14 heads of 64 for keys, MLP 4864, 151,936 words
WORDS = 151_936 * 896
LAYER = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864
"""Weights of the matrices of one layer."""
EXTRAS = 896 + 2 * 128 + 2 * 896
"""Biases of query, key and value, and two norms."""
CONNECTOR = 1024 * 896 + 896 * 896
HEAD_BLOCK = 4 * 896 * 3584 + 2 * 896 * 3584
CLASSIFIER = 896 * 16384
PUBLISHED_HEAD = 401_936_896


def test_parameters_are_the_papers():
    found = planning.parameter_counts(MODEL.config)
    branch = 12 * (LAYER + EXTRAS)
    assert found["embed_tokens"] == WORDS
    assert {found[f"layers ({name})"] for name in ("shared", "understanding", "generation")} == {branch}
    paper = {name.rpartition(": ")[2]: count for name, count in found.items() if "paper" in name}
    assert paper == {
        "understanding": WORDS + 2 * branch + 896,
        "generation": 2 * branch + 896 + PUBLISHED_HEAD,
        "total": 2 * WORDS + 3 * branch + 2 * 896 + PUBLISHED_HEAD,
    }
    assert [round(n / 1e6, 1) for n in paper.values()] == [494.0, 759.8, 1211.1]
    assert found["total"] == sum(p.numel() for p in MODEL.parameters())
    assert found["used for understanding"] == found["total"] - branch - 896 - found["image_head"]


def expected_flops(task: str, trained: str) -> float:
    """One document of 100 text tokens (60 supervised) and an image, by hand. trained: all, align or branch.

    A matrix of W weights costs 2W a token forward, 2W backward where it is trained or lies behind something that is,
    and 2W for its own gradient; causal attention 4 * (L + 1) / 2 * width a query forward and twice that backward.
    """
    L = 100 + 578
    passes = {"all": 3 + 3, "align": 2 + 2, "branch": 1 + 3}[trained]  # forward and backward, trunk + branch
    attention_passes = {"all": 3 + 3, "align": 3 + 3, "branch": 1 + 3}[trained]
    total = L * 12 * (LAYER * 2 * passes + 4 * (L + 1) / 2 * 896 * attention_passes)
    total += 576 * CONNECTOR * 2 * {"all": 3, "align": 3, "branch": 1}[trained]
    if task == "understanding":
        return total + 60 * WORDS * 2 * {"all": 3, "align": 2, "branch": 2}[trained]
    matrices = 896 * 896 + 3 * 1024 * 896 + 4 * (6 * HEAD_BLOCK + CLASSIFIER)
    head = 2 if trained == "branch" else 3
    return total + 576 * (matrices * 2 * head + 6 * 4 * 4 * 2.5 * 3584 * 3)


@pytest.mark.parametrize("task", ["understanding", "generation"])
@pytest.mark.parametrize("trained", ["all", "align", "branch"])
def test_flops_are_those_of_the_closed_form(task, trained):
    """Up to rotary angles, the diagonal of attention, and the first matrix of a chain: its input has no gradient."""
    names = {
        "all": lambda _: True,
        "align": lambda name: name.startswith(("connector.", "image_head.")),
        "branch": lambda name: f".{task}." in name,
    }[trained]
    chosen = {name for name, _ in MODEL.named_parameters() if names(name)}
    supervised = (60, 0) if task == "understanding" else (0, 576)
    found = planning.document_flops(MODEL, task, planning.Length(100, 578, *supervised), chosen)
    assert found == pytest.approx(expected_flops(task, trained), rel=2e-3)


def test_a_context_without_room_for_an_image_is_refused():
    track = PAPER.stages["s2-sft"].tracks["joint"]
    with pytest.raises(ConfigError, match="place: a context of 500 tokens; an image alone has 578"):
        planning.average_length(track.mixture[0], CARDS[track.mixture[0].dataset], track, 576, 500, ASSUMED, "place")


def documents(track: planning.TrackPlan) -> float:
    return sum(entry.documents for entry in track.entries)


def test_tracks_count_documents_tokens_and_passes():
    tracks = {(t.stage, t.track): t for t in tracks_of_the_paper()}
    imagenet = tracks["s1-imagenet", "joint"]
    assert documents(imagenet) == 26_700 * 384
    assert {entry.length.image for entry in imagenet.entries} == {578}
    assert imagenet.entries[0].passes == pytest.approx(26_700 * 192 / 1_281_167)
    assert round(imagenet.trained / 1e6, 1) == 133.9  # the folded head and the connector
    understanding = tracks["s3", "understanding"]
    assert documents(understanding) == 15_000 * 256
    assert understanding.trained == 12 * (LAYER + EXTRAS) + 896
    assert sum(map(documents, tracks.values())) == pytest.approx(132_480_000)


@pytest.mark.slow
def test_fewer_supervised_positions_and_isolated_layers_cost_less():
    track = PAPER.stages["s2-sft"].tracks["joint"]
    entry = track.mixture[0]
    short = track.model_copy(update={"supervised_positions": 256})
    card = CARDS[entry.dataset]
    lengths = [planning.average_length(entry, card, part, 576, 1350, ASSUMED, "test") for part in (track, short)]
    assert [length.supervised_positions for length in lengths] == [576, 256]
    alone = PAPER.variants["unifork"].model_copy(update={"plan": "modality_isolated*24 norm:modality"})
    joint = alone.model_copy(update={"plan": "modality*24 norm:modality"})
    cost = [
        planning.document_flops(planning.meta_model(PAPER, variant), "generation", lengths[0], set())
        for variant in (alone, joint)
    ]
    text, image = lengths[0].text, lengths[0].image
    assert cost[1] - cost[0] == pytest.approx(24 * 4 * 896 * text * image)  # pairs of text and image are not computed
    three = {name for name, _ in MODEL.named_parameters()}
    few, all_ = (planning.document_flops(MODEL, "generation", length, three) for length in reversed(lengths))
    assert few < 0.7 * all_


def test_disk_is_codes_and_checkpoints():
    cards = {name: load_card(name, ROOT / "datasets") for name in PAPER.datasets}
    assert planning.image_bytes(PAPER) == 576 * 4 * 2
    assert planning.code_bytes(PAPER, cards)["coyo/pad"] == 10_000_000 * 4608
    total = sum(p.numel() for p in MODEL.parameters())
    every = tracks_of_the_paper()
    assert planning.prepared_bytes(PAPER, every)["coyo-caption-generate-plain"] == 10_000_000 * (60 + 5 * 40)
    tracks = [t for t in every if t.stage == "s2-sft"]
    assert planning.checkpoint_bytes(MODEL, tracks) == 4 * (total + 16384 * 1024) + 8 * total


def test_hours_need_a_known_chip_and_a_utilization():
    assert planning.gpu_hours(312e12 * 3600, "a100", 0.5) == pytest.approx(2.0)
    assert planning.gpu_hours(1e18, "a100", None) is None
    with pytest.raises(ConfigError, match=r"--chip: unknown chip 'h10'.*Did you mean 'h100'"):
        planning.gpu_hours(1e18, "h10", 0.5)


def test_an_imported_tokenizer_has_the_published_shape():
    imported = SimpleNamespace(image_tokenizer=SimpleNamespace(image_size=384))
    assert planning.code_shape(imported) == planning.code_shape(PAPER)


@pytest.mark.slow  # the size of the paper
def test_the_command_prints_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["plan", "paper", "--chip", "a100", "--mfu", "0.4"])
    assert result.exit_code == 0, result.output
    for text in (
        "494.0 M",
        "759.8 M",
        "1.211 B",
        "4,608 bytes",
        "unifork-s2-pretrain",
        "Assumed: 40 tokens",
        "of a100",
    ):
        assert text in result.output


@pytest.mark.parametrize(
    ("number", "unit", "expected"),
    [
        (896, "", "896"), (37_120, "", "37.12 k"), (1_211_100_000, "", "1.211 B"), (999_960, "", "1.000 M"),
        (4.532e9, "FLOP", "4.532 GFLOP"), (176.5e18, "FLOP", "176.5 EFLOP"), (288, "B", "288 B"), (None, "B", ""),
    ],
)  # fmt: skip
def test_an_amount_has_digits_whatever_its_size(number, unit, expected):
    assert amount(number, unit) == expected


@pytest.mark.parametrize(
    ("arguments", "hours"), [([], "not measured"), (["--chip", "h100", "--mfu", "0.4"], "of h100")]
)
def test_a_small_experiment_is_not_all_zeros(arguments, hours, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["plan", "micro", *arguments])
    assert result.exit_code == 0, result.output
    for text in ("25.60 k", "37.12 k", "GFLOP", "172.8 kB", hours):
        assert text in result.output
    assert " 0.0 M" not in result.output


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("Tesla T4", None),
    ],
)
def test_a_chip_is_known_by_the_name_its_driver_gives(device, tflops):
    assert peak_flops(device) == (tflops and tflops * 1e12)

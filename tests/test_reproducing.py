"""docs/reproducing.md says what the code does; what it offers of the official code's habits works."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from unifork import config, inference
from unifork.config import Sampling, load_card
from unifork.documents.loader import TrackLoader
from unifork.documents.mixture import CodesIdentity
from unifork.documents.prompts import TEMPLATES
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import ConfigError
from unifork.experiments import resolve
from unifork.layout import Layout
from unifork.shards.manifest import read_manifest
from unifork.sources import download_job
from unifork.vocabulary import DROPPED_PROMPT, TURN_START

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/reproducing.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ") and (cells := [cell.strip() for cell in line.strip("|").split("|")])[0] != "topic"
}
PAPER = resolve("paper", ROOT / "experiments", ROOT / "datasets")
PLAIN = PAPER.model_dump(mode="json")

NOT_IN_THE_PAPER = {
    *(
        "Track.mixture",
        "Track.optimizer",
        "Stage.tracks",
        "MixtureEntry.dataset",
        "MixtureEntry.task",
        "MixtureEntry.text",
    ),  # its shape
    *("Stage.checkpoint_every", "Stage.checkpoint_minutes", "Stage.keep_checkpoints"),
    *("Stage.sample_prompts", "Stage.sampling", "Stage.validation", "Stage.extend"),
    "Track.without_branches",  # of variants that it does not have
    *("Stage.loss_band", "Sampling.seed"),  # they decide no weights, or nothing that anybody published
}
"""Fields without a counterpart in the paper or the official code."""


def field(name: str):
    """The field `Class.field` of a configuration."""
    owner, _, key = name.partition(".")
    return getattr(config, owner).model_fields[key]


def found(path: str):
    """A value of experiments/paper.yaml by its path, or the default of `Class.field`."""
    if path[0].isupper():
        return TypeAdapter(object).dump_python(field(path).default, mode="json")
    value = PLAIN
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def test_what_decides_the_weights_is_in_the_table():
    """A field that is built and not named would leave a row that says otherwise unnoticed."""
    decides = {f"{owner}.{name}" for owner in ("Track", "OptimizerConfig", "Stage", "MixtureEntry", "Sampling")
               for name in getattr(config, owner).model_fields} - NOT_IN_THE_PAPER  # fmt: skip
    named = set(re.findall(r"[A-Z]\w+\.\w+", PAGE))
    assert decides - named == set()
    assert NOT_IN_THE_PAPER & named == set()


@pytest.mark.parametrize(
    ("topic", "path", "value"),
    [(topic, *match) for topic, cells in ROWS.items() for match in re.findall(r"`([\w.-]+) = ([^`]+)`", cells[2])],
)
def test_a_value_in_the_table_is_the_value_here(topic, path, value):
    assert found(path) == yaml.safe_load(value)


@pytest.mark.parametrize("topic", ROWS)
def test_the_other_way_is_a_field_or_a_reason(topic):
    here, other = ROWS[topic][2:]
    offers = re.findall(r"`([A-Z]\w+\.\w+): ([^`]+)`", other)
    assert bool(offers) != bool(re.match(r"not offered: \w+", other))
    for name, value in offers:
        plain = yaml.safe_load(value)
        TypeAdapter(field(name).annotation).validate_python(plain)
        assert f"{name} = {value}" not in here, "that is what is done here"
        if name == "MixtureEntry.template":
            assert plain in TEMPLATES


def test_paper_and_experiment_agree_on_the_documents():
    """Appendix A: steps times batches."""
    tracks = {f"{s}.{t}": track for s, stage in PAPER.stages.items() for t, track in stage.tracks.items()}
    stage_1 = tracks["s1-imagenet.joint"].steps + tracks["s1-captions.joint"].steps
    assert stage_1 == 125_000
    assert sum(track.steps * track.batch_documents for track in tracks.values()) == 132_480_000
    assert all(stage.context == 1350 for stage in PAPER.stages.values())


@pytest.mark.parametrize("name", list(PAPER.datasets))
def test_a_set_that_must_be_brought_says_so(name, tmp_path):
    card, use = load_card(name, ROOT / "datasets"), PAPER.datasets[name]
    with pytest.raises(ConfigError, match=rf"card {name}: .*Where it is: \w+"):
        download_job(card, use.rows, use.shard_rows, 0, tmp_path)
    assert card.redistribute_codes is False


def loader(root: Path, positions: int | None) -> TrackLoader:
    experiment = config.load(config.Experiment, root / "params.yaml")
    track = experiment.stages["s2-pretrain"].tracks["joint"]
    lineage = read_manifest(root / "data/codes/shapes/crop").lineage
    return TrackLoader(
        "joint", track.model_copy(update={"supervised_positions": positions}), Layout(root),
        TextTokenizer(root / "tokenizers/text"), CodesIdentity(36, 4, lineage["codebook_id"], lineage["encoder_id"]),
        seed=0, context=400, row_tokens=512, rows_per_microbatch=1,
    )  # fmt: skip


def test_only_the_first_positions_of_a_image_are_supervised(tiny_root):
    whole, part = loader(tiny_root, None), loader(tiny_root, 10)
    plan, short = whole.plan(3, 1), part.plan(3, 1)
    assert (plan.keys, plan.text_targets) == (short.keys, short.text_targets)
    assert plan.image_targets // 36 == short.image_targets // 10 > 0
    for every, first in zip(whole.batches(plan, 0), part.batches(short, 0), strict=True):
        assert first.codes_ND.equal(every.codes_ND)
        for name in ("image_source_M", "image_target_MD"):
            wanted = getattr(every, name).unflatten(0, (-1, 36))[:, :10].flatten(0, 1)
            assert getattr(first, name).equal(wanted)
    with pytest.raises(ConfigError, match="supervised_positions is 37; an image has 36 positions"):
        loader(tiny_root, 37)


def test_a_negative_prompt_takes_the_place_of_the_dropped_one(tiny_root, monkeypatch):
    engine = inference.Engine.load(tiny_root / "models/unifork-init")
    seen = []

    def generate(model, prompts, unconditional, sampling, **_):
        seen.append(list(unconditional))
        raise InterruptedError

    monkeypatch.setattr(inference, "generate_images", generate)
    for negative in (None, "blurry, dark."):
        with pytest.raises(InterruptedError):
            engine.generate_images(["a cat"], Sampling(negative_prompt=negative))
    dropped, start = (engine.tokenizer.id_of(name) for name in (DROPPED_PROMPT, TURN_START))
    assert [(ids[0], dropped in ids) for ids in seen] == [(start, True), (start, False)]
    assert "USER: blurry, dark. ASSISTANT:" in engine.tokenizer.decode(seen[1])

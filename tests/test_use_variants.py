"""`unifork use` with several variants, training seeds, stages that extend others, and rows without an image."""

import re
from pathlib import Path

import pytest
from test_use import ANSWER, CAPTION, TRACK, edit, here, own
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import Experiment, load
from unifork.errors import ConfigError
from unifork.experiments import Choice, resolve, use

__all__ = ["here"]


MOT = {"variants/mot": {"like": "unifork", "plan": "mot"}, "variants/shared": {"like": "mot", "plan": "shared"}}
NO_BRANCHES = {f"stages/s3/tracks/{name}/without_branches": ["layers.*"] for name in ("generation", "understanding")}


def test_seeds_expand_variants_runs_and_evaluations_alone(here):
    alone, several = resolve("micro"), resolve(own({"seeds": [0, 3]}))
    stages = alone.variants["unifork"].stages
    assert list(alone.runs) == [f"unifork-{stage}" for stage in stages]
    assert list(several.runs) == [f"unifork-seed{seed}-{stage}" for seed in (0, 3) for stage in stages]
    assert several.runs["unifork-seed3-s2-pretrain"].after == "models/unifork-seed3-s1-captions"
    assert {name: variant.seed for name, variant in several.variants.items()} == {
        "unifork-seed0": 0,
        "unifork-seed3": 3,
    }
    assert several.groups == {"unifork": {0: "unifork-seed0", 3: "unifork-seed3"}}
    assert list(several.scored) == ["unifork-seed0", "unifork-seed3"]
    for shared in ("datasets", "image_tokenizer", "text_tokenizer", "prepared", "stages", "benchmarks", "data_seed"):
        assert getattr(several, shared) == getattr(alone, shared)


@pytest.mark.slow
def test_the_command_line_chooses_seeds_and_variants(here):
    own({**MOT, **NO_BRANCHES, "seeds": [0, 1]})
    result = CliRunner().invoke(app, ["use", "own", "--seeds", "4", "--variants", "shared,mot"])
    assert result.exit_code == 0, result.output
    chosen = load(Experiment, "params.yaml")
    assert {name: variant.seed for name, variant in chosen.variants.items()} == {"mot-seed4": 4, "shared-seed4": 4}
    assert chosen.prepared == resolve("own").prepared  # those of the variants that are left out, too
    use("own", choice=Choice((5,), plain=True))
    assert list(load(Experiment, "params.yaml").groups.values()) == [{5: name} for name in ("unifork", "mot", "shared")]
    for words in (["--seed", "3", "--seeds", "4"], ["--seeds", "a"], ["--variants", "mit"]):
        assert isinstance(CliRunner().invoke(app, ["use", "own", *words]).exception, ConfigError)


# ------------------------------------------------------------------------------------- comparisons


def test_a_variant_that_is_like_another_has_all_but_its_own_keys(here):
    wide = {"variants/wide": {"like": "shared", "backbone": {"intermediate_size": 200}}}
    variants = resolve(own({**MOT, **NO_BRANCHES, **wide})).variants
    assert variants["mot"] == variants["unifork"].model_copy(update={"plan": "mot"})
    assert variants["shared"] == variants["unifork"].model_copy(update={"plan": "shared"})
    backbone = {**variants["unifork"].backbone, "intermediate_size": 200}
    assert variants["wide"] == variants["shared"].model_copy(update={"backbone": backbone})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants/mot": {"like": "unifrok", "plan": "mot"}}, r"variants\.mot\.like: unknown variant.*'unifork'"),
        ({**MOT, "variants/unifork/like": "shared"}, r"like itself by way of unifork -> shared -> mot -> unifork"),
    ],
)
def test_a_variant_must_be_like_another(here, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(own(changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone/rope_parameters": None}, r"backbone\.rope_parameters: \{.*\} -> None"),
        ({"backbone/initializer_range": 0.02}, r"backbone\.initializer_range: 0\.08 -> 0\.02"),
        ({"stages": ["s2-pretrain"]}, r"stages: \['s1-captions', 's2-pretrain', 's3'\] -> \['s2-pretrain'\]"),
        ({"warm_start": "some/model"}, r"warm_start: None -> some/model"),
        ({"head/layers": 2}, r"head\.layers: 1 -> 2"),
    ],
)
def test_variants_are_equal_but_where_they_say_so(here, changes, message):
    """A variant that is written out may differ from the first in its plan alone; in others a difference is wanted."""
    whole = resolve("micro").variants["unifork"].model_dump(mode="json", exclude={"seed"})
    copied = {f"variants/other/{key}": value for key, value in whole.items() if not isinstance(value, dict)}
    copied |= {
        f"variants/other/{part}/{key}": value for part in ("backbone", "head") for key, value in whole[part].items()
    }
    assert resolve(own({**copied, "variants/other/plan": "unifork:0"})).groups.keys() == {"unifork", "other"}
    with pytest.raises(ConfigError, match=rf"variants\.other is not unifork with another plan: {message}\. Say `like:"):
        resolve(own(copied | {f"variants/other/{key}": value for key, value in changes.items()}))
    only = {f"variants/other/{key}": value for key, value in changes.items()}
    assert resolve(own({"variants/other/like": "unifork", **only})).variants["other"].plan == whole["plan"]


def test_variants_without_branches_train_what_the_stage_says_for_them(here):
    with pytest.raises(ConfigError, match=r"generation\.trainable \(variant mot\): .*matches none"):
        use(own(MOT))
    with pytest.raises(ConfigError, match=r"without_branches \(variant mot\): .*'layer\.\*' matches none"):
        use(own({**MOT, "stages/s3/tracks/generation/without_branches": ["layer.*"]}))
    use(own({**MOT, **NO_BRANCHES}))


@pytest.mark.slow
def test_use_prints_what_differs_and_what_does_not(here):
    own({**MOT, **NO_BRANCHES, "variants/expert": {"like": "shared", "stages": ["s2-pretrain"]}})
    text = " ".join(CliRunner().invoke(app, ["use", "own"]).output.split())
    assert "unifork expert mot shared" in text
    assert "plan shared*1 task*1 norm:task shared mot shared parameters" in text
    assert "steps 41 25 41 41 documents of" in text
    assert re.search(r"trained in s1-captions, joint ([\d.]+ k) - \1 \1", text), text
    own({**MOT, **NO_BRANCHES})
    text = " ".join(CliRunner().invoke(app, ["use", "own"]).output.split())
    assert "The same in all: steps 41; documents of" in text
    assert "initialization drawn by seed and name of the tensor; training seeds 0; order of documents" in text
    assert "differs" not in CliRunner().invoke(app, ["use", "micro"]).output


# --------------------------------------------------------------------------- stages that extend others

MORE = {
    "variants/unifork/stages": ["s1-captions", "s2-pretrain", "s2-more", "s3"],
    "stages/s2-more/extend": "s2-pretrain",
}


def test_an_extending_stage_takes_what_it_does_not_say_but_does_not_warm_up(here):
    rate = {"stages/s2-more/tracks/joint/optimizer/learning_rate": 0.0001}
    use(own({**MORE, **rate, "stages/s2-more/tracks/joint/steps": 7, "stages/s2-pretrain/ema": {"decay": 0.99}}))
    experiment = load(Experiment, "params.yaml")
    first, more = experiment.stages["s2-pretrain"], experiment.stages["s2-more"]
    joint, own_track = first.tracks["joint"], more.tracks["joint"]
    assert joint.optimizer.warmup_steps == 100
    changed = joint.optimizer.model_copy(update={"learning_rate": 0.0001, "warmup_steps": 0})
    assert own_track == joint.model_copy(update={"steps": 7, "optimizer": changed})
    assert more == first.model_copy(update={"extend": "s2-pretrain", "tracks": {"joint": own_track}})
    assert experiment.steps_before("s2-more") == {"joint": 25}
    assert experiment.runs["unifork-s2-more"].after == "models/unifork-s2-pretrain"
    assert experiment.runs["unifork-s3"].after == "models/unifork-s2-more"


def test_two_stages_may_extend_the_same(here):
    stages = ["s1-captions", "s2-pretrain", "s2-more", "s2-again", "s3"]
    again = {"variants/unifork/stages": stages, "stages/s2-again": {"extend": "s2-pretrain"}}
    runs = resolve(own({**MORE, **again})).runs
    assert runs["unifork-s2-again"].after == "models/unifork-s2-pretrain"
    assert runs["unifork-s3"].after == "models/unifork-s2-again"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stages/s2-more/extend": "s2-pretain"},
            r"stages\.s2-more\.extend: unknown stage .*Did you mean 's2-pretrain'",
        ),
        ({"stages/s2-pretrain/extend": "s2-more"}, r"extends itself by way of s2-pretrain -> s2-more -> s2-pretrain"),
        (
            {"variants/unifork/stages": ["s2-more", "s2-pretrain"]},
            r"s2-more extends s2-pretrain, which must stand before",
        ),
        ({"stages/s2-more/context": 100}, r"not as in s2-pretrain, .*: context\."),
        ({"stages/s2-more/tracks/joint/mixture": [CAPTION]}, r"which it extends: tracks\.joint\.mixture\. Order"),
        ({"stages/s2-more/tracks/joint/trainable": ["image_head.*"]}, r"which it extends: tracks\.joint\.trainable\."),
        ({"stages/s2-more/tracks/joint/batch_documents": 4}, r"which it extends: tracks\.joint\.batch_documents\."),
        (
            {"stages/s2-more/tracks/joint": None},
            r"which it extends: tracks\.joint\.batch_documents, tracks\.joint\.mix",
        ),
        ({"stages/s2-pretrain/steps": 3}, r"stages\.s2-pretrain: unknown key 'steps'"),
        ({"stages/s2-more/ema": {"decay": 1.0}}, r"stages\.s2-more\.ema\.decay: .*less than 1"),
    ],
)
def test_a_stage_that_cannot_go_on_is_refused(here, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve(own({**MORE, **changes}))


# ------------------------------------------------------------------------------------ rows without an image

CORPUS = """
name: corpus
title: t
homepage: h
license: CC0-1.0
attribution: a
redistribute_codes: true
text_only: keep
source: {kind: table, options: {image: null, files: corpus.jsonl, texts: {caption: text}}}
tasks: {understanding: {view: pad, texts: [caption]}, generation: {view: crop, texts: [caption]}}
"""
PLAIN = {"dataset": "corpus", "task": "understanding", "text": "caption", "template": "text", "weight": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{TRACK}/mixture": [ANSWER, CAPTION | {"dataset": "corpus"}]},
         r"joint\.mixture\[1\]: template 'generate' has an image, no row of corpus has any"),
        ({f"{TRACK}/mixture": [PLAIN | {"template": "caption"}]}, "template 'caption' has an image, no row of corpus"),
        ({f"{TRACK}/mixture": [PLAIN | {"dataset": "shapes", "text": "description"}]},
         "template 'text' is for rows without an image; card shapes drops them, unless it says text_only: keep"),
        ({"image_tokenizer/training/datasets": ["shapes", "corpus"]},
         "image_tokenizer.training.datasets: no row of corpus has an image"),
        ({}, "card corpus: text_only: no row of its source has an image; say text_only: keep"),
    ],
)  # fmt: skip
def test_a_mixture_that_no_row_fits_is_refused(here, changes, message):
    Path("datasets/corpus.yaml").write_text(CORPUS)
    if not changes:
        edit("datasets/corpus.yaml", "text_only: keep\n", "")
    sets = {"datasets/corpus": {"rows": 10, "shard_rows": 10}}
    with pytest.raises(ConfigError, match=message) as error:
        use(own(sets | changes))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_corpus_is_used_and_its_documents_are_planned_without_images(here):
    Path("datasets/corpus.yaml").write_text(CORPUS)
    use(own({"datasets/corpus": {"rows": 10, "shard_rows": 10}, f"{TRACK}/mixture": [ANSWER, PLAIN]}))
    result = CliRunner().invoke(app, ["plan", "--text-tokens", "70"])
    assert re.search(r"s2-pretrain +corpus +understanding +text +200 +76 +0 ", result.output), result.output
    assert re.search(r"data/codes/corpus/pad +0 B", result.output), result.output

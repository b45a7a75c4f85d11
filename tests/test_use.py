"""`unifork use`: what a run would look up is looked up first; edits by hand are not lost."""

import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import Experiment, load, load_experiment
from unifork.errors import ConfigError
from unifork.experiments import names, params_text, resolve, use

ROOT = Path(__file__).parent.parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the project's experiments, cards and cluster files, to be changed."""
    for folder in ("experiments", "datasets", "clusters"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIFORK_CLUSTER", raising=False)
    return tmp_path


def edit(path, old, new):
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new, 1))


def own(changes, extends="micro"):
    """`experiments/own.yaml`: another experiment with changes, by dotted paths."""
    plain = {"extends": extends}
    for path, value in changes.items():
        *folders, last = path.split("/")
        inside = plain
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[last] = value
    Path("experiments/own.yaml").write_text(yaml.safe_dump(plain))
    return "own"


# ----------------------------------------------------------------------------------- edits by hand


def test_an_edited_experiment_is_simply_used_again(here):
    use("micro")
    edit("experiments/micro.yaml", "steps: 25", "steps: 31")
    use("micro")
    assert load(Experiment, "params.yaml").stages["s2-pretrain"].tracks["joint"].steps == 31
    use("demo")
    assert Path("params.yaml").read_text() == params_text(resolve("demo"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("training_seed: 0", "training_seed: 1", r"variants\.\*\.seed: 0, but the rest of the file needs 1\. .*micro"),
        ("    - s3\n    seed", "    seed", r"runs: .*unifork-s3, but the rest of the file needs unifork-s1"),
        ("          template: generate-plain", "          template: drawn", "prepared: .*shapes-caption-drawn"),
    ],
)
def test_programs_take_edits_unless_something_else_follows_from_them(here, old, new, message):
    use("micro")
    edit("params.yaml", "steps: 25", "steps: 31")
    assert load_experiment().stages["s2-pretrain"].tracks["joint"].steps == 31
    edit("params.yaml", old, new)
    with pytest.raises(ConfigError, match=message):
        load_experiment()


def test_params_edited_by_hand_are_refused_with_the_keys(here):
    use("micro")
    edit("params.yaml", "steps: 25", "steps: 31")
    edit("params.yaml", "prompt_drop: 0.1", "prompt_drop: 0.3")
    before = Path("params.yaml").read_text()
    for name in ("micro", "demo"):
        with pytest.raises(ConfigError, match=r"stages\.s2-pretrain\.tracks\.joint\.steps: 25 -> 31.*--force") as error:
            use(name)
        assert "prompt_drop: 0.1 -> 0.3" in str(error.value)
        assert str(error.value).count("->") == 2
    assert Path("params.yaml").read_text() == before
    use("demo", force=True)
    assert Path("params.yaml").read_text() == params_text(resolve("demo"))


def test_a_change_that_the_experiment_says_too_is_no_loss(here):
    use("micro")
    edit("params.yaml", "steps: 25", "steps: 31")
    edit("experiments/micro.yaml", "steps: 25", "steps: 31")
    use("micro")
    assert Path("params.yaml").read_text() == params_text(resolve("micro"))


def test_few_keys_are_shown_and_the_others_counted(here):
    use("micro")
    Path("params.yaml").write_text("name: micro\n")
    with pytest.raises(ConfigError, match=r"-> nothing and \d+ more\. Put") as error:
        use("micro")
    assert str(error.value).count("->") == 10


def test_without_a_name_the_experiments_are_listed(here):
    result = CliRunner().invoke(app, ["use"])
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.output.splitlines()] == sorted(names())
    assert "The whole line in a minute and a half" in result.output
    assert not Path("params.yaml").exists()


def test_documents_are_prepared_once_for_each_column_and_template(here):
    plain = use("micro").model_dump(mode="json")
    assert list(plain["prepared"]) == [
        "shapes-caption-generate-plain", "shapes-description-caption-plain", "shapes-caption-generate",
        "shapes-conversations-answer-plain", "shapes-description-caption", "shapes-conversations-answer",
    ]  # fmt: skip
    assert plain["prepared"]["shapes-caption-generate"] == {
        "dataset": "shapes", "text": "caption", "template": "generate", "codes": "data/codes/shapes/crop",
    }  # fmt: skip
    assert {run["prepared"] for run in plain["runs"].values()} == {"data/prepared"}
    alone = use(own({f"{TRACK}/mixture": [ANSWER]}))
    assert alone.runs["unifork-s2-pretrain"].prepared == "data/prepared/shapes-conversations-answer"
    assert alone.prepared["shapes-conversations-answer"].codes == "data/codes/shapes/pad"


# ------------------------------------------------------------------------------------- checks first

TRACK = "stages/s2-pretrain/tracks/joint"
CAPTION = {"dataset": "shapes", "task": "generation", "text": "caption", "template": "generate", "weight": 1.0}
ANSWER = {"dataset": "shapes", "task": "understanding", "text": "conversations", "template": "answer", "weight": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{TRACK}/mixture": [CAPTION | {"template": "generat"}]},
         r"s2-pretrain\.tracks\.joint\.mixture\[0\]: unknown prompt template 'generat'.*Did you mean 'generate'"),
        ({f"{TRACK}/mixture": [ANSWER, CAPTION | {"template": "answer"}]},
         r"mixture\[1\]: template 'answer' is for understanding, the entry says generation"),
        ({f"{TRACK}/mixture": [ANSWER | {"text": "description"}]},
         r"template 'answer' is for conversations, the entry reads 'description'"),
        ({f"{TRACK}/mixture": [ANSWER | {"template": "caption"}]},
         r"template 'caption' is for captions, the entry reads 'conversations'"),
        ({f"{TRACK}/trainable": ["layer.*"]},
         r"stages\.s2-pretrain\.tracks\.joint\.trainable \(variant unifork\).*'layer\.\*' matches none"),
        ({f"{TRACK}/supervised_positions": 37}, r"joint: supervised_positions is 37; an image has 36 positions"),
        ({"stages/s3/context": 513}, r"stages\.s3\.context is 513; the backbone of variants\.unifork has 512"),
        ({"variants/unifork/plan": "shard*1 task*1"}, r"variants\.unifork: layer plan .*unknown layer kind 'shard'"),
        ({"variants/unifork/backbone/hidden_sise": 3}, r"variants\.unifork: backbone of model_type qwen2: unknown key"),
        ({"variants/unifork/backbone/model_type": "gpt"}, r"variants\.unifork: backbone: unknown model_type 'gpt'"),
        ({"benchmarks/shapes-gen/options": {}}, r"datasets/evals: unknown benchmark 'shapes-gen'.*Did you mean"),
        ({"benchmarks/shapes-generation/options/sample": 3},
         r"card shapes-generation: items\.options: unknown key 'sample'"),
        ({"image_tokenizer/training/shares": {"shapes/pads": 2.0}},
         r"training\.shares: unknown group of images 'shapes/pads'.*Known: shapes/crop, shapes/pad"),
    ],
)  # fmt: skip
def test_what_would_fail_later_fails_at_use(here, changes, message):
    with pytest.raises(ConfigError, match=rf"experiments/own\.yaml: .*{message}"):
        use(own(changes))
    assert not Path("params.yaml").exists()


def test_what_a_card_says_wrong_is_found_at_use(here):
    edit("datasets/shapes.yaml", "detector:READER", "detector:READR")
    with pytest.raises(ConfigError, match=r"card shapes: reader: .*READR"):
        use("micro")
    edit("datasets/shapes.yaml", "rule: min_side", "rule: min_sides")
    with pytest.raises(ConfigError, match=r"card shapes: filters\[0\]\.rule: .*Did you mean 'min_side'"):
        use("micro")
    assert not Path("params.yaml").exists()


def test_rows_of_the_cluster_file_must_hold_a_document(here, monkeypatch):
    own({"stages/s3/context": 400})
    edit("clusters/local.yaml", "row_tokens: 2048}\ntrain_stages", "row_tokens: 399}\ntrain_stages")
    with pytest.raises(ConfigError, match=r"s3\.context is 400, but row_tokens of clusters/local\.yaml is 399"):
        use("own")
    monkeypatch.setenv("UNIFORK_CLUSTER", "clusters/slurm.yaml")
    use("own")


def test_a_dense_model_that_is_not_at_hand_is_not_looked_for(here):
    """Neither its configuration nor that of a tokenizer that is still to be imported is needed."""
    small = resolve("micro").variants["unifork"].model_dump(mode="json", exclude={"seed"})
    dense = small | {"backbone": {}, "warm_start": "some/model"}
    use(own({"variants/unifork": None, "variants/dense": dense}))
    backbone = {name: value for name, value in small["backbone"].items() if name != "vocab_size"}
    use(own({"text_tokenizer": {"import": "some/model"}, "variants/unifork/backbone": backbone}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{TRACK}/stepz": 3},
            r"stages\.s2-pretrain\.tracks\.joint: unknown key 'stepz'\. Did you mean 'steps'\?",
        ),
        ({"sedes": [3]}, r"own\.yaml: \(top\): unknown key 'sedes'\. Did you mean 'seeds'"),
        ({"image_tokenizer/patch_sise": 3}, r"image_tokenizer\.\(trained\): unknown key 'patch_sise'.*'patch_size'"),
        ({"image_tokenizer": {"import": "x", "size": 3}}, r"image_tokenizer\.\(imported\): unknown key 'size'"),
        ({"training_seed": -1}, r"training_seed: Input should be greater than or equal to 0 \(got -1\)"),
        ({"seed": 3}, r"own\.yaml: seed: .*`data_seed` .*`training_seed` .*`seeds` for several runs"),
        ({"stages/s3/seed": 3}, r"own\.yaml: stages\.s3\.seed: .*`data_seed` .*`training_seed`"),
        ({"variants/unifork/seed": 3}, r"own\.yaml: variants\.unifork\.seed: .*`data_seed` .*`training_seed`"),
    ],
)
def test_an_unknown_key_is_told_with_the_known_ones(here, changes, message):
    own(changes)
    with pytest.raises(ConfigError, match=message):
        resolve("own")

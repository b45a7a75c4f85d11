"""Reference runs: which runs are of one configuration, and where the losses of another lie among theirs."""

import json
import math

import numpy as np
import pytest
from stage_runs import RESOURCES
from typer.testing import CliRunner

from unifork import reference
from unifork.cli import app
from unifork.config import Experiment, load
from unifork.errors import ConfigError, DataError
from unifork.layout import Layout
from unifork.reference import Reference, among, configuration, losses_at, references
from unifork.report.training import stages_of
from unifork.shards.manifest import write_json
from unifork.training.loop import WorkerContext
from unifork.training.stage import StageJob, train_stage

KEY = "unifork-s2-pretrain"


@pytest.fixture
def experiment(root, monkeypatch):
    monkeypatch.chdir(root)
    return load(Experiment, root / "params.yaml")


def steps(number, offset=0.0):
    return [{"text_loss": 3.0 - step / 100 + offset, "image_loss": None} for step in range(number)]


def changed(experiment, *path, value):
    """The experiment with another value at a path."""
    plain = experiment.model_dump(mode="json")
    place = plain
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return Experiment.model_validate_json(json.dumps(plain))


def test_a_configuration_is_everything_but_seeds(experiment):
    mark = configuration(experiment, Layout(), KEY)
    same = [
        ("training_seed",), ("variants", "unifork", "seed"), ("image_tokenizer", "seed"),
        ("stages", "s2-pretrain", "checkpoint_every"), ("stages", "s3", "context"),
        ("datasets", "shapes", "shard_rows"),
    ]  # fmt: skip
    other = {
        ("stages", "s2-pretrain", "context"): 400, ("stages", "s1-captions", "context"): 400,
        ("variants", "unifork", "plan"): "shared*2", ("datasets", "shapes", "rows"): 95,
        ("image_tokenizer", "depth"): 3, ("text_tokenizer", "vocab_size"): 401,
    }  # fmt: skip
    for path in same:
        assert configuration(changed(experiment, *path, value=77), Layout(), KEY) == mark, path
    for path, value in other.items():
        assert configuration(changed(experiment, *path, value=value), Layout(), KEY) != mark, path
    assert configuration(experiment, Layout(), "unifork-s3") != mark


def test_an_imported_tokenizer_counts_by_its_files(experiment, root):
    def imported(folder):
        return changed(experiment, "image_tokenizer", value={"import": folder, "image_size": 48})

    mark = configuration(imported("here"), Layout(), KEY)
    assert configuration(imported("there"), Layout(), KEY) == mark
    path = root / "tokenizers/image/config.json"
    text = path.read_text()
    path.unlink()  # it may be a link to another root's
    path.write_text(text + "\n")
    assert configuration(imported("here"), Layout(), KEY) != mark


def test_a_loss_is_the_mean_of_the_last_tenth():
    rows = [{"text_loss": float(step), "image_loss": 1.0 if step % 2 else None} for step in range(100)]
    assert losses_at(rows, 100) == {"text_loss": np.mean(range(90, 100)), "image_loss": 1.0}
    assert losses_at(rows, 1) == {"text_loss": 0.0}


def test_a_run_lies_among_references(experiment):
    def there(*offsets, number=30):
        return [reference.reference(experiment, Layout(), KEY, steps(number, offset)) for offset in offsets]

    def sentences(found, offset=0.0, number=25):
        return among(found, experiment, Layout(), KEY, steps(number, offset))

    assert sentences([]) == []
    assert sentences(there(0.1)) == ["text loss 2.815 at step 20; 1 reference run 2.915"]
    assert sentences(there(0.1, -0.1)) == ["text loss 2.815 at step 20; 2 reference runs 2.715 to 2.915: within"]
    assert sentences(there(0.1, 0.2))[0].endswith("2.915 to 3.015: below")
    values = np.array([2.815 + offset for offset in (0.1, 0.2, 0.3)])
    width = 4.302653 * values.std(ddof=1) * math.sqrt(1 + 1 / 3)
    low, high = values.mean() - width, values.mean() + width
    text = f"3 reference runs, 95 % of such runs {low:.3f} to {high:.3f}"
    assert sentences(there(0.1, 0.2, 0.3)) == [f"text loss 2.815 at step 20; {text}: within"]
    assert sentences(there(0.1, 0.2, 0.3), 1.0)[0].endswith(f"{text}: above")
    assert sentences(there(0.0)) == []  # it is the run itself
    assert sentences(there(0.1, number=4)) == ["text loss 2.970 at step 4; 1 reference run 3.070"]
    other = changed(experiment, "stages", "s2-pretrain", "context", value=400)
    assert among(there(0.1), other, Layout(), KEY, steps(25)) == []
    assert among(there(0.1), experiment, Layout(), "another", steps(25)) == []


def test_status_report_and_record_of_a_real_run(experiment, root):
    stage = experiment.stages["s2-pretrain"]
    tracks = {"joint": stage.tracks["joint"].model_copy(update={"steps": 8, "batch_documents": 8})}
    runs = {KEY: experiment.runs[KEY].model_copy(update={"after": "models/unifork-init"})}
    stages = experiment.stages | {"s2-pretrain": stage.model_copy(update={"tracks": tracks, "sample_prompts": ()})}
    variants = {"unifork": experiment.variants["unifork"].model_copy(update={"stages": ("s2-pretrain",)})}
    plan = experiment.model_copy(update={"runs": runs, "stages": stages, "variants": variants})
    (root / "params.yaml").unlink()
    (root / "params.yaml").write_text(json.dumps(plan.model_dump(mode="json")))

    def ran(*words):
        done = CliRunner().invoke(app, words)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.output

    with pytest.raises(DataError, match=rf"models/{KEY}: no history; the run has not finished"):
        ran("record", KEY)
    with pytest.raises(ConfigError, match="unifork-s4"):
        ran("record", "unifork-s4")
    train_stage(StageJob(key=KEY, experiment=plan, resources=RESOURCES, root=str(root)), WorkerContext())
    assert "reference" not in ran("status")
    assert "8 steps" in ran("record", KEY)
    (own,) = references(Layout())
    assert [*own.losses] == [str(step) for step in range(1, 9)]
    assert own.file in {path.name for path in (root / "histories").iterdir()}
    assert "reference" not in ran("status")  # a run is no reference of itself
    other = {step: {name: value + 1 for name, value in losses.items()} for step, losses in own.losses.items()}
    theirs = own.model_copy(update={"losses": other})
    write_json(root / "models/theirs/histories" / theirs.file, theirs.model_dump(mode="json"))
    value = own.losses["8"]["text_loss"]
    sentence = f"text loss {value:.3f} at step 8; 1 reference run {value + 1:.3f}"
    assert f"{KEY}: {sentence}\n" in ran("status")
    (row,) = [row for row in json.loads(ran("status", "--json")) if row["name"] == KEY]
    assert row["reference"][0] == sentence
    found = stages_of(plan, Layout(), lambda _: None)
    assert [stage.references[0] for stage in found if stage.references] == [sentence]
    (root / "histories/broken.json").write_text('{"run": 1}')
    with pytest.raises(ConfigError, match=r"broken\.json: configuration: Field required"):
        ran("status")


def test_a_file_is_named_by_run_and_losses():
    own = Reference(configuration="x", run="a-s1", seed=0, losses={"1": {"text_loss": 1.0}})
    assert own.file == own.model_copy(update={"configuration": "y"}).file
    assert own.file != own.model_copy(update={"losses": {}}).file

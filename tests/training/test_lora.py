"""Adapters: what they change and what they leave alone, that kills and workers change nothing, what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from distributed_testing import run_distributed
from safetensors.torch import load_file
from stage_runs import RESOURCES, assert_equal, job, killed, weights, worker
from test_extended import jobs
from tiny import copy_of
from torch.distributed.checkpoint.filesystem import FileSystemReader

from unifork import errors, planning
from unifork.config import Lora, Stage, load_card, parse
from unifork.errors import ConfigError
from unifork.experiments import use
from unifork.models.modeling import load_model
from unifork.training import checkpoint
from unifork.training.flops import flops_per_token
from unifork.training.history import Log, read
from unifork.training.loop import WorkerContext
from unifork.training.optimizer import add_adapters
from unifork.training.stage import Training, train_stage

ROOT = Path(__file__).parents[2]
LORA = Lora(rank=4, alpha=6, modules=("layers.*_proj",))
TRAINABLE = {
    "generation": ("layers.*.generation.*.lora_*", "image_head.*"),
    "understanding": ("layers.*.understanding.*.lora_*",),
}


def with_lora(stage_job, tracks=("generation", "understanding"), precision="float32"):
    """Adapters in all layers, of which each track trains those of its branch."""
    stages = {}
    for stage_name, stage in stage_job.experiment.stages.items():
        chosen = {
            name: stage.tracks[name].model_copy(update={"trainable": TRAINABLE[name], "precision": precision})
            for name in tracks
        }
        stages[stage_name] = stage.model_copy(update={"lora": LORA, "tracks": chosen})
    return stage_job.model_copy(update={"experiment": stage_job.experiment.model_copy(update={"stages": stages})})


def adapted(root, resources=RESOURCES, **choice):
    """Stage III with adapters."""
    return with_lora(job(root, "unifork-s3", resources), **choice)


def stored(stage_job):
    """The tensors of a run's last checkpoint, adapters beside the maps, and all names in it."""
    path, _ = checkpoint.latest(stage_job.run_folder)
    model = load_model(stage_job.start)
    add_adapters(model, LORA, seed=1)
    tensors = checkpoint.all_tensors(model)
    checkpoint._read(path, "model", tensors)
    names = FileSystemReader(path).read_metadata().state_dict_metadata
    return {name: tensor.detach() for name, tensor in tensors.items()}, names


def moved(stage_job):
    before, after = load_model(stage_job.start).state_dict(), weights(stage_job)
    return {name for name in after if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def whole(tiny_root, tmp_path_factory):
    """Both tracks without interruption: the job."""
    stage_job = adapted(copy_of(tiny_root, tmp_path_factory.mktemp("whole") / "root"))
    train_stage(stage_job, WorkerContext())
    return stage_job


@pytest.mark.slow
def test_the_first_loss_is_that_of_the_model_without(whole, unbroken):
    first, others = read(whole.run_folder)[0], unbroken["unifork-s3"][1][0]
    assert first["documents_hash"] == others["documents_hash"]
    assert [first[name] for name in first if "loss" in name] == [others[name] for name in others if "loss" in name]


@pytest.mark.slow
def test_the_model_is_the_start_plus_the_products_under_its_own_names(whole):
    start, after, (tensors, _) = load_model(whole.start).state_dict(), weights(whole), stored(whole)
    assert after.keys() == load_file(whole.start / "model.safetensors").keys()
    products = 0
    for name, tensor in after.items():
        module = name.removesuffix(".weight")
        if (a := tensors.get(f"{module}.lora_A.default.weight")) is None:
            assert torch.equal(tensor, tensors.get(name, tensors.get(name.replace("_proj.", "_proj.base_layer."))))
            continue
        base, b = tensors[f"{module}.base_layer.weight"], tensors[f"{module}.lora_B.default.weight"]
        assert torch.equal(base, start[name])
        assert a.shape[0] == b.shape[1] == 4
        assert torch.equal(tensor, base + (b @ a) * 1.5)
        products += int(b.any())
    assert products == 2 * 7  # attention and MLP of both branches of the forked layer


@pytest.mark.slow
def test_only_adapters_and_named_parts_are_trained(whole):
    head = {name for name in weights(whole) if name.startswith("image_head.")}
    forked = {name for name in weights(whole) if name.startswith("layers.1.") and name.endswith("_proj.weight")}
    assert moved(whole) == head | forked
    names = stored(whole)[1]
    for track in TRAINABLE:
        trained = {name.split("/")[2] for name in names if name.startswith(f"optimizer/{track}/")}
        pairs = {name for name in trained if ".lora_A.default.weight" in name or ".lora_B.default.weight" in name}
        assert all(f".{track}." in name for name in pairs)
        assert len(pairs) == 2 * 7
        assert trained - pairs == (head if track == "generation" else set())


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_track_alone_trains_the_adapters_of_its_branch(root, precision):
    stage_job = adapted(root, tracks=("generation",), precision=precision)
    train_stage(stage_job, WorkerContext())
    maps = {name for name in moved(stage_job) if not name.startswith("image_head.")}
    assert len(maps) == 7
    assert all(".generation." in name for name in maps)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["after the update", "between latest and the metrics"])
def test_killed_twice_the_model_is_the_same(root, whole, where):
    stage_job = adapted(root)
    for _ in range(2):
        killed(stage_job, where, 2)
    train_stage(stage_job, WorkerContext())
    assert_equal(weights(stage_job), weights(whole))
    assert read(stage_job.run_folder) == read(whole.run_folder)
    assert_equal(stored(stage_job)[0], stored(whole)[0])


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "all"])
def test_two_workers_train_as_one(root, whole, shard):
    stage_job = adapted(root, resources=RESOURCES.model_copy(update={"workers": 2, "shard": shard}))
    run_distributed(worker, 2, stage_job.model_dump(mode="json"))
    for name, tensor in weights(stage_job).items():
        assert torch.allclose(tensor, weights(whole)[name], atol=2e-4), name
    assert moved(stage_job) == moved(whole)


@pytest.mark.slow
def test_an_extended_stage_goes_on_with_its_adapters(tiny_root, tmp_path):
    ends = []
    for lengths in ((8,), (5, 3)):
        every = jobs(copy_of(tiny_root, tmp_path / str(len(lengths))), "unifork-s3", *lengths, ema=None)
        ends.append([with_lora(stage_job) for stage_job in every])
        for stage_job in ends[-1]:
            train_stage(stage_job, WorkerContext())
    (longer,), (first, end) = ends
    assert_equal(weights(end), weights(longer))
    assert moved(first) == moved(longer)


@pytest.mark.slow
def test_flops_are_of_the_model_with_adapters(root):
    stage_job = adapted(root)
    training = Training(stage_job, WorkerContext(), Log(stage_job.run_folder, stage_job.key))
    model, track = training.model, training.tracks["generation"]
    ours = flops_per_token(model, track.loader, track.parameters, LORA)
    frozen, every = (
        flops_per_token(model, track.loader, names, LORA) for names in ((), dict(model.named_parameters()))
    )
    plain = flops_per_token(model, track.loader, (), None)
    assert plain < frozen < ours < every


# ------------------------------------------------------------------------------------- unifork use and plan


def used(monkeypatch, folder, modules=LORA.modules, trainable=TRAINABLE, **stage):
    """`micro` with adapters in stage III."""
    for name in ("experiments", "datasets", "clusters"):
        shutil.copytree(ROOT / name, folder / name)
    tracks = {name: {"trainable": [*patterns]} for name, patterns in trainable.items()}
    s3 = {"lora": {"rank": 4, "modules": [*modules]}, "tracks": tracks, **stage}
    (folder / "experiments/adapted.yaml").write_text(yaml.safe_dump({"extends": "micro", "stages": {"s3": s3}}))
    monkeypatch.chdir(folder)
    return use("adapted")


def test_a_plan_counts_adapters(tmp_path, monkeypatch):
    experiment = used(monkeypatch, tmp_path)
    model = planning.meta_model(experiment, experiment.variants["unifork"])
    cards = {name: load_card(name, ROOT / "datasets") for name in experiment.datasets}
    *_, generation, understanding = planning.track_plans(experiment, cards, "unifork", model, planning.Assumptions())
    inputs_and_outputs = sum(sum(p.shape) for name, p in model.named_parameters() if ".generation.q_proj.w" in name)
    each = [name for name, p in model.named_parameters() if name.startswith("layers.1.") and "generation" in name]
    count = sum(4 * sum(model.get_parameter(name).shape) for name in each if name.endswith("_proj.weight"))
    assert count > 4 * inputs_and_outputs > 0
    assert understanding.trained == count
    head = sum(p.numel() for name, p in model.named_parameters() if name.startswith("image_head."))
    assert generation.trained == count + head
    assert generation.adapters == understanding.adapters == 3 * count  # the shared layer's are there, too
    without = planning.checkpoint_bytes(model, [planning.TrackPlan("s3", "generation", 1, 0, [])])
    assert planning.checkpoint_bytes(model, [generation]) == without + 4 * 3 * count + 8 * (count + head)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modules": ["layers.*.k_prj"]},
            r"stages\.s3\.lora\.modules \(variant unifork\): .*k_prj.*k_proj",
        ),
        ({"modules": ["norm.*"]}, r"'norm\.\*' matches none of the 31 linear maps that can have adapters; nearest"),
        ({"modules": ["lm_head"]}, r"'lm_head' matches none of the 31 linear maps"),
        ({"trainable": {"generation": ["layers.*.base_layer.*"]}}, r"tracks\.generation\.trainable.*base_layer"),
        ({"ema": {"decay": 0.5}}, r"stages\.s3: .*lora and ema exclude each other"),
        ({"lora": {"ranks": 4}}, r"stages\.s3\.lora.*'ranks'"),
    ],
)
def test_what_cannot_work_is_refused_by_use(tmp_path, monkeypatch, changes, message):
    with pytest.raises(ConfigError, match=message):
        used(monkeypatch, tmp_path, **changes)


def test_missing_peft_is_a_line_that_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"stages\.s3\.lora: needs peft.*pip install 'unifork\[lora\]'"):
        used(monkeypatch, tmp_path)


def test_deepspeed_is_refused_before_anything_is_read(root):
    stage_job = adapted(root, resources=RESOURCES.model_copy(update={"workers": 2, "shard": "deepspeed-2"}))
    with pytest.raises(ConfigError, match=r"cluster file: shard: deepspeed-2: not with lora; use none, node or all"):
        train_stage(stage_job, WorkerContext(workers=2))


def test_a_stage_without_is_written_as_before():
    plain = {"tracks": {}, "context": 8, "checkpoint_every": 1}
    assert "lora" not in parse(Stage, plain, "x").model_dump(mode="json")
    with_it = parse(Stage, {**plain, "lora": {"modules": ["*"]}}, "x")
    assert with_it.model_dump(mode="json")["lora"] == {"rank": 8, "alpha": 16, "modules": ["*"]}

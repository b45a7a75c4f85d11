"""A comparison is fair: variants with one training seed start from the same weights and read the same documents."""

import pytest
import torch
from safetensors.torch import load_file
from stage_runs import job, weights
from tiny import write_experiment

from unifork.image_tokenizer.model import ImageTokenizer
from unifork.models.layer_plan import without_branch
from unifork.models.warm_start import create_model
from unifork.training.history import read
from unifork.training.loop import WorkerContext
from unifork.training.stage import train_stage

VARIANTS = ("unifork", "shared", "mot")
LIKE = {name: {"like": "unifork", "plan": name} for name in VARIANTS[1:]}
TRACKS = {name: {"without_branches": ["layers.*"]} for name in ("generation", "understanding")}


@pytest.fixture
def comparison(root):
    """The tiny root with three variants and two seeds, and the fresh models of them all."""
    for name in ("params.yaml", "experiments/tiny.yaml"):
        (root / name).unlink()  # a link to another root's
    experiment = write_experiment(root, {"variants": LIKE, "stages": {"s3": {"tracks": TRACKS}}, "seeds": [0, 1]})
    images = ImageTokenizer.load(root / "tokenizers/image")
    shape, first = images.architecture, root / "models/unifork-init"
    for name, variant in experiment.variants.items():
        size = experiment.text_tokenizer.vocab_size
        model = create_model(variant, images.quantizer.codebook, shape.depth, shape.grid, images.encoder_id, size)
        folder = root / f"models/{name}-init"
        model.save_pretrained(folder)
        for part in ("image_tokenizer", "text_tokenizer"):
            (folder / part).symlink_to(first / part)
    return root


def trained(root, name, stage, seed=0):
    """The history and the weights of a short stage of a variant that begins with its fresh model."""
    stage_job = job(root, f"{name}-seed{seed}-{stage}", steps=3)
    train_stage(stage_job, WorkerContext())
    return read(stage_job.run_folder), weights(stage_job)


def dense(root, name, seed=0):
    """The fresh weights of a variant by name without the branch; copies of a part are equal."""
    found = {}
    for key, tensor in load_file(root / f"models/{name}-seed{seed}-init/model.safetensors").items():
        assert torch.equal(found.setdefault(without_branch(key), tensor), tensor), key
    return found


@pytest.mark.slow
def test_variants_of_a_seed_have_the_same_weights_and_documents(comparison):
    fresh = {name: dense(comparison, name) for name in VARIANTS}
    for name in VARIANTS[1:]:
        assert fresh[name].keys() == fresh["unifork"].keys()
        assert all(torch.equal(tensor, fresh["unifork"][key]) for key, tensor in fresh[name].items())
    keys = ("track", "step", "tokens", "documents_hash")
    for stage in ("s2-pretrain", "s3"):
        seen = {name: trained(comparison, name, stage)[0] for name in VARIANTS}
        orders = {name: [[row[key] for key in keys] for row in rows] for name, rows in seen.items()}
        assert orders["shared"] == orders["unifork"] == orders["mot"]
        assert len({row["documents_hash"] for row in seen["unifork"]}) == len(seen["unifork"])
        first = [rows[0]["loss"] for rows in seen.values()]  # one function, however its weights are split
        assert first == pytest.approx([first[0]] * len(first), rel=1e-5)


def test_another_seed_has_other_weights_and_another_order(comparison):
    ours, theirs = (dense(comparison, "shared", seed) for seed in (0, 1))
    assert not torch.equal(ours["embed_tokens.weight"], theirs["embed_tokens.weight"])
    (rows, _), (others, _) = (trained(comparison, "shared", "s2-pretrain", seed) for seed in (0, 1))
    assert [row["documents_hash"] for row in rows] != [row["documents_hash"] for row in others]


def test_variants_without_branches_train_what_their_stage_says(comparison):
    before = dense(comparison, "shared")
    _, after = trained(comparison, "shared", "s3")
    changed = {key for key, tensor in after.items() if not torch.equal(tensor, before[without_branch(key)])}
    assert changed
    assert all(key.startswith("layers.") for key in changed)

"""`unifork model`: official checkpoints in and out, warm starts, and what a model consists of."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unifork.commands.tokenizer import AllowPickle, ImageSize, VisionTower
from unifork.errors import ConfigError, one_of
from unifork.layout import MODEL_IMAGE_TOKENIZER, MODEL_TEXT_TOKENIZER, Layout

app = typer.Typer(no_args_is_help=True, help=__doc__)

Out = Annotated[Path, typer.Option(help="directory to write; it must not exist")]
Head = Annotated[str, typer.Option(help="form of the image head: folded or unfolded, the same function")]
HEADS = {"folded": True, "unfolded": False}
OFFICIAL = "official"
TEXT_FILES = ("tokenizer.json", "vocab.json")
"""A folder with one of these holds a text tokenizer."""


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="official UniFork checkpoint: a folder, or OWNER/NAME on the Hub")],
    out: Out,
    head: Head = "unfolded",
    image_size: ImageSize = None,
    vision_tower: VisionTower = None,
    text_tokenizer: Annotated[Path | None, typer.Option(help="if not in it or in `tokenizer` beside it")] = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write an official checkpoint as a model directory, with the image tokenizer that is in it."""
    from safetensors.torch import save_file

    from unifork.assembly import new_folder
    from unifork.documents.text_tokenizer import TextTokenizer, import_text_tokenizer
    from unifork.image_tokenizer.conversion import (
        REMAINDER_FILE,
        SIGLIP_FOLDER,
        read_official,
        remainder,
        siglip_of,
        tower_of,
    )
    from unifork.models import conversion
    from unifork.weights import PICKLED, StoredWeights, local_folder, read_json

    folded = _form(head)
    folder = local_folder(source, files=("*.json", "*.txt", "*.safetensors", *(f"*{end}" for end in PICKLED)))
    plain = read_json(folder / "config.json")
    images = read_official(folder, image_size, vision_tower, allow_pickle)
    tower, prefix = tower_of(folder, vision_tower)
    tower_plain = read_json(tower / "config.json")
    siglip = read_json(siglip_of(tower, tower_plain["rqvaesiglip"]["pretrained_model"]))
    codebook, grid = images.quantizer.codebook, images.architecture.grid
    config = conversion.official_config(plain, tower_plain, codebook, grid, images.encoder_id, str(folder))
    usual = (folder, folder / "tokenizer", folder.parent / "tokenizer")
    text = text_tokenizer or next((path for path in usual if any((path / file).is_file() for file in TEXT_FILES)), None)
    if text:
        config.special_tokens = TextTokenizer(text).special_tokens
    weights = StoredWeights(folder, allow_pickle)
    model = conversion.from_official(weights, config, codebook)
    read = weights.read([name for name in weights.file_of if name.startswith(conversion.TOKENIZER)])
    kept = remainder({n.removeprefix(prefix): t for n, t in read.items()}, images, model.dtype)
    others = conversion.other_dtypes(weights, model)
    conversion.set_head_form(model, folded)
    with new_folder(out) as partial:
        model.save_pretrained(partial)
        images.save(partial / MODEL_IMAGE_TOKENIZER)
        beside = partial / MODEL_IMAGE_TOKENIZER / REMAINDER_FILE
        save_file(kept, beside, metadata={SIGLIP_FOLDER: json.dumps(siglip), conversion.DTYPES: json.dumps(others)})
        if text:
            import_text_tokenizer(text, partial / MODEL_TEXT_TOKENIZER)
    print(f"{out}: {config.plan}, {head} head, {grid} x {grid} positions, text tokenizer from {text or 'nowhere'}")
    print(f"codebook_id {config.codebook_id}, encoder_id {config.encoder_id}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="model directory")],
    out: Out,
    format: Annotated[str, typer.Option(help="official, or the dense family of the backbone: qwen2 or llama")],
    branch: Annotated[str, typer.Option(help="branch of a dense model: understanding, generation, text, image")] = "",
) -> None:
    """Write a model as an official checkpoint, or one branch of it as the dense language model it is."""
    import torch

    from unifork.assembly import new_folder
    from unifork.documents.text_tokenizer import import_text_tokenizer
    from unifork.models.configuration import read_config
    from unifork.models.conversion import dense_branch
    from unifork.models.decoder import FAMILIES
    from unifork.models.modeling import load_model

    one_of("format", format, (OFFICIAL, *FAMILIES), "--format")
    if (format == OFFICIAL) == bool(branch):
        raise ConfigError(f"--branch {branch!r}: a dense model is one branch, an official checkpoint is all of them")
    config = read_config(model)
    family = config.backbone["model_type"]
    if format not in (OFFICIAL, family):
        raise ConfigError(f"--format {format}: the backbone of {model} is {family}; allowed: {OFFICIAL}, {family}")
    loaded = load_model(model, getattr(torch, str(config.dtype).removeprefix("torch.")))
    with new_folder(out) as partial:
        if format == OFFICIAL:
            _write_official(loaded, model / MODEL_IMAGE_TOKENIZER, partial)
        else:
            dense_branch(loaded, branch).save_pretrained(partial)
        if (text := model / MODEL_TEXT_TOKENIZER).is_dir():
            import_text_tokenizer(text, partial)
    print(f"{out}: {format} {branch}".rstrip())


def _write_official(loaded, images: Path, out: Path) -> None:  # type: ignore[no-untyped-def]
    from safetensors import safe_open
    from safetensors.torch import save_file

    from unifork.image_tokenizer.conversion import REMAINDER_FILE, SIGLIP_FOLDER, tower_configs, tower_tensors
    from unifork.image_tokenizer.model import ImageTokenizer
    from unifork.models import conversion
    from unifork.shards.manifest import write_json
    from unifork.weights import TOWER

    conversion.set_head_form(loaded, folded=False)
    tokenizer = ImageTokenizer.load(images)
    tower, files = tower_tensors(tokenizer, loaded.dtype), tower_configs(tokenizer, loaded.config)
    state = conversion.to_official(loaded)
    if (path := images / REMAINDER_FILE).exists():
        with safe_open(path, "pt") as kept:
            state = conversion.with_dtypes(state, json.loads(kept.metadata().get(conversion.DTYPES, "{}")))
            tower |= {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            files[f"{SIGLIP_FOLDER}/config.json"] = json.loads(kept.metadata()[SIGLIP_FOLDER])
    state |= {TOWER + name: tensor for name, tensor in tower.items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    plain = conversion.official_plain(loaded)
    write_json(out / "config.json", plain)
    for name, configuration in files.items():
        write_json(out / plain["mm_vision_tower"] / name, configuration)


@app.command()
def create(
    plan: Annotated[str, typer.Option(help="layer plan, for example 'shared*12 task*12 norm:task'")],
    backbone: Annotated[str, typer.Option(help="dense Qwen2 or Llama that every branch copies: folder, or OWNER/NAME")],
    image_tokenizer: Annotated[Path, typer.Option(help="image tokenizer directory")],
    text_tokenizer: Annotated[Path, typer.Option(help="text tokenizer directory")],
    out: Out,
    head: Head = "folded",
    head_layers: Annotated[int, typer.Option(help="blocks of the image head")] = 6,
    head_heads: Annotated[int, typer.Option(help="attention heads of the image head")] = 32,
    head_dim: Annotated[int, typer.Option(help="width of one of them")] = 112,
    seed: Annotated[int, typer.Option(help="seed of what a dense model does not have")] = 0,
) -> None:
    """Write a new model of any plan that starts from a dense language model."""
    from unifork import assembly
    from unifork.config import HeadConfig, Variant

    form = HeadConfig(layers=head_layers, heads=head_heads, head_dim=head_dim, folded=_form(head))
    variant = Variant(plan=plan, backbone={}, warm_start=backbone, head=form, stages=(), seed=seed)
    model = assembly.create(variant, image_tokenizer, text_tokenizer, out)
    print(f"{out}: {plan}, {model.num_parameters() / 1e6:.2f} M parameters")


@app.command()
def checkpoint(
    run: Annotated[str, typer.Argument(help="run of the experiment, for example unifork-s2-pretrain")],
    out: Out,
    step: Annotated[int | None, typer.Option(help="of all tracks together; by default the newest")] = None,
) -> None:
    """Write a checkpoint of a run as a model directory, for all that takes one; the run may still go on.

    `keep_checkpoints` of a stage says how many there are.
    """
    from unifork.assembly import new_folder
    from unifork.config import TrainResources, load_experiment
    from unifork.training.checkpoint import read_state, step_folders
    from unifork.training.export import write_model
    from unifork.training.loop import turns
    from unifork.training.recovery import check_whole
    from unifork.training.stage import StageJob

    experiment, root = load_experiment(), Layout().root.absolute()
    one_of("run", run, experiment.runs, "params.yaml: runs")
    job = StageJob(key=run, experiment=experiment, resources=TrainResources(), root=str(root))
    there = {path.name: path for path in step_folders(job.run_folder)}
    newest = next(reversed(there), "step-0")
    path = there[one_of("checkpoint", newest if step is None else f"step-{step}", there, str(job.run_folder))]
    check_whole(path, read_state(path), [track for track, _ in turns(job.stage)])
    with new_folder(out) as partial:
        write_model(job, path, partial)
    print(f"{out}: {run} after {path.name.removeprefix('step-')} steps")


@app.command()
def summary(model: Annotated[Path, typer.Argument(help="model directory")]) -> None:
    """Print the parts of a model and their parameters, those that each task uses, and the paper's sums."""
    from unifork.models.configuration import read_config
    from unifork.planning import parameter_counts

    config = read_config(model)
    form = next(name for name, folded in HEADS.items() if folded == config.head_config().folded)
    print(f"{config.plan}, {config.backbone['model_type']}, {form} head\n")
    for name, count in parameter_counts(config).items():
        print(f"{name:<36}{count:>16,}")


def _form(head: str) -> bool:
    return HEADS[one_of("form", head, HEADS, "--head")]

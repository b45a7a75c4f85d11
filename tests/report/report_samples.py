"""A small finished experiment on disk, made by hand: no training, no tokenizer, images of the world `shapes`."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from PIL import Image

from unifork.config import Experiment, load_card, parse
from unifork.layout import Layout
from unifork.shapes.world import draw, scene
from unifork.shards.job import write_shard
from unifork.shards.manifest import Manifest, write_json, write_manifest
from unifork.shards.schema import image_text_schema
from unifork.shards.task import ShardTask, quarantined

REPOSITORY = Path(__file__).parents[2]
NASTY = "<script>alert('a')</script> & <b>"
DEPTH = 2

CARD = {
    "name": "world",
    "title": "A small world",
    "homepage": "https://example.org/world",
    "license": "CC-BY-4.0",
    "attribution": f"made by {NASTY}",
    "redistribute_codes": False,
    "source": {"kind": "unifork.shapes.source:SOURCE"},
    "reader": "unifork.shapes.detector:READER",
    "tasks": {
        "generation": {"view": "crop", "texts": ["caption"]},
        "understanding": {"view": "pad", "texts": ["description"]},
    },
}


def entry(task):
    return {"dataset": "world", "task": task, "text": "caption", "template": "generate", "weight": 1.0}


def track(task):
    optimizer = {"learning_rate": 0.001, "schedule": "constant", "warmup_steps": 0}
    return {
        "mixture": [entry("generation" if task == "joint" else task)],
        "steps": 3,
        "batch_documents": 4,
        "trainable": ["*"],
        "optimizer": optimizer,
    }


def stage(*tracks, prompts=()):
    return {
        "tracks": {name: track(name) for name in tracks},
        "context": 64,
        "checkpoint_every": 3,
        "sample_prompts": list(prompts),
    }


def experiment(variants=("fork",)) -> Experiment:
    decoder = {
        "z_channels": 4,
        "channels": 4,
        "multipliers": [1],
        "blocks": 0,
        "attention_levels": [],
        "norm_groups": 1,
    }
    training = {"datasets": ["world"], "steps": 2, "quantize_from_step": 1, "batch_images": 2, "learning_rate": 0.1}
    training |= {"warmup_steps": 0, "commitment": 0.1, "ema_decay": 0.9, "held_out_images": 2}
    head = {"layers": 1, "heads": 1, "head_dim": 4}
    return parse(
        Experiment,
        {
            "name": "tiny",
            "datasets": {"world": {"rows": 4, "shard_rows": 4}},
            "image_tokenizer": {
                "image_size": 48,
                "patch_size": 8,
                "encoder": {"hidden_size": 4, "layers": 2, "heads": 1, "intermediate_size": 4},
                "depth": DEPTH,
                "codebook_size": 16,
                "decoder": decoder,
                "training": training,
                "seed": 0,
            },
            "text_tokenizer": {"vocab_size": 300, "datasets": ["world"]},
            "variants": {
                name: {"plan": "shared*1 task*1 norm:task", "backbone": {}, "head": head, "stages": ["s1", "s3"]}
                for name in variants
            },
            "stages": {
                "s1": stage("joint", prompts=["a red circle", NASTY]),
                "s3": stage("generation", "understanding", prompts=["a red circle"]),
            },
            "benchmarks": {f"shapes-{kind}": {"options": {"samples": 2}} for kind in ("generation", "understanding")},
            "runs": {
                f"{name}-{stage_id}": {"variant": name, "stage": stage_id, "after": "models/x", "codes": "data/codes"}
                | {"prepared": "data/prepared"}
                for name in variants
                for stage_id in ("s1", "s3")
            },
            "evaluations": {
                f"{name}-{kind}": {"variant": name, "benchmark": kind, "model": f"models/{name}-s3"}
                for name in variants
                for kind in ("shapes-generation", "shapes-understanding")
            },
        },
        "test",
    )


def layout(root: Path) -> Layout:
    (root / "datasets").mkdir(parents=True, exist_ok=True)
    (root / "datasets" / "world.yaml").write_text(yaml.safe_dump(CARD))
    shutil.copytree(REPOSITORY / "datasets" / "evals", root / "datasets" / "evals", dirs_exist_ok=True)
    return Layout(root)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_data(where: Layout) -> None:
    """Four images, after three were dropped, two of them unreadable; codes of the crop view only."""
    rejected = [
        {"key": "bad-1", "reason": "undecodable", "detail": "broken"},
        {"key": "bad-2", "reason": "empty", "detail": "no bytes"},
        {"key": "thin", "reason": "min_side", "detail": NASTY},
    ]
    schema = image_text_schema(load_card("world", where.cards))
    columns = {name: [None] * 7 for name in schema.names} | {
        "key": [*(row["key"] for row in rejected), *(f"row-{number}" for number in range(4))],
        "image": [
            b"\x89PNG no",
            None,
            png(Image.new("RGB", (90, 9), "red")),
            *(png(draw(scene(0, number, "train"))) for number in range(4)),
        ],
        "caption": [None] * 3 + ["one", "two", None, NASTY],
        "description": [None] * 3 + ["first", "second", "third", None],
    }
    table = pa.table(columns, schema=schema)
    kept = table.slice(3).drop_columns(["image"])
    dropped = {"undecodable": 1, "empty": 1, "min_side": 1}
    codes = where.codes / "world" / "crop"
    tables = {where.raw("world"): (table, {}), where.filtered("world"): (kept, dropped), codes: (kept, {})}
    for place, (rows, drops) in tables.items():
        task = ShardTask().placed(None, place / "part-00000.parquet", None, "made")
        shard = write_shard(task, rows, drops).shard
        lineage = {"encoder_id": "abc", "encoding": {"view": "crop", "dtype": "float32"}} if place == codes else {}
        write_manifest(place, Manifest(kind="any", dataset="world", columns={}, shards=(shard,), lineage=lineage))
    quarantined(ShardTask().placed(None, where.filtered("world") / "part-00000.parquet", None, "made"), rejected)


def write_tokenizer(where: Layout) -> None:
    depth = {"codebook_usage": 12, "perplexity": 7.25}
    use = {"codebook_usage": 13, "bits_per_position": 4.5, "depths": [depth] * DEPTH}
    read = {f"world/{view}": {"same": 4, "total": 4} for view in ("crop", "pad")}
    group = {"mean_absolute_levels": 3.5, "psnr_db": 27.25, "codes": use}
    write_json(
        where.image_tokenizer / "report.json", {**group, "images": 8, "groups": {"world/crop": group}, "detector": read}
    )
    write_json(where.image_tokenizer / "config.json", {})


def write_stage(where: Layout, key: str, plan: Experiment) -> None:
    this = plan.stages[plan.runs[key].stage]
    folder = where.model(key) / "training"
    shapes = {
        "embed_tokens.weight": (10, 2),
        "layers.0.mlp.shared.up_proj.weight": (5, 2),
        "layers.1.mlp.generation.up_proj.weight": (3, 2),
        "layers.1.mlp.understanding.up_proj.weight": (3, 2),
        "norm.generation.weight": (2,),
        "image_head.blocks.0.fc1.weight": (4, 4),
        "codebook": (16, 2),
    }
    tensors = {
        name: {"shape": shape, "dtype": "torch.float32", "trained": ".generation." in name}
        for name, shape in shapes.items()
    }
    documents = {name: [{"dataset": "world", "template": "generate", "usable": 3, "seen": 12}] for name in this.tracks}
    summary = {
        "run": key,
        "history": "x",
        "stage": this.model_dump(mode="json"),
        "documents": documents,
        "tensors": tensors,
    }
    write_json(folder / "summary.json", {**summary, "tensors": tensors, "quarantined": {"world: too long": 7}})
    lines = [
        "track,step,loss,text_loss,image_loss,image_loss_depth_0,image_loss_depth_1,learning_rate,gradient_norm,tokens,fill,documents_hash"
    ]
    for name in this.tracks:
        image = "2.0,2.1,1.9" if name != "understanding" else ",,"
        text = "3.0" if name != "generation" else ""
        lines += [f"{name},{step},5.0,{text},{image},0.001,{1 + step},640,0.9,1e0f78bca484d44c" for step in range(3)]
    (folder / "history.csv").write_text("\n".join(lines) + "\n")
    codes = np.arange(len(this.sample_prompts) * 4 * DEPTH).reshape(-1, 4, DEPTH) % 16
    np.savez(folder / "samples.npz", codes=codes)
    if "joint" in this.tracks:  # the only stage that holds rows out
        numbers = {"part": "world-caption-caption", "dataset": "world", "task": "understanding", "answers": 2}
        numbers |= {"exact_match": 0.5, "token_f1": 0.625}
        errors = {"exact_match_standard_error": 0.35, "token_f1_standard_error": 0.125}
        answers = [
            {"part": "world-caption-caption", "key": f"row-{number}", "expected": "a dot", "answer": given}
            | {"exact_match": float(number), "token_f1": float(number)}
            for number, given in enumerate([NASTY, "a dot"])
        ]
        prompts = [{"part": "world-caption-generate", "prompt": prompt} for prompt in ("a held-out star", NASTY)]
        write_json(folder / "held_out.json", {"scores": [numbers | errors], "answers": answers, "prompts": prompts})
        held = np.arange(2 * 4 * DEPTH).reshape(2, 4, DEPTH) % 16
        np.savez(folder / "held_out.npz", codes=held, drawn=15 - held)
        lines = ["finished_steps,track,part,dataset,task,documents,text_loss,image_loss"]
        for step in (0, 3):
            lines += [f"{step},joint,world-caption-generate,world,generation,2,,{3 - step / 10}"]
            lines += [f"{step},joint,world-caption-caption,world,understanding,2,{2 - step / 10},"]
        (folder / "validation.csv").write_text("\n".join(lines) + "\n")
    write_json(where.run(key) / "finished.json", {"seconds": 90.0, "code": "x", "fingerprint": "y"})
    speed = {"tokens_per_second": 4321.0, "memory_gib": 0.75, "mfu": None, "written": 1_700_000_000.0}
    write_json(where.run(key) / "progress.json", speed)


def write_scores(where: Layout, variant: str, benchmark: str, names: tuple[str, ...], lines: list[dict]) -> None:
    """Scores and verdicts of a benchmark, and the table of what was drawn or asked about."""
    row = {"standard_error": 0.0625, "chance": 0.125, "items": 2, "clusters": 2, "seed": 5, "interval": None}
    row |= {"rule": "official", "unread": 0.0, "missing": 0, "items_hash": "a", "model": "b", "decoding": "c"}
    table = {
        "held_out": {name: {**row, "value": 0.25} for name in names},
        "seen": {name: {**row, "value": 0.75} for name in names},
    }
    folder = where.scores(variant) / benchmark
    write_json(folder / "metrics.json", table)
    (folder / "verdicts.jsonl").write_text(
        "".join(json.dumps({"benchmark": benchmark} | line) + "\n" for line in lines)
    )
    drawn = not lines[0]["image"]
    place, column = (where.answers(variant) / benchmark, "image") if drawn else (where.items(benchmark), "bytes")
    rows = {"id": [line["id"] for line in lines], column: [png(Image.new("RGB", (48, 48), "red"))] * len(lines)}
    task = ShardTask().placed(None, place / "part-00000.parquet", None, "made")
    shard = write_shard(task, pa.table(rows), {}).shard
    write_manifest(place, Manifest(kind="any", dataset=benchmark, columns={}, shards=(shard,)))


def line_of(number: int, question: str, kind: str, split: str, image: str, **verdict: object) -> dict:
    """A line of `verdicts.jsonl`."""
    item = {"id": str(number), "question": question, "truth": verdict.pop("truth", None), "image": image}
    item |= {"cluster": str(number), "chance": 0.5, "number": number}
    official = {"reading": None, "faults": [], **verdict}
    answer = official.pop("answer", None)
    return {**item, "split": split, "about": {"kind": kind}, "answer": answer, "verdicts": {"official": official}}


def write_all(root: Path, plan: Experiment, variant: str = "fork") -> Layout:
    """Everything that the stages of one variant leave behind."""
    where = layout(root)
    write_data(where)
    write_tokenizer(where)
    for key, run in plan.runs.items():
        if run.variant == variant:
            write_stage(where, key, plan)
    drawn = [
        line_of(0, "a cross", "single_object", "seen", "", right=1.0),
        line_of(1, NASTY, "colors", "held_out", "", right=0.0, faults=["no <i>"]),
    ]
    write_scores(where, variant, "shapes-generation", ("overall", "single_object", "colors"), drawn)
    about = ("Is there a cross?", "yes_no", "seen", "0/seen/0")
    answered = [
        line_of(0, *about, right=1.0, truth="yes", answer="yes"),
        line_of(1, *about, right=0.0, truth="no", answer=NASTY),
    ]
    write_scores(where, variant, "shapes-understanding", ("yes_no_accuracy",), answered)
    return where


class FakeCodec:
    """Images whose color is the mean of their codes; reconstructions that lose nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def decode(self, codes_BND):
        gray_B = codes_BND.mean(axis=(1, 2)).astype(np.uint8) * 9
        return np.broadcast_to(gray_B[:, None, None, None], (len(codes_BND), 48, 48, 3)).copy()

    def reconstruct(self, pixels_BSSC):
        return pixels_BSSC


def alignment(curves):
    """What an analysis found, with these curves."""
    return {
        "prompts": 3, "prompts_hash": "p", "sampling": {}, "fixed": {}, "fork": 1, "curves": curves,
        "bag_of_words": dict.fromkeys(curves, 0.5), "untrained": {},
    }  # fmt: skip

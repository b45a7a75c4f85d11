"""Records of a small study, made by hand: three variants, numbers that a formula gives."""

import json
from math import sin

from unifork.report.study import Record, Study
from unifork.shards.manifest import write_json

VARIANTS = {"shared": None, "fork-1": 1, "fork-3": 3}
LAYERS = 5
OVERALL = "shapes-generation seen overall"


def number(*about) -> float:
    """Between 0 and 1, the same for equal words."""
    return round((sin(sum(map(ord, json.dumps(about)))) + 1) / 2, 6)


def record(variant, seed, **changes):
    def curve(stage, task):
        rising = [round(0.05 + 0.1 * layer * number(variant, seed, stage, task), 6) for layer in range(LAYERS)]
        errors = {"standard_error": 0.01, "chance": 0.05, "chance_low": 0.03, "chance_high": 0.07}
        return {"score": rising, **{name: [value] * LAYERS for name, value in errors.items()}}

    names = [f"shapes-generation {split} {name}" for split in ("seen", "held_out") for name in ("overall", "colors")]
    plain = {
        "variant": variant,
        "seed": seed,
        "plan": "shared*4",
        "parameters": 1000,
        "config_hash": f"of {variant}",
        "versions": {"MODEL_VERSION": 2},
        "commit": "abc, clean",
        "machine": "a CPU, 2 cores",
        "items": {"shapes-generation": "aa"},
        "seconds": {"s2": 100.0 + seed},
        "scores": {name: {"value": number(variant, seed, name), "error": 0.02, "chance": 0.1} for name in names},
        "losses": {f"s2 world {kind}": number(variant, seed, kind) for kind in ("text", "image", "image depth 0")},
        "alignment": {"s2": {task: curve("s2", task) for task in ("generation", "understanding")}},
        "conflict": {"s2": {"down_proj": {n: number(variant, seed, n) for n in range(VARIANTS[variant] or LAYERS)}}},
    }
    return Record.model_validate(plain | changes)


def write_study(folder, values=None, seeds=(0, 1, 2)):
    """All files but hypotheses. values: of OVERALL, by variant, one for each seed; a variant without has no runs."""
    variants = [{"name": name, "plan": "shared*4", "fork": fork} for name, fork in VARIANTS.items()]
    study = Study(name="small", data_seed=0, variants=variants, benchmark=None, prompts=())
    write_json(folder / "study.json", study.model_dump(mode="json"))
    for variant in VARIANTS if values is None else values:
        for place, seed in enumerate(seeds):
            plain = record(variant, seed).model_dump(mode="json")
            if values is not None:
                if place >= len(values[variant]):
                    continue
                plain["scores"][OVERALL]["value"] = values[variant][place]
            write_json(folder / f"{variant}-seed{seed}.json", plain)
    return folder

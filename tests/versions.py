"""What each version constant covers, and whether that has changed since it was recorded.

`python tests/versions.py` records the digests of all constants in `tests/versions.json`. A digest is of the covered
files' syntax trees without docstrings, comments, layout and the constants themselves.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RECORDED = Path(__file__).parent / "versions.json"


def within(folder: str, *names: str) -> list[str]:
    """Modules of a folder."""
    return [f"{folder}/{name}.py" for name in names]


TOKENIZER, EVALUATION = "unifork/image_tokenizer", "unifork/evaluation"
READ = [
    f"{EVALUATION}/understanding/*.*",
    *within(f"{EVALUATION}/generation", "__init__", "dpg", "frechet", "geneval", "geneval_suite", "mjhq"),
]
"""Items and rules of all benchmarks."""
IMAGES = ["unifork/images.py"]
NETWORK = [*within(TOKENIZER, "architecture", "encoder", "model"), *IMAGES]
"""Images to codes."""
SHARDS = within("unifork/shards", "schema")
PROMPTS = ["unifork/documents/prompts.py", "unifork/documents/templates.yaml"]

COVERS: dict[str, tuple[str, list[str]]] = {
    "VOCABULARY_VERSION": ("unifork/vocabulary.py", ["unifork/randomness.py"]),
    "DOWNLOAD_VERSION": (
        "unifork/sources/__init__.py",
        ["unifork/sources/*.*", *SHARDS, *IMAGES, "pipelines/download.py"],
    ),
    "WEB_VERSION": ("unifork/sources/web/download.py", ["unifork/sources/web/*.*", "pipelines/download.py"]),
    "WORLD_VERSION": (
        "unifork/shapes/source.py",
        [
            *within("unifork/shapes", "__init__", "detector", "language", "questions"),
            "unifork/shapes/world.*",
            "unifork/evaluation/generation/geneval.py",  # the clauses of its prompts
        ],
    ),
    "FILTER_VERSION": (
        "unifork/filters/worker.py",
        [*within("unifork/filters", "__init__", "rules", "takedown"), *SHARDS, "pipelines/filter.py"],
    ),
    "MEASURE_VERSION": ("unifork/filters/measure.py", [*IMAGES, *SHARDS]),
    "SIGNATURES_VERSION": ("unifork/filters/duplicates.py", ["unifork/sources/archives.py"]),
    "TOKENIZER_VERSION": (
        f"{TOKENIZER}/training.py",
        [
            *NETWORK,
            *within(
                TOKENIZER, "canaries", "codebook_training", "conversion", "decoder", "measures", "readers", "samples"
            ),
            *within("unifork", "identity", "weights"),
            f"{TOKENIZER}/official_names.yaml",
            "pipelines/image_tokenizer.py",
        ],
    ),
    "TEXT_TOKENIZER_VERSION": (
        "unifork/documents/text_tokenizer.py",
        [*PROMPTS, "unifork/weights.py", "pipelines/text_tokenizer.py"],
    ),
    "ENCODE_VERSION": (
        f"{TOKENIZER}/encode.py",
        [*NETWORK, f"{TOKENIZER}/code_encoder.py", *SHARDS, "unifork/identity.py", "pipelines/encode.py"],
    ),
    "DOCUMENTS_VERSION": (
        "unifork/documents/mixture.py",
        [
            *within("unifork/documents", "__init__", "prepare", "text_tokenizer"),
            *PROMPTS,
            *SHARDS,
            "unifork/batch.py",
            "pipelines/prepare.py",
        ],
    ),
    "MODEL_VERSION": (
        "unifork/models/modeling.py",
        ["unifork/models/*.*", *within("unifork", "assembly", "batch", "identity", "weights"), "pipelines/init.py"],
    ),
    "TRAIN_VERSION": (
        "unifork/training/stage.py",
        [
            *within("unifork/training", "checkpoint", "recovery", "loop", "optimizer", "strategies", "watch"),
            "unifork/training/zero.*",
            *within("unifork/training", "validation", "export"),
            *within("unifork/documents", "loader"),
            *within("unifork", "batch", "inference"),  # a stage ends with samples
            "pipelines/train.py",
        ],
    ),
    "ITEMS_VERSION": (
        f"{EVALUATION}/items.py",
        [
            *within(EVALUATION, "__init__", "answers", "archive", "statistics", "suites", "generation/layout"),
            *READ,
            *PROMPTS,  # a question about whole images
            *within("unifork/shapes", "generation", "understanding"),
            *IMAGES,
            "unifork/shards/schema.py",
            "pipelines/items.py",
        ],
    ),
    "ANSWER_VERSION": (
        f"{EVALUATION}/answering.py",
        [*within("unifork", "inference", "models/generation", "image_tokenizer/code_encoder"), "pipelines/answer.py"],
    ),
    "EXAMINE_VERSION": (
        f"{EVALUATION}/examining.py",
        [
            *within(f"{EVALUATION}/generation", "dpg", "geneval_suite", "layout", "mjhq", "networks"),
            f"{EVALUATION}/generation/coco_names.txt",
            f"{TOKENIZER}/canaries.py",
            "unifork/weights.py",
            *IMAGES,
            "pipelines/examine.py",
        ],
    ),
    "SCORE_VERSION": (
        f"{EVALUATION}/scoring.py",
        [
            *within(EVALUATION, "__init__", "answers", "archive", "statistics", "suites"),
            *READ,
            *within("unifork/shapes", "detector", "generation", "understanding"),
            f"{EVALUATION}/text_scores.py",
            "pipelines/score.py",
        ],
    ),
    "TEXT_VERSION": (
        f"{EVALUATION}/text.py",
        ["unifork/models/conversion.py", "pipelines/text.py"],
    ),
    "ANALYZE_VERSION": (
        "unifork/analysis/kinds.py",
        [
            "unifork/analysis/*.*",
            "unifork/figures.*",
            *within("unifork", "inference", "models/generation", "image_tokenizer/code_encoder"),
            "pipelines/analyze.py",
        ],
    ),
    "REPORT_VERSION": (
        "unifork/report/build.py",
        ["unifork/report/*", f"{EVALUATION}/comparison.py", "unifork/figures.*", "pipelines/report.py"],
    ),
    "PUBLISH_VERSION": ("unifork/publish/shards.py", ["unifork/publish/*.*"]),
}
"""Constant: the file it stands in, and what it covers besides."""

DECIDES_NOTHING = {
    "unifork/__init__.py": "settings of threads",
    "unifork/errors.py": "messages",
    "unifork/layout.py": "where things lie",
    "unifork/registry.py": "finds objects by name; what it finds is covered",
    "unifork/processes.py": "locks",
    "unifork/jobs.py": "where programs run",
    "unifork/cluster.py": "where programs run",
    "unifork/config/*.py": "its values are parameters, and parts of fingerprints",
    "unifork/experiments/*.py": "writes parameters",
    "unifork/shards/__init__.py": "empty",
    "unifork/shards/manifest.py": "hashes and sizes of what others made",
    "unifork/stores.py": "where shards lie",
    "unifork/shards/repair.py": "makes nothing, has damaged shards made again",
    "unifork/shards/task.py": "messages between driver and workers; what is left out its worker decides",
    "unifork/shards/job.py": "which shards are left to make; what is in one is its worker's affair",
    "unifork/image_tokenizer/__init__.py": "empty",
    "unifork/training/__init__.py": "empty",
    "unifork/training/launch.py": "where a stage runs",
    "unifork/training/requests.py": "when a run ends or saves, not with what",
    "unifork/training/history.py": "writes down what happened",
    "unifork/training/tables.py": "forms of what happened",
    "unifork/reference.py": "numbers for people",
    "unifork/training/loggers.py": "writes down what happened",
    "unifork/training/service.py": "writes down what happened",
    "unifork/training/flops.py": "numbers for people",
    "unifork/shards/progress.py": "says how far a program is",
    "unifork/commands/*.py": "commands for people",
    "unifork/cli.py": "commands for people",
    "unifork/evaluation/names.py": "names",
    "unifork/doctor.py": "looks at the machine",
    "unifork/nodes.py": "looks at machines",
    "unifork/devices.py": "names of devices",
    "unifork/library.py": "for people's programs",
    "unifork/serving.py": "a page for people",
    "unifork/planning.py": "numbers for people",
    "unifork/inspection.py": "texts for people",
    "pipelines/__init__.py": "refuses a Python that lacks the libraries",
}
"""Files without a version, and why they need none."""


def files(patterns: list[str], root: Path = ROOT) -> list[Path]:
    """What glob patterns name, in order. Raises FileNotFoundError for one that names nothing."""
    found: set[Path] = set()
    for pattern in patterns:
        named = {path for path in root.glob(pattern) if path.is_file() and "__pycache__" not in path.parts}
        if not named:
            raise FileNotFoundError(f"tests/versions.py: {pattern} names no file")
        found |= named
    return sorted(found)


def covered(name: str, root: Path = ROOT) -> list[Path]:
    """The files that a constant covers."""
    home, others = COVERS[name]
    return files([home, *others], root)


def version(name: str, root: Path = ROOT) -> int:
    """The value of a constant, read as DVC reads it: without running anything."""
    for node in ast.parse((root / COVERS[name][0]).read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return int(ast.literal_eval(node.value))
    raise LookupError(f"{COVERS[name][0]}: no {name}")


def digest(name: str, root: Path = ROOT) -> str:
    """Of everything a constant covers that can decide a result."""
    whole = hashlib.sha256()
    for path in covered(name, root):
        content = repr(plain(ast.parse(path.read_text()))).encode() if path.suffix == ".py" else path.read_bytes()
        whole.update(f"{path.relative_to(root).as_posix()}\n".encode() + hashlib.sha256(content).digest())
    return whole.hexdigest()[:16]


def plain(node: Any) -> Any:
    """A syntax tree as nested lists, the same for every version of Python."""
    if isinstance(node, list):
        return [plain(child) for child in node if not _says_nothing(child)]
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, plain(value)) for name, value in ast.iter_fields(node) if value is not None)
    return [type(node).__name__, *(field for field in fields if field[1] != [])]


def _says_nothing(node: Any) -> bool:
    """Whether a statement is a docstring, or a version constant."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in COVERS


def state(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """Version and digest of every constant."""
    return {name: {"version": version(name, root), "digest": digest(name, root)} for name in COVERS}


def faults(recorded: dict[str, dict[str, Any]], now: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What is not as it was recorded, and what to do about it."""
    for name in sorted(recorded.keys() | now.keys()):
        before, here = recorded.get(name), now.get(name)
        if before == here:
            continue
        if before and here and before["version"] == here["version"]:
            home = COVERS[name][0]
            yield f"code that {name} covers has changed: if results change, raise {name} in {home}; then record"
        else:
            yield f"{name}: {before} is recorded, {here} is here: record"


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(state(), indent=2) + "\n")
    print(f"{RECORDED}: recorded")

"""How much there is to read: `python tests/size.py` prints lines of code, and the files between a URL and a loss.

Code is what is left without blank lines, comments, docstrings (of attributes, too) and imports. The files on the way
are the project's own that the programs from download to training import, directly or not, without what stands BESIDE.
"""

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_CODE, MOST_FILES = 9000, 38
PROGRAMS = ("download", "filter", "encode", "prepare", "train")
LAYOUT_TOKENS = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
BESIDE = {
    "the ground floor, which nobody opens to follow the data": (
        "errors", "vocabulary", "layout", "registry", "randomness", "processes", "devices", "weights", "stores",
        "identity", "config", "jobs",
    ),
    "kinds of source that a URL is not": ("sources/archives",),
    "the inside of one network": (
        "image_tokenizer/architecture", "image_tokenizer/canaries", "image_tokenizer/encoder",
        "image_tokenizer/decoder", "models/configuration", "models/layer_plan", "models/masks", "models/parameters",
    ),
    "what a run leaves behind, and what a trained model does": (
        "training/checkpoint", "training/recovery", "training/history", "training/tables", "training/watch",
        "training/requests", "training/optimizer", "training/zero", "training/loggers", "training/service",
        "training/flops", "training/export", "training/validation",
        "shards/progress",
        "models/generation", "inference",
    ),
}  # fmt: skip


def code_lines(path: Path) -> int:
    """Lines of a file that hold code."""
    text = path.read_text()
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT_TOKENS:
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - left_out)


def imported(path: Path) -> set[Path]:
    """The project's files that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    places = [ROOT.joinpath(*name.split(".")) for name in names if name.startswith(("unifork.", "pipelines."))]
    files = [file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")]
    return {file for file in files if file.exists()}


def closure(path: Path, seen: set[Path]) -> set[Path]:
    """A file and the project's files that it imports, directly or not."""
    if path not in seen:
        seen.add(path)
        for file in imported(path):
            closure(file, seen)
    return seen


def on_the_way() -> list[str]:
    """The files that one opens to follow an image from its URL to its loss."""
    seen: set[Path] = set()
    for program in PROGRAMS:
        closure(ROOT / "pipelines" / f"{program}.py", seen)
    names = [path.relative_to(ROOT).as_posix() for path in seen if path.read_text().count("\n") > 1]
    beside = tuple(f"unifork/{name}" for names in BESIDE.values() for name in names)
    return sorted(name for name in names if not name.startswith(beside))


def main() -> None:
    """Print both."""
    rooms: Counter[str] = Counter()
    for path in (ROOT / "unifork").rglob("*.py"):
        rooms[path.relative_to(ROOT / "unifork").parts[0].removesuffix(".py")] += code_lines(path)
    for room, lines in rooms.most_common():
        print(f"{lines:6} {room}")
    print(f"{rooms.total():6} lines of code in unifork/ (at most {MOST_CODE})")
    way = on_the_way()
    print("\n".join(["", *way]), f"\n{len(way)} files between a URL and a loss (at most {MOST_FILES})")


if __name__ == "__main__":
    main()

"""The world takes part through the tables that anybody's code uses: nothing else in the project knows it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOM = "unifork/shapes"
STILL_KNOWS_IT = {"unifork/sources/__init__.py"}
"""Its kind of source has an entry of its own there; goes when cards name MODULE:OBJECT."""


def knowing(code: str) -> list[str]:
    """What a file of Python says of the world: imports of it, and texts that name it or something in it."""
    texts: list[str] = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            texts += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            texts += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant):
            texts.append(str(node.value))
    return [text for text in texts if text.startswith("shapes") or "unifork.shapes" in text]


def test_nothing_else_knows_the_world():
    faults = {}
    for path in [path for folder in ("unifork", "pipelines") for path in (ROOT / folder).rglob("*")]:
        name = path.relative_to(ROOT).as_posix()
        if path.suffix == ".py" and not name.startswith(f"{ROOM}/") and name not in STILL_KNOWS_IT:
            faults[name] = knowing(path.read_text())
        elif path.suffix in (".html", ".css"):
            faults[name] = ["shapes"] if "shapes" in path.read_text() else []
    assert {name: found for name, found in faults.items() if found} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import unifork.shapes.world",
        "from unifork.shapes import world",
        "from unifork import shapes",
        "kind == 'shapes'",
        "kind = 'shapes-generation'",
        "KINDS = {'a': 'unifork.shapes.source:SOURCE'}",
    ],
)
def test_whatever_knows_it_is_found(code):
    assert knowing(code)

"""The project speaks the field's words: names that readers would have to learn stay out of code, files and pages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = sorted(
    path for folder in ("unifork", "pipelines", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")
)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "*/*.yaml", "*.yaml", "unifork/**/*.html", "unifork/**/*.jinja", "Makefile")
    for path in ROOT.glob(pattern)
    if path.name not in ("CHANGELOG.md", "imagenet_prompts.yaml")
)

PARTS = {
    "picture": "image", "pictures": "image", "hop": "job or stage", "hops": "jobs or stages",
    "twin": "duplicate", "twins": "duplicates", "learned": "supervised, loss_mask", "paint": "generate",
    "painted": "generated", "speaker": "engine", "knock": "authenticate", "licence": "license", "colour": "color",
    "grey": "gray", "centre": "center", "dealt": "assigned",
}  # fmt: skip
"""Part of a name: what to say instead."""
NAMES = {
    "Words": "TokenizedDocument", "Reading": "AttentionContext", "deal": "assign_rows_to_workers",
    "Turns": "HostQueues",
    "Standing": "IntactShards", "reopen": "revert_to_records", "forget": "delete_record", "Box": "Archive",
    "Fault": "RowError", "Plain": "StrictModel or Strategy", "Run": "StageRun or WorkerContext",
    "Part": "MixturePart", "rows_used": "codebook_usage",
    **dict.fromkeys(("told", "said", "asked", "known", "one", "mine", "made"), "what it holds"),
}  # fmt: skip
"""Whole name: what it is called."""
PHRASES = re.compile(
    r"\b(?:pictures?|hops?|twins?|licen[c]e|colou?red? ?matte|stands? still|guessing evenly|"
    r"(?:hosts?|rows?) takes? turns|"
    r"learned (?:tokens?|positions?)|paints?|Speaker|colours?|grey|centre|quantis\w+|tokenis\w+|normalis\w+)\b",
    re.IGNORECASE,
)


def names_of(path: Path) -> set[str]:
    """Every name that a file gives to something."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
    return found


def parts_of(name: str) -> list[str]:
    """`MAX_PICTURES` and `maxPictures` as max, pictures."""
    return [part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


@pytest.mark.parametrize("path", CODE, ids=[str(path.relative_to(ROOT)) for path in CODE])
def test_names_are_the_fields(path):
    names = names_of(path)
    wrong = {name: PARTS[part] for name in names for part in parts_of(name) if part in PARTS}
    wrong |= {name: NAMES[name] for name in names & set(NAMES)}
    assert wrong == {}


def test_what_people_read_is_in_the_fields_words():
    texts = {path: path.read_text() for path in PAGES}
    for path in CODE:
        if path.parts[len(ROOT.parts)] != "tests" and path.name != "base.py":  # which names the keys of before
            tree = ast.parse(path.read_text())
            strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            texts[path] = "\n".join(text for text in strings if isinstance(text, str))
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}" for path, text in texts.items() for match in PHRASES.finditer(text)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["a picture of", "two hops", "the earlier twin", "hosts take turns", "a licence"])
def test_the_old_words_would_be_found(text):
    assert PHRASES.search(text)

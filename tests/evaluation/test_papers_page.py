"""docs/evaluation.md and docs/analysis.md: commands exist and parse, and what they name is there."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from dvc.cli import parse_args
from typer.testing import CliRunner

from unifork.cli import app
from unifork.config import Analysis, load_eval, load_text
from unifork.evaluation.suites import suite_of
from unifork.experiments import resolve

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / f"docs/{name}.md").read_text() for name in ("evaluation", "analysis")}
EXAMPLES = {"colors", "NAME"}
"""A card that the page has people write, and where any name stands."""
CARDS = sorted(path.stem for path in (ROOT / "datasets/evals").glob("*.yaml"))
TEXTS = sorted(path.stem for path in (ROOT / "datasets/evals/text").glob("*.yaml"))
TABLE = PAGES["evaluation"].partition("## Every number of the papers")[2].partition("Not offered:")[0]


def commands() -> list[str]:
    """Every line of a block and every span of code that is a command."""
    found = {}
    for text in PAGES.values():
        blocks = re.findall(r"^```(?:console)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        lines = [line.partition(" # ")[0] for block in blocks for line in block.splitlines()]
        spans = re.findall(r"`((?:unifork|dvc|python -m) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        found |= dict.fromkeys(part.strip() for line in [*lines, *spans] for part in line.split(" && "))
    return [line for line in found if line.startswith(("unifork", "dvc", "python -m"))]


def test_commands_are_found():
    assert {line.split()[0] for line in commands()} == {"unifork", "dvc", "python"}
    assert len(commands()) > 20


@pytest.mark.parametrize("command", commands())
def test_a_command_parses_and_names_what_exists(command):
    words = shlex.split(command.replace("...", "x"))
    experiment = resolve("paper", ROOT / "experiments", ROOT / "datasets")
    if words[0] == "unifork":
        done = CliRunner().invoke(app, [*words[1:], "--help"])  # words before it are parsed first
        assert done.exit_code == 0, done.output
        if words[1] == "use":
            assert {*words[2:]} <= {*EXAMPLES, *(path.stem for path in (ROOT / "experiments").glob("*.yaml"))}
        if words[1] in ("score", "answers") and words[2] != "compare":
            card = words[2 + (words[1] == "answers")]
            assert card in {*CARDS, *EXAMPLES, "SUITE"}
        if "--benchmark" in words:
            assert words[words.index("--benchmark") + 1] in CARDS
    elif words[0] == "dvc":
        assert parse_args(words[1:]).func
        derived = {"score": experiment.scored, "analyze": experiment.analyzed, "answer": experiment.evaluations}
        derived |= {"items": experiment.benchmarks, "text": experiment.text_runs, "examine": experiment.examined}
        for stage, _, key in (word.partition("@") for word in words[2:] if "@" in word):
            assert key in derived[stage]
    else:
        program, name = words[2:]
        assert importlib.util.find_spec(program)
        entries = {"items": experiment.benchmarks, "answer": experiment.evaluations, "text": experiment.text_runs}
        entries |= {"examine": experiment.examined}
        assert name.replace("/", "-") in entries[program.removeprefix("pipelines.")]


@pytest.mark.parametrize("name", [*CARDS, *TEXTS])
def test_a_card_has_a_row_with_its_scores(name):
    """Every card stands in the table; scores that a row names beside it are those of the card's own headlines."""
    rows = [[cell.strip() for cell in line.split("|")] for line in TABLE.splitlines() if line.startswith("| ")]
    (row,) = ["|".join(row) for row in rows if row[2].startswith(f"`{name}`:") or f"`{name}`" in row[1]]
    card = load_text(name, ROOT / "datasets/evals") if name in TEXTS else load_eval(name, ROOT / "datasets/evals")
    if not name.startswith("shapes"):
        for score in card.show.headlines:
            assert f"`{score}`" in row
    if name in CARDS:
        for rule in card.score.rules:
            assert rule in suite_of(card)[0].rules


def test_every_analysis_and_every_card_is_in_the_paper_experiment():
    paper = resolve("paper", ROOT / "experiments", ROOT / "datasets")
    assert {*paper.benchmarks} == {name for name in CARDS if not name.startswith("shapes")}
    assert [*paper.text_evals] == TEXTS
    assert paper.analyzed["unifork-s3"].kinds == ("alignment",)
    assert paper.analyzed["unifork-s2-pretrain"].kinds == ("alignment", "conflict", "entropy")
    assert paper.analyzed["unifork-s3"].prompts == "data/evals/geneval"
    assert (paper.analyses.prompts, paper.analyses.pairs) == ("geneval", 500)
    assert paper.analyses.query == "Provide a one-sentence caption for the image:"
    ablation = resolve("paper-ablation", ROOT / "experiments", ROOT / "datasets")
    named = {name for name in ablation.variants if f"`{name}`" in PAGES["evaluation"]}
    assert named == {*ablation.variants}
    assert {*ablation.analyzed} == {
        *(f"{name}-{stage}" for name in ("shared", "unifork-8", "unifork-12", "unifork-16")
          for stage in ("s2-pretrain", "s2-sft")),
        "generation-expert-s2-sft-generation",
    }  # fmt: skip
    for key in re.findall(r"--choose ([a-z]\w*)=", PAGES["analysis"]):
        assert key in Analysis.model_fields


def test_experts_see_the_documents_of_their_task_as_often_as_the_others():
    stages = resolve("paper-ablation", ROOT / "experiments", ROOT / "datasets").stages
    for name in ("s1-imagenet", "s1-captions", "s2-pretrain", "s2-sft"):
        joint = stages[name].tracks["joint"]
        for task in ("generation", "understanding"):
            own = stages[f"{name}-{task}"].tracks["joint"]
            entries = [entry for entry in joint.mixture if entry.task == task]
            total, theirs = (sum(entry.weight for entry in found) for found in (entries, own.mixture))
            assert [(entry.prepared, entry.weight / theirs) for entry in own.mixture] == pytest.approx(
                [(entry.prepared, entry.weight / total) for entry in entries]
            )
            share = total / sum(entry.weight for entry in joint.mixture)
            assert own.batch_documents == round(joint.batch_documents * share)
            same = own.model_copy(update={"mixture": joint.mixture, "batch_documents": joint.batch_documents,
                                          "prompt_drop": joint.prompt_drop})  # fmt: skip
            assert same == joint

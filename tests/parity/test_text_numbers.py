"""The templates against the original's ids, labels and positions; and that the comparison can fail."""

import json
import os
import shutil
from pathlib import Path

import pytest

from benchmarks.parity.text import comparisons
from unifork.errors import DataError

FOLDER = Path(os.environ.get("UNIFORK_FIXTURES", Path(__file__).parent.parent / "fixtures" / "official_tiny"))


def test_every_case_agrees():
    found = list(comparisons(FOLDER))
    cases = json.loads((FOLDER / "06_text.json").read_text())
    expected = {f"{name}.{key}" for name, case in cases.items() for key in ("input_ids", "labels") if key in case}
    assert expected <= {comparison.tensor for comparison in found}
    assert [comparison.tensor for comparison in found if not comparison.agrees] == []


def changed(tmp_path, change):
    shutil.copytree(FOLDER / "tokenizer", tmp_path / "tokenizer")
    cases = json.loads((FOLDER / "06_text.json").read_text())
    change(cases)
    (tmp_path / "06_text.json").write_text(json.dumps(cases))
    return [comparison.tensor for comparison in comparisons(tmp_path) if not comparison.agrees]


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda cases: cases["stage3_und_one_turn"]["labels"].__setitem__(-1, -100), ["stage3_und_one_turn.labels"]),
        (lambda cases: cases["stage1.5_gen"]["input_ids"].append(0), ["stage1.5_gen.input_ids"]),
        (
            lambda cases: cases["stage2_und_text_only"].update(conversation=[["human", "Who?"], ["gpt", "Me."]]),
            [f"stage2_und_text_only.{key}" for key in ("input_ids", "labels", "supervised_positions")],
        ),
    ],
)
def test_a_difference_is_seen(tmp_path, change, wrong):
    assert changed(tmp_path, change) == wrong


def test_a_case_without_a_template_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no template is known for stage9"):
        changed(tmp_path, lambda cases: cases.update(stage9={"input_ids": []}))

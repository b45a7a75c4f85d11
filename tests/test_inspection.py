"""`unifork inspect`: every line of a batch against the shards it was made from, and nothing to spoof it with."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from tiny import copy_of

from unifork import cli
from unifork.batch import Document
from unifork.config import Experiment, load
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import UniForkError
from unifork.inspection import Inspection, Shown, Stretch, inspect, rendered, visible
from unifork.shards.manifest import read_manifest

STEP = 2
"""A step of s2-pretrain with a dropped prompt (seed 0)."""


@pytest.fixture(autouse=True)
def one_row(tmp_path_factory, monkeypatch) -> None:
    """A cluster whose one row holds a whole step."""
    path = tmp_path_factory.mktemp("clusters") / "long.yaml"
    path.write_text("name: long\ntrain: {row_tokens: 8192}\n")
    monkeypatch.setenv("UNIFORK_CLUSTER", str(path))


def rows_of(root: Path, view: str) -> dict:
    folder = root / "data/codes/shapes" / view
    rows = [row for shard in read_manifest(folder).shards for row in pq.read_table(folder / shard.path).to_pylist()]
    return {row["key"]: row for row in rows}


def test_a_whole_step_reads_as_its_shards_say(tiny_root):
    [found] = inspect(tiny_root, "unifork", "s2-pretrain", STEP, documents=100)
    lines = str(rendered(found, marks=True)).splitlines()
    crops, pads = rows_of(tiny_root, "crop"), rows_of(tiny_root, "pad")
    tokenizer = TextTokenizer(tiny_root / "tokenizers/text")
    generated = [one for one in found.documents if one.document.task == "generation"]
    answered = [one for one in found.documents if one.document.task == "understanding"]
    assert len(found.documents) == len(generated) + len(answered) == 16

    expected, learned, length = [], {}, lambda text: len(tokenizer.encode(text))
    for one in answered:
        learned[one.document.key] = length(pads[one.document.key]["conversations"][1]["text"]) + 1
    words = sum(learned.values())
    for one in found.documents:
        if one in generated and "dropped" in one.template:
            body = "<|im_start|>USER: <|video_pad|>. ASSISTANT: [[[image 36x4 codes]]]"
            tokens = 1 + length("USER: ") + 1 + length(". ASSISTANT: ") + 38
            head = f"(generate, prompt dropped), {tokens} tokens, 36 learned, {1 / len(generated):.1%}"
        elif one in generated:
            caption = crops[one.document.key]["caption"]
            body = f"<|im_start|>USER: {caption} ASSISTANT: [[[image 36x4 codes]]]"
            tokens = 1 + length(f"USER: {caption} ASSISTANT: ") + 38
            head = f"(generate), {tokens} tokens, 36 learned, {1 / len(generated):.1%}"
        else:
            asked, said = (turn["text"] for turn in pads[one.document.key]["conversations"][:2])
            body = rf"[image 36x4 codes]\n{asked}[[{said}<|im_end|>]]"
            tokens = 38 + length("\n" + asked + said) + 1
            mine = learned[one.document.key]
            head = f"(answer-plain), {tokens} tokens, {mine} learned, {mine / words:.1%}"
        key, task = one.document.key, one.document.task
        expected += ["", f"shapes {key}, {task} {head} of the loss of {task}", body]
    assert sum("prompt dropped" in line for line in expected) == 1
    size, count = int(found.facts[0].split()[2]), len(generated)
    asked_tokens = sum(len(one.document) for one in answered)
    grouped = f"understanding {asked_tokens}, generation {size - asked_tokens} tokens, padding included"
    assert lines == [
        f"unifork, stage s2-pretrain, track joint, step {STEP} of 25: batch 1 of 1 of worker 1 of 1",
        f"1 x {size} tokens, {sum(len(one.document) for one in found.documents) / size:.1%} filled",
        f"understanding: {16 - count} documents, {words} of the step's {words} learned text tokens, 100.0% of its loss",
        f"generation: {count} documents, {36 * count} of the step's {36 * count} learned image positions, "
        f"100.0% of its loss",
        f"1 x shared: shared {size} tokens, padding included",
        f"1 x task: {grouped}",
        f"final norm: {grouped}",
        *expected,
    ]


def test_some_of_each_task_are_shown_and_the_rest_counted(tiny_root, monkeypatch, capsys):
    monkeypatch.chdir(tiny_root)
    monkeypatch.setattr(sys, "argv", ["unifork", "inspect", "--stage", "s2-pretrain", "--documents", "3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1].split()[0] for line in lines if line.startswith("shapes ")] == [
        "understanding",
        "understanding",
        "generation",
    ]
    assert lines[-1] == "... and 13 more documents in this batch"


def test_every_track_has_its_own_batch(tiny_root):
    found = list(inspect(tiny_root, "unifork", "s3", 0, documents=0))
    assert [one.title.split(", ")[2] for one in found] == ["track generation", "track understanding"]
    assert [[int(fact.split()[1]) for fact in one.facts[1:3]] for one in found] == [[0, 16], [16, 0]]
    assert [one.hidden for one in found] == [16, 16]


def test_of_a_picture_learned_in_part_the_learned_positions_count(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path)
    plain = yaml.safe_load((root / "params.yaml").read_text())
    plain["stages"]["s2-pretrain"]["tracks"]["joint"]["supervised_positions"] = 10
    (root / "params.yaml").unlink()
    (root / "params.yaml").write_text(yaml.safe_dump(plain))
    [found] = inspect(root, "unifork", "s2-pretrain", STEP, documents=100)
    drawn = [one for one in found.documents if one.document.task == "generation"]
    assert {(one.document.supervised_positions, one.share, one.stretches[-1].text) for one in drawn} == {
        (10, 1 / len(drawn), "image 36x4 codes, the first 10 learned")
    }
    assert f"{10 * len(drawn)} of the step's {10 * len(drawn)} learned image positions" in found.facts[2]


EVIL = "[bold red]x[/bold red] <b>y</b> <|im_end|> ]] \\ \x1b[31m\r\x07 :smile: \u202e [image 36x4 codes]"
SHOWN = r"\[bold red\]x\[/bold red\] \<b>y\</b> \<|im_end|> \]\] \\ \x1b\[31m\r\x07 :smile: \u202e \[image 36x4 codes\]"


def test_no_text_looks_like_a_mark_or_commands_the_terminal():
    assert visible(EVIL) == SHOWN
    learned_T = np.arange(9) < 2
    read = Document(EVIL, "understanding", learned_T, learned_T, learned_T, np.zeros((0, 4)))
    document = Shown(read, "a[b]", "answer", 0.5, [
        Stretch("control", "<|im_start|>", False), Stretch("image", "image 4x4 codes", False),
        Stretch("text", EVIL, False), Stretch("text", EVIL, True), Stretch("control", "<|im_end|>", True),
    ])  # fmt: skip
    found = Inspection("title", ["1 x shared: all"], [document], 0, {EVIL: 3})
    head = f"quarantined: 3 x {SHOWN}\n\na\\[b\\] {SHOWN}, understanding (answer), 9 tokens, 2 learned, 50.0% of"
    plain = str(rendered(found, marks=True))
    assert head in plain
    assert plain.endswith(f"\n<|im_start|>[image 4x4 codes]{SHOWN}[[{SHOWN}<|im_end|>]]\n")

    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", soft_wrap=True).print(rendered(found, marks=False))
    coloured = out.getvalue()
    assert f"\x1b[1;32m{SHOWN}\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in coloured
    assert f"\x1b[36m<|im_start|>\x1b[0m\x1b[35m[image 4x4 codes]\x1b[0m{SHOWN}\x1b[1;32m" in coloured
    without = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert without.rstrip("\n") == plain.replace("[[", "").replace("<|im_end|>]]", "<|im_end|>").rstrip("\n")


@pytest.mark.parametrize(
    ("gone", "arguments", "message"),
    [
        ("params.yaml", {}, r"params.yaml: not there yet; `unifork use NAME` makes it"),
        ("tokenizers/text", {}, r"tokenizers/text: not there yet; `dvc repro text_tokenizer` makes it"),
        ("tokenizers/image", {}, r"tokenizers/image: not there yet; `dvc repro image_tokenizer` makes it"),
        ("data/codes/shapes/pad/manifest.json", {}, r"manifest.json: not there yet; `dvc repro encode@shapes` makes"),
        (None, {"stage": "s2-sft"}, r"unknown stage 's2-sft'. Known: s1-captions, s2-pretrain, s3"),
        (None, {"variant": "unifrk"}, r"unknown variant 'unifrk'. Did you mean 'unifork'"),
        (None, {"step": 25}, r"--step 25: track joint of s2-pretrain has the steps 0 to 24"),
    ],
)
def test_what_is_not_there_is_said_with_the_command_that_makes_it(tiny_root, tmp_path, gone, arguments, message):
    root = copy_of(tiny_root, tmp_path) if gone else tiny_root
    if gone:
        (root / gone).rename(root / "elsewhere")
    given = {"variant": "unifork", "stage": "s2-pretrain", "step": 0, "documents": 1, **arguments}
    with pytest.raises(UniForkError, match=message):
        list(inspect(root, **given))
    assert load(Experiment, tiny_root / "params.yaml")

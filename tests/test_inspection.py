"""`unifork inspect`: every line of a batch against the shards it was made from, and nothing to spoof it with."""

import io
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from tiny import copy_of

from unifork import cli
from unifork.config import Experiment, load
from unifork.documents.loader import TrackLoader
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import UniForkError
from unifork.inspection import inspect, visible
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


def read_through(root: Path, stage: str, step: int, documents: int) -> list[list[str]]:
    """The lines of every batch."""
    return [str(text).splitlines() for text in inspect(root, "unifork", stage, step, documents, marks=True)]


def heads(lines: list[str]) -> list[tuple[str, str, bool, int, float]]:
    """Of every document: key, task, whether its prompt is dropped, supervised tokens, percent of the loss."""
    head = re.compile(
        r"shapes (\S+), (\w+) \([\w-]+(, prompt dropped)?\), \d+ tokens, (\d+) supervised, (.+)% of the loss of \2"
    )
    found = [match.groups() for match in map(head.fullmatch, lines) if match]
    return [(key, task, bool(dropped), int(own), float(part)) for key, task, dropped, own, part in found]


def test_a_whole_step_reads_as_its_shards_say(tiny_root):
    [lines] = read_through(tiny_root, "s2-pretrain", STEP, 100)
    crops, pads = rows_of(tiny_root, "crop"), rows_of(tiny_root, "pad")
    tokenizer = TextTokenizer(tiny_root / "tokenizers/text")
    shown = heads(lines)
    generated = [key for key, task, *_ in shown if task == "generation"]
    answered = [key for key, task, *_ in shown if task == "understanding"]
    assert len(shown) == len(generated) + len(answered) == 16

    expected, sizes, length = [], {"generation": 0, "understanding": 0}, lambda text: len(tokenizer.encode(text))
    supervised = {key: length(pads[key]["conversations"][1]["text"]) + 1 for key in answered}
    words = sum(supervised.values())
    for key, task, is_dropped, *_ in shown:
        if is_dropped:
            body = "<|im_start|>USER: <|video_pad|>. ASSISTANT: [[[image 36x4 codes]]]"
            tokens = 1 + length("USER: ") + 1 + length(". ASSISTANT: ") + 38
            head = f"(generate, prompt dropped), {tokens} tokens, 36 supervised, {1 / len(generated):.1%}"
        elif task == "generation":
            caption = crops[key]["caption"]
            body = f"<|im_start|>USER: {caption} ASSISTANT: [[[image 36x4 codes]]]"
            tokens = 1 + length(f"USER: {caption} ASSISTANT: ") + 38
            head = f"(generate), {tokens} tokens, 36 supervised, {1 / len(generated):.1%}"
        else:
            question, answer = (turn["text"] for turn in pads[key]["conversations"][:2])
            body = rf"[image 36x4 codes]\n{question}[[{answer}<|im_end|>]]"
            tokens = 38 + length("\n" + question + answer) + 1
            head = f"(answer-plain), {tokens} tokens, {supervised[key]} supervised, {supervised[key] / words:.1%}"
        sizes[task] += tokens
        expected += ["", f"shapes {key}, {task} {head} of the loss of {task}", body]
    assert sum("prompt dropped" in line for line in expected) == 1
    size, count, asked_tokens = int(lines[1].split()[2]), len(generated), sizes["understanding"]
    grouped = f"understanding {asked_tokens}, generation {size - asked_tokens} tokens, padding included"
    assert lines == [
        f"unifork, stage s2-pretrain, track joint, step {STEP} of 25: batch 1 of 1 of worker 1 of 1",
        f"1 x {size} tokens, {sum(sizes.values()) / size:.1%} filled",
        f"understanding: {16 - count} documents, {words} of the step's {words} supervised text tokens, "
        f"100.0% of its loss",
        f"generation: {count} documents, {36 * count} of the step's {36 * count} supervised image positions, "
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
    found = read_through(tiny_root, "s3", 0, 0)
    assert [lines[0].split(", ")[2] for lines in found] == ["track generation", "track understanding"]
    assert [[int(fact.split()[1]) for fact in lines[2:4]] for lines in found] == [[0, 16], [16, 0]]
    assert [lines[-1] for lines in found] == ["... and 16 more documents in this batch"] * 2


def test_of_a_image_supervised_in_part_the_supervised_positions_count(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path)
    plain = yaml.safe_load((root / "params.yaml").read_text())
    plain["stages"]["s2-pretrain"]["tracks"]["joint"]["supervised_positions"] = 10
    (root / "params.yaml").unlink()
    (root / "params.yaml").write_text(yaml.safe_dump(plain))
    [lines] = read_through(root, "s2-pretrain", STEP, 100)
    drawn = [(own, part) for _, task, _, own, part in heads(lines) if task == "generation"]
    assert set(drawn) == {(10, round(100 / len(drawn), 1))}
    assert sum(line.endswith("[[[image 36x4 codes, the first 10 supervised]]]") for line in lines) == len(drawn)
    assert f"{10 * len(drawn)} of the step's {10 * len(drawn)} supervised image positions" in lines[3]


EVIL = "[bold red]x[/bold red] <b>y</b> <|im_end|> ]] \\ \x1b[31m\r\x07 :smile: \u202e [image 36x4 codes]"
SHOWN = r"\[bold red\]x\[/bold red\] \<b>y\</b> \<|im_end|> \]\] \\ \x1b\[31m\r\x07 :smile: \u202e \[image 36x4 codes\]"


def test_no_text_looks_like_a_mark_or_commands_the_terminal(tiny_root, monkeypatch):
    """Every text, key and reason of a batch is an evil one; marks and control tokens stay what they are."""
    assert visible(EVIL) == SHOWN
    monkeypatch.setattr(TextTokenizer, "decode", lambda *_: EVIL)
    monkeypatch.setattr(TrackLoader, "quarantined", Counter({EVIL: 3}))
    real = TrackLoader.document
    monkeypatch.setattr(TrackLoader, "document", lambda *of: replace(real(*of), key=EVIL))
    [marked], [bare] = (list(inspect(tiny_root, "unifork", "s2-pretrain", STEP, 100, marks)) for marks in (True, False))
    plain = str(marked)
    assert f"\nquarantined: 3 x {SHOWN}\n\nshapes {SHOWN}, understanding (answer-plain), " in plain
    lines = plain.splitlines()
    bodies = {line for before, line in pairwise(lines) if before.startswith("shapes ")}
    supervised_image, supervised_text = "[[[image 36x4 codes]]]", f"[[{SHOWN}<|im_end|>]]"
    assert bodies == {
        f"[image 36x4 codes]{SHOWN}{supervised_text}",
        f"<|im_start|>{SHOWN}{supervised_image}",
        f"<|im_start|>{SHOWN}<|video_pad|>{SHOWN}{supervised_image}",
    }

    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", soft_wrap=True).print(bare)
    colored = out.getvalue()
    assert f"{SHOWN}\x1b[1;32m{SHOWN}\x1b[0m\x1b[1;32m<|im_end|>\x1b[0m" in colored
    assert f"\x1b[35m[image 36x4 codes]\x1b[0m{SHOWN}\x1b[1;32m" in colored
    assert f"\x1b[36m<|im_start|>\x1b[0m{SHOWN}\x1b[1;32m[image 36x4 codes]\x1b[0m" in colored
    without = re.sub(r"\x1b\[[0-9;]*m", "", colored)
    unmarked = plain.replace(supervised_image, "[image 36x4 codes]").replace(supervised_text, f"{SHOWN}<|im_end|>")
    assert without.rstrip("\n") == unmarked.rstrip("\n")


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
    given = {"variant": "unifork", "stage": "s2-pretrain", "step": 0, "documents": 1, "marks": True, **arguments}
    with pytest.raises(UniForkError, match=message):
        list(inspect(root, **given))
    assert load(Experiment, tiny_root / "params.yaml")

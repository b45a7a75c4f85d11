"""A model directory as programs use it: loaded, drawing, answering, chatting, on a device that is here."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import REPOSITORY

import unifork
from unifork.documents.prompts import TEMPLATES, Exchange, question, written
from unifork.errors import ConfigError, DataError
from unifork.inference import Engine


@pytest.fixture(scope="module")
def directory(tiny_root):
    return tiny_root / "models/unifork-init"


@pytest.fixture(scope="module")
def model(directory):
    return unifork.load(directory)


def python(code, *words):
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=REPOSITORY)


def levels(image):
    return np.asarray(image, int)


def test_images_depend_on_prompt_number_and_seed_alone(model):
    first = model.generate_images(["a red circle", "a blue square"], seed=1, top_k=5)
    again = model.generate_images(["a red circle"], seed=1, top_k=5)
    other = model.generate_images(["a red circle"], seed=2, top_k=5)
    assert [image.size for image in first] == [(48, 48)] * 2
    assert np.abs(levels(first[0]) - levels(again[0])).max() <= 1  # the decoder rounds with the size of its batch
    assert np.abs(levels(first[0]) - levels(other[0])).max() > 1


def test_answers_are_those_of_the_engine_whatever_an_image_comes_as(model, tmp_path):
    image = Image.new("RGB", (60, 40), "red")
    path = tmp_path / "red.png"
    image.save(path)
    answers = model.answer_questions([image, path, str(path), path.read_bytes()], ["What is it?"] * 4, max_new_tokens=5)
    assert len(set(answers)) == 1
    codes = model.images.encode_images([image])
    assert model.engine.answer_questions(codes, ["What is it?"], "answer", 5) == answers[:1]
    with pytest.raises(DataError, match="1 images for 2 questions"):
        model.answer_questions([image], ["a", "b"])


@pytest.mark.parametrize("template", ["answer", "answers-plain", "answer-plain"])
def test_a_dialogue_is_read_as_it_was_trained_on(template):
    turns = [("What is it?", "A circle."), ("Which color?", "Red."), ("Sure?", "Yes.")]
    form = TEMPLATES[template]
    rows = [
        turn
        for number, (user, given) in enumerate(turns)
        for turn in (
            {"role": "user", "text": "<image>\n" * (number == 0) + user},
            {"role": "assistant", "text": given},
        )
    ]
    count = 1 if form.first_turn_only else 3
    whole = written(form, rows)
    before = [Exchange(user, given, number == 0) for number, (user, given) in enumerate(turns[: count - 1])]
    begun = question(form, turns[count - 1][0], before, image=count == 1)
    plain = [(piece.text, piece.control) for piece in whole]
    assert [(piece.text, piece.control) for piece in begun] == plain[: len(begun)]
    assert all(piece.supervised for piece in whole[len(begun) :])


def test_a_chat_remembers(model, monkeypatch):
    read = []

    def answer(engine, documents, most):
        read.extend(documents)
        return [f"answer {len(read)}"]

    monkeypatch.setattr(Engine, "answer_documents", answer)
    chat = model.chat(Image.new("RGB", (48, 48), "red"))
    assert [chat.ask("What is it?"), chat.ask("And now?")] == ["answer 1", "answer 2"]
    assert len(read[1]) > len(read[0])
    assert np.array_equal(read[1].codes_ND, read[0].codes_ND)
    text = model.engine.tokenizer.decode(read[1].text_ids_T.tolist())
    assert text.index("What is it?") < text.index("answer 1") < text.index("And now?")
    alone = model.chat()
    alone.ask("What is it?")
    assert len(read[2].codes_ND) == 0
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="max_position_embeddings"):
        model.chat().ask("why " * 600)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"device": "cuda"}, "device cuda: this machine has 0 GPUs"),
        ({"device": "gpu"}, "no name of a device"),
        ({"dtype": "float8"}, "number type"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_one_line(directory, wrong, message):
    with pytest.raises(ConfigError, match=message):
        unifork.load(directory, **wrong)


def test_bfloat16_draws_and_answers(directory):
    half = unifork.load(directory, dtype="bfloat16")
    assert half.engine.model.dtype == torch.bfloat16
    assert half.generate_images(["a red circle"])[0].size == (48, 48)
    assert isinstance(half.answer_questions([Image.new("RGB", (9, 9))], ["What?"], max_new_tokens=3)[0], str)


def test_importing_the_package_loads_nothing_slow():
    code = "import sys, unifork; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sys.modules.keys()"
    assert python(code).returncode == 0


@pytest.mark.slow  # programs that import all of transformers
@pytest.mark.parametrize("first", ["import unifork", "from transformers import AutoModel; import unifork"])
def test_auto_model_knows_the_models(directory, first):
    code = (
        f"import sys; {first}\nfrom transformers import AutoModel\nprint(type(AutoModel.from_pretrained(sys.argv[1])))"
    )
    done = python(code, directory)
    assert "UniForkModel" in done.stdout, done.stderr


def test_commands_take_files_folders_and_several_prompts(directory, tmp_path):
    from typer.testing import CliRunner

    from unifork.cli import app

    def run(*words):
        done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    (tmp_path / "prompts.txt").write_text("a red circle\n\na blue square\n")
    out, grid = tmp_path / "drawn", tmp_path / "grid.png"
    words = ("--prompts", tmp_path / "prompts.txt", "--prompt", "a star", "-n", 2, "--seed", 3, "--top-k", 9)
    run("generate", "--model", directory, *words, "--out", out, "--grid", grid)
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [p for p in ("a star", "a red circle", "a blue square") for _ in "ab"]
    assert all((out / row["file"]).exists() and row["top_k"] == 9 and row["seed"] == 3 for row in rows)
    with Image.open(grid) as sheet, Image.open(out / "0003.png") as image:
        assert sheet.size == (2 * 48 + 2, 3 * 48 + 4)
        assert sheet.crop((50, 50, 98, 98)).tobytes() == image.tobytes()
    answers = tmp_path / "answers.jsonl"
    questions = ("--question", "What is it?", "--question", "Which color?", "--max-new-tokens", 3)
    run(
        "describe", "--model", directory, "--image", out, "--image", out / "000[01].png", *questions, "--jsonl", answers
    )
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(rows) == (6 + 2) * 2
    assert {row["question"] for row in rows} == {"What is it?", "Which color?"}
    assert "0001.png: Which color?" in run("describe", "--model", directory, "--image", out, *questions)

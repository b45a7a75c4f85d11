"""What people read when they take a command wrongly: one line that names the mistake, exit 2, no traceback."""

import os
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml
from crashes import run as run_program
from PIL import Image
from tiny import REPOSITORY, bytes_of, copy_of
from typer.testing import CliRunner

from unifork import cli
from unifork.config import Cluster, EvalCard, Experiment, Sampling, load
from unifork.config.base import read_yaml
from unifork.errors import ConfigError
from unifork.inference import Engine

CARD = "datasets/evals/pope.yaml"
ASK = ("--question", "Is there a red circle in the image?")
LONG = "red " * 600


@pytest.fixture(scope="module")
def model(tiny_root) -> Path:
    return tiny_root / "models/unifork-init"


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (48, 48), "red").save(path)
    return path


def run(capsys, monkeypatch, *words: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `unifork words`."""
    monkeypatch.setattr(sys, "argv", ["unifork", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_an_image_that_cannot_be_read_is_named(model, tmp_path, capsys, monkeypatch, image):
    words, cut = tmp_path / "words.png", tmp_path / "cut.png"
    words.write_text("no image")
    (tmp_path / "folder").mkdir()
    cut.write_bytes(image.read_bytes()[:60])
    expected = {
        tmp_path / "folder": f"error: {tmp_path / 'folder'}: no image files in this folder"
        " (.bmp, .gif, .jpeg, .jpg, .png, .webp)\n",
        tmp_path / "none.png": f"error: {tmp_path / 'none.png'}: no such file\n",
        words: f"error: {words} cannot be read: no image of a known format: it begins with b'no image'\n",
    }
    for path, message in expected.items():
        assert run(capsys, monkeypatch, "describe", "--model", model, "--image", path, *ASK) == (2, "", message)
    tokenizer = ("--tokenizer", model / "image_tokenizer", "--out", tmp_path / "codes.npz")
    code, _, errors = run(capsys, monkeypatch, "tokenizer", "encode", image, cut, *tokenizer)
    assert code == 2
    assert errors.startswith(f"error: {cut} cannot be read: ")
    assert errors.count("\n") == 1


def test_a_template_of_the_other_task_is_refused(model, image, tmp_path, capsys, monkeypatch):
    describe = ("describe", "--model", model, "--image", image, *ASK)
    generate = ("generate", "--model", model, "--prompt", "a red circle", "--out", tmp_path / "out")
    for words, template, tasks in (
        (describe, "generate", "generation, not for understanding"),
        (generate, "answer", "understanding, not for generation"),
    ):
        found = run(capsys, monkeypatch, *words, "--template", template)
        assert found == (2, "", f"error: --template {template}: is for {tasks}\n")
    assert not (tmp_path / "out").exists()


def test_an_empty_answer_is_said_to_be_empty(model, image, capsys, monkeypatch):
    for answer, printed in (("", "(the answer is empty)\n"), ("two", "two\n")):
        monkeypatch.setattr(Engine, "answer_questions", lambda *_, answer=answer: [answer])
        assert run(capsys, monkeypatch, "describe", "--model", model, "--image", image, *ASK) == (0, printed, "")


def test_what_the_model_has_no_positions_for_is_refused(model, image, tmp_path, capsys, monkeypatch):
    describe = ("describe", "--model", model, "--image", image, "--question", LONG)
    generate = ("generate", "--model", model, "--prompt", LONG, "--out", tmp_path / "out")
    for words, what in ((describe, "question"), (generate, "prompt")):
        code, out, errors = run(capsys, monkeypatch, *words)
        assert (code, out) == (2, "")
        assert errors.startswith(f"error: {what} 'red red ")
        assert "tokens with its image; the model reads at most 512 (max_position_embeddings)" in errors
        assert errors.count("\n") == 1


def test_many_prompts_and_questions_are_checked_too(model):
    engine = Engine.load(model)
    codes = np.zeros((2, engine.model.config.positions, engine.model.config.depth), np.uint16)
    with pytest.raises(ConfigError, match=r"question 'red red .*tokens with its image; .*512"):
        engine.answer_questions(codes, ["red?", LONG])
    with pytest.raises(ConfigError, match=r"prompt 'red red .*tokens with its image; .*512"):
        engine.generate_images(["red", LONG], Sampling())
    with pytest.raises(ConfigError, match=r"prompt 'red red .*512"):
        engine.generate_images(["red"], Sampling(negative_prompt=LONG))
    with pytest.raises(ConfigError, match="prompt '': no text"):
        engine.generate_images(["red", ""], Sampling())


def test_a_python_without_the_dependencies_is_told_to_activate_the_environment():
    """-S leaves the installed packages out, as a Python beside the environment does."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "pipelines.init", "unifork"],
        cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {sys.executable}: this Python lacks numpy, pyarrow")
    assert line.endswith("activate .venv (or: make .venv/.installed)")


def test_use_without_a_name_lists_the_experiments(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    code, out, _ = run(capsys, monkeypatch, "use")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert sorted(names) == sorted(path.stem for path in Path("experiments").glob("*.yaml"))
    assert "The demo: a small world" in out


@pytest.mark.slow
def test_a_program_reads_nothing_before_it_runs(tmp_path):
    """In a job the working directory is the shipped code until the program has begun."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    programs = "import pipelines.text_tokenizer, pipelines.init"
    subprocess.run([sys.executable, "-c", programs], cwd=tmp_path, env=environment, check=True)


@pytest.mark.slow  # starts whole programs
def test_init_writes_the_model_that_was_there_before(tiny_root, tmp_path):
    root = copy_of(tiny_root, tmp_path / "root")
    shutil.rmtree(root / "models/unifork-init")
    (root / "models/unifork-init").mkdir()  # what is left of an earlier one does not stand in the way
    out = run_program(root, ("pipelines.init", "unifork"))
    assert out.startswith("unifork: shared*1 task*1 norm:task, 0.18 M parameters -> models/unifork-init")
    before, after = bytes_of(tiny_root / "models/unifork-init"), bytes_of(root / "models/unifork-init")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"config.json"}  # which now knows special tokens


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\n", r"x\.yaml, line 3, column 1: not valid YAML: expected ',' or '\]'"),
        ("a: b: c\n", r"x\.yaml, line 1, column 5: not valid YAML: mapping values are not allowed here"),
        ("a: \x00", r"x\.yaml: not valid YAML: .*special characters"),
    ],
)
def test_a_fault_in_yaml_is_one_line(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(tmp_path / "x.yaml")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "file", "key", "value", "message"),
    [
        (EvalCard, CARD, "items.rows", "many", "items.rows: 'many' is a str, allowed: whole number"),
        (EvalCard, CARD, "items.rows", 1.5, "items.rows: 1.5 is a float, allowed: whole number"),
        (EvalCard, CARD, "items.revision", 1.2, "items.revision: 1.2 is a float, allowed: text in quotes"),
        (EvalCard, CARD, "items.revision", date(2023, 7, 12),
         "items.revision: datetime.date(2023, 7, 12) is a date, allowed: text in quotes"),
        (EvalCard, CARD, "items", None, "items: is empty, allowed: keys and values"),
        (EvalCard, CARD, "score.rules", "official", "score.rules: 'official' is a str, allowed: list"),
        (EvalCard, CARD, "score.rules", [1], "score.rules.0: 1 is an int, allowed: text in quotes"),
        (EvalCard, CARD, "items.options", [], "items.options: [] is a list, allowed: keys and values"),
        (EvalCard, CARD, "answer.max_new_tokens", 0, "answer.max_new_tokens: Input should be greater than 0 (got 0)"),
        (Experiment, "params.yaml", "stages.s3.context", "long",
         "stages.s3.context: 'long' is a str, allowed: whole number"),
        (Experiment, "params.yaml", "image_tokenizer.image_size", "big",
         "image_tokenizer.(trained).image_size: 'big' is a str, allowed: whole number"),
        (Cluster, "clusters/local.yaml", "train.workers", "all",
         "train.workers: 'all' is a str, allowed: whole number or list"),
        (Cluster, "clusters/local.yaml", "train.workers", [0, 2],
         "train.workers.0: Input should be greater than 0 (got 0)"),
        (Cluster, "clusters/local.yaml", "jobs.encode", 2, "jobs.encode: 2 is an int, allowed: keys and values"),
        (Cluster, "clusters/local.yaml", "jobs.encode.gpus", "one",
         "jobs.encode.gpus: 'one' is a str, allowed: number"),
        (Cluster, "clusters/local.yaml", "allow_unprotected", "perhaps",
         "allow_unprotected: 'perhaps' is a str, allowed: true or false"),
        (Cluster, "clusters/local.yaml", "name", ..., "name: Field required"),
    ],
)  # fmt: skip
def test_an_entry_of_another_type_is_named_with_its_value_and_what_is_allowed(
    tmp_path, model, file, key, value, message
):
    plain = read_yaml(REPOSITORY / file)
    *above, last = key.split(".")
    inside = plain
    for name in above:
        inside = inside[name]
    inside[last] = value
    if value is ...:
        del inside[last]
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError) as error:
        load(model, path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize("command", ["use", "generate", "describe", "plan", "publish", "verify"])
def test_help_shows_an_example(command):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert f"Example: unifork {command}" in result.output

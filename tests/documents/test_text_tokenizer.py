"""Tokenizer directories as they come from the Hub, against transformers; and what cannot be used."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from tiny import write_experiment

from unifork.config import Experiment, TextTokenizerImport, load
from unifork.documents.prompts import Piece
from unifork.documents.text_tokenizer import FILES, TextTokenizer, import_text_tokenizer, train_text_tokenizer
from unifork.errors import CheckpointError, DataError
from unifork.vocabulary import DROPPED_PROMPT, PAD, TURN_END, TURN_START

OFFICIAL = Path(__file__).parent.parent / "fixtures" / "official_tiny"

SAMPLE = [
    "a photo of a red circle",
    "def f(x):\n\treturn {k: v for k, v in x.items() if v[[0]] != '\\n'}\n\n\n# done",
    "紅い丸と青い四角。 这是一张照片。 사진",
    "👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 🇫🇷 done",
    "  leading,   inner\t\ttabs \r\n\r\n  and trailing   ",
    "I'm 12345 we'll  DON'T 3.14e-10 №½²",
    "e\u0301a\u0308 \ufb01 \u1e9b\u0323 \u212b",  # NFC: composed, ligature kept, angstrom sign replaced
    "<b>bold</b> [red]x[/red] &amp; <img src=x> <|not a token|> <|im_end",
    "مرحبا שלום Здравствуй नमस्ते สวัสดี",
    "\x00\x1b[31m\u200b\ufeff\U0010ffff",
    "",
]


@pytest.fixture(params=["tokenizer.json", "vocab.json"])
def directory(request, qwen_directory) -> Path:
    return qwen_directory if request.param == "tokenizer.json" else OFFICIAL / "tokenizer"


def test_text_gives_the_ids_that_transformers_gives(directory):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(directory), TextTokenizer(directory)
    for text in SAMPLE:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text
    control = f"{TURN_START}USER: {SAMPLE[1]} ASSISTANT: {SAMPLE[3]}{TURN_END}USER: {DROPPED_PROMPT}{PAD}\n{SAMPLE[2]}"
    ids = ours.encode_pieces([Piece(control, control=True)])[0].tolist()
    assert ids == theirs.encode(control, add_special_tokens=False)
    for token in (TURN_START, TURN_END, PAD, DROPPED_PROMPT):
        assert ours.id_of(token) == theirs.convert_tokens_to_ids(token)
        assert ids.count(ours.id_of(token)) == control.count(token)
    assert ours.vocab_size == len(theirs)
    assert all(ours.decode(ours.encode(text)) == text for text in SAMPLE if text not in (SAMPLE[6],))


def test_names_of_special_tokens_in_a_text_are_letters(directory):
    ours = TextTokenizer(directory)
    for name in ours._added.values():
        ids = ours.encode(f"a {name} b")
        assert not any(ours.control_token(number) for number in ids)
        assert ours.decode(ids) == f"a {name} b"
    for theirs in (" <|im_end|>", "<|im_", "end|><|im_start|>"):
        pieces = [Piece("<|im_start|>x <|im_", control=True), Piece(theirs)]
        ids = ours.encode_pieces(pieces)[0].tolist()
        assert [number for number in ids if ours.control_token(number)] == [ours.id_of(TURN_START)]


def test_qwens_ids_are_those_of_the_published_model(qwen_directory):
    ours = TextTokenizer(qwen_directory)
    assert ours.encode("Hello world") == [9707, 1879]
    assert (ours.id_of(TURN_START), ours.id_of(TURN_END)) == (151644, 151645)
    assert ours.vocab_size == 151657
    assert list(ours.special_tokens.values()) == list(range(151643, 151657))


def test_the_official_batch_is_padded_with_the_token_named_pad():
    ours = TextTokenizer(OFFICIAL / "tokenizer")
    texts = json.loads((OFFICIAL / "05_generate.json").read_text())["notes"]["texts"]
    with safe_open(OFFICIAL / "05_generate.safetensors", framework="np") as file:
        expected = file.get_tensor("input_ids").tolist()
    rows = [ours.encode_pieces([Piece(text, control=True)])[0].tolist() for text in texts]
    assert [[ours.id_of(PAD)] * (len(expected[0]) - len(row)) + row for row in rows] == expected


@pytest.mark.parametrize("slow", [False, True])
def test_the_stage_takes_a_directory_as_data_without_any_network(slow, qwen_directory, tmp_path, monkeypatch):
    import socket

    from pipelines import text_tokenizer

    source = OFFICIAL / "tokenizer" if slow else qwen_directory
    write_experiment(tmp_path, {"text_tokenizer": {"import": str(source)}})
    assert isinstance(load(Experiment, tmp_path / "params.yaml").text_tokenizer, TextTokenizerImport)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network was asked for"))
    text_tokenizer.main("")
    folder = tmp_path / "tokenizers/text"
    assert TextTokenizer(folder).identity == TextTokenizer(source).identity
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in source.iterdir())


def test_the_stage_takes_the_tokenizer_files_of_a_repository_alone(tmp_path, monkeypatch):
    import huggingface_hub

    from pipelines import text_tokenizer

    request = {}

    def snapshot(name, **options):
        request.update(options, name=name)
        return str(OFFICIAL / "tokenizer")

    write_experiment(tmp_path, {"text_tokenizer": {"import": "Qwen/Qwen2.5-0.5B@060db64"}})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    text_tokenizer.main("")
    assert request == {"name": "Qwen/Qwen2.5-0.5B", "revision": "060db64", "allow_patterns": list(FILES)}

    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError("offline"))
    )
    with pytest.raises(CheckpointError, match=r"no such folder .* the Hub did not give Qwen/Qwen2.5-0.5B: .*offline"):
        text_tokenizer.main("")


def with_config(directory: Path, change) -> None:
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: [p.unlink() for p in d.iterdir()], r"neither tokenizer.json nor vocab.json, merges.txt"),
        (lambda d: (d / "merges.txt").unlink(), r"neither tokenizer.json nor merges.txt"),
        (lambda d: (d / "vocab.json").write_text("{"), r"not a Qwen2 tokenizer"),
        (lambda d: (d / "tokenizer.json").write_text("{}"), r"tokenizer.json: not a tokenizer"),
        (
            lambda d: with_config(d, lambda c: c["added_tokens_decoder"].pop("486")),
            r"'<\|object_ref_start\|>' .* id 487",
        ),
        (lambda d: with_config(d, lambda c: c.pop("added_tokens_decoder")), r"KeyError: 'added_tokens_decoder'"),
        (lambda d: with_config(d, lambda c: c.update(tokenizer_class="GPT2Tokenizer")), r"'GPT2Tokenizer'; known"),
        (
            lambda d: with_config(d, lambda c: c["added_tokens_decoder"]["497"].update(content="<|video|>")),
            r"no special token <\|video_pad\|> among its 22 added tokens",
        ),
    ],
)
def test_a_directory_that_cannot_be_used_is_one_clear_error(damage, message, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(OFFICIAL / "tokenizer", source)
    damage(source)
    with pytest.raises(DataError, match=message) as caught:
        import_text_tokenizer(source, tmp_path / "text")
    assert str(source) in str(caught.value)
    assert not (tmp_path / "text").exists()


def test_the_demos_own_tokenizer_is_as_before(tmp_path):
    trained = train_text_tokenizer(["a photo of two circles"] * 9, 400, tmp_path)
    assert TextTokenizer(tmp_path).identity == trained.identity
    assert len(trained.special_tokens) == 22

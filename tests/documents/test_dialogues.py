"""Dialogues of LLaVA and InternVL rows: what exactly is supervised of each, or why it is refused."""

import pytest

from unifork.batch import IMAGE, TEXT
from unifork.documents.mixture import skeleton
from unifork.documents.prompts import SYSTEM, TEMPLATES, written
from unifork.documents.text_tokenizer import TextTokenizer
from unifork.errors import Rejected
from unifork.shards.schema import turns_of

END = "<|im_end|>"
S = f"<|im_start|>{SYSTEM}"
Q, A = ("human", "Is it red?"), ("gpt", "No.")
SEEN = ("human", "<image>\nIs it red?")


@pytest.fixture(scope="module")
def tokenizer(qwen_directory) -> TextTokenizer:
    return TextTokenizer(qwen_directory)


def read(row, template, tokenizer):
    """(the whole sample, what is supervised of it), the image as <image>."""
    form = TEMPLATES[template]
    images = row["image"] if isinstance(row["image"], list) else [row["image"]] if row["image"] else []
    doc = skeleton(written(form, turns_of(row), len(images)), tokenizer, 1, form.border)

    def text(keep):
        parts = []
        for kind, number, kept in zip(doc.kinds_T, doc.text_ids_T, keep, strict=True):
            if kept and kind == IMAGE:
                parts.append("<image>")
            elif kept and kind == TEXT:
                parts.append(tokenizer.control_token(int(number)) or tokenizer.decode([int(number)]))
        return "".join(parts)

    return text([True] * len(doc.kinds_T)), text(doc.loss_mask_T)


def row(*turns, image="a.jpg"):
    return {"image": image, "conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.mark.parametrize(
    ("template", "given", "whole", "supervised"),
    [
        # one turn, several turns
        ("answer", row(SEEN, A), f"{S} USER: <image>\nIs it red? ASSISTANT: No.{END}", f" No.{END}"),
        (
            "answer",
            row(SEEN, A, ("human", "Why?"), ("gpt", "Look.\nIt is blue.")),
            f"{S} USER: <image>\nIs it red? ASSISTANT: No.{END}USER: Why? ASSISTANT: Look.\nIt is blue.{END}",
            f" No.{END} Look.\nIt is blue.{END}",
        ),
        # the image stands at the start of the turn that has its marker
        (
            "answer",
            row(("human", "Is it red?\n<image>"), A),
            f"{S} USER: <image>\nIs it red? ASSISTANT: No.{END}",
            f" No.{END}",
        ),
        (
            "answer",
            row(("human", "Is <image> red?"), A),
            f"{S} USER: <image>\nIs  red? ASSISTANT: No.{END}",
            f" No.{END}",
        ),
        (
            "answer",
            row(("human", "Hello."), ("gpt", "Hi."), SEEN, A),
            f"{S} USER: Hello. ASSISTANT: Hi.{END}USER: <image>\nIs it red? ASSISTANT: No.{END}",
            f" Hi.{END} No.{END}",
        ),
        ("answer", row(("human", "<image>"), A), f"{S} USER: <image> ASSISTANT: No.{END}", f" No.{END}"),
        # no marker, one image: in front of the first question
        ("answer", row(Q, A), f"{S} USER: <image>\nIs it red? ASSISTANT: No.{END}", f" No.{END}"),
        ("answer", row(Q, A, image=["a.jpg"]), f"{S} USER: <image>\nIs it red? ASSISTANT: No.{END}", f" No.{END}"),
        # text alone: image absent, empty string or empty list
        ("answer", row(Q, A, image=None), f"{S} USER: Is it red? ASSISTANT: No.{END}", f" No.{END}"),
        ("answer", row(Q, A, image=""), f"{S} USER: Is it red? ASSISTANT: No.{END}", f" No.{END}"),
        ("answer-plain", row(Q, A, image=[]), f"Is it red?No.{END}", f"No.{END}"),
        # several images stand where their markers are
        (
            "answer",
            row(("human", " Is <image> as <image>?"), A, ("human", "Or <image>\n<image>?"), A, Q, A, image=[*"abcd"]),
            f"{S} USER: Is <image> as <image>? ASSISTANT: No.{END}USER: Or <image>\n<image>? ASSISTANT: No.{END}"
            f"USER: Is it red? ASSISTANT: No.{END}",
            f" No.{END} No.{END} No.{END}",
        ),
        (
            "answer-plain",
            row(("human", "<image><image>"), A, Q, A, image=["a", "b"]),
            f"<image><image>No.{END}",
            f"No.{END}",
        ),
        # a system turn of the dialogue's own
        (
            "answer",
            row(("system", "Be short."), SEEN, A),
            f"<|im_start|>Be short. USER: <image>\nIs it red? ASSISTANT: No.{END}",
            f" No.{END}",
        ),
        ("answer", row(("system", " "), SEEN, A), f"{S} USER: <image>\nIs it red? ASSISTANT: No.{END}", f" No.{END}"),
        # pretraining: the first exchange alone, or all
        ("answer-plain", row(SEEN, A, Q, A), f"<image>\nIs it red?No.{END}", f"No.{END}"),
        ("answers-plain", row(SEEN, A, Q, A), f"<image>\nIs it red?No.{END}Is it red?No.{END}", f"No.{END}No.{END}"),
        # role words and control tokens inside a text are text: supervised or not with the turn they are in
        (
            "answer",
            row(("human", "Say USER: a ASSISTANT: b<|im_end|>"), ("gpt", "USER: a ASSISTANT: b<|im_end|>"), Q, A),
            f"{S} USER: <image>\nSay USER: a ASSISTANT: b<|im_end|> ASSISTANT: USER: a ASSISTANT: b<|im_end|>{END}"
            f"USER: Is it red? ASSISTANT: No.{END}",
            f" USER: a ASSISTANT: b<|im_end|>{END} No.{END}",
        ),
        # the official way learns nothing of such a sample
        (
            "official-answer",
            row(("human", "Say ASSISTANT: b"), A),
            f"{S} USER: <image>\nSay ASSISTANT: b ASSISTANT: No.{END}",
            "",
        ),
        # answers that begin with space, line break, sign, accent, apostrophe, digit
        *[
            (
                "answer",
                row(SEEN, ("gpt", reply)),
                f"{S} USER: <image>\nIs it red? ASSISTANT: {reply}{END}",
                f" {reply}{END}",
            )
            for reply in ("  no", "\n\nno", "(A)", "é", "'s", "1")
        ],
    ],
)  # fmt: skip
def test_what_is_supervised(tokenizer, template, given, whole, supervised):
    assert read(given, template, tokenizer) == (whole, supervised)


@pytest.mark.parametrize(
    ("template", "given", "reason"),
    [
        ("answer", row(A, SEEN), "roles are ['assistant', 'user'], not user and assistant in turn"),
        ("answer", row(SEEN), "roles are ['user'], not user and assistant in turn"),
        ("answer", row(SEEN, A, Q), "roles are ['user', 'assistant', 'user'], not user and assistant in turn"),
        ("answer", row(SEEN, Q, A, A), "roles are ['user', 'user', 'assistant', 'assistant'], not"),
        ("answer", row(("system", "Be short.")), "roles are [], not user and assistant in turn"),
        ("answer", row(SEEN, A, ("system", "x"), A), "roles are ['user', 'assistant', 'system', 'assistant'], not"),
        ("answer", row(), "no text"),
        ("answer", row(SEEN, ("tool", "x")), "unknown role 'tool'; known are user, human, assistant, gpt, system"),
        ("answer", row(SEEN, ("gpt", "")), "answer 1 is empty"),
        ("answer", row(SEEN, A, Q, ("gpt", " \n")), "answer 2 is empty"),
        ("answer", row(SEEN, ("gpt", None)), "answer 1 is empty"),
        ("answer", row(SEEN, A, ("human", " "), A), "question 2 is empty"),
        ("answer", row(("human", ""), A, image=None), "question 1 is empty"),
        ("answer", row(SEEN, A, SEEN, A), "image markers: 2, images: 1"),
        ("answer", row(("human", "<image> and <image>?"), A), "image markers: 2, images: 1"),
        ("answer", row(SEEN, A, image=None), "image markers: 1, images: 0"),
        ("answer", row(SEEN, ("gpt", "See <image>.")), "an image marker inside an answer"),
        ("answer", row(Q, ("gpt", "<image>")), "an image marker inside an answer"),
        ("answer", row(("system", "<image>"), Q, A), "an image marker inside the system turn"),
        ("answer", row(SEEN, A, image=["a.jpg", "b.jpg"]), "image markers: 1, images: 2"),
        ("answer", row(Q, A, image=["a.jpg", "b.jpg"]), "image markers: 0, images: 2"),
        ("answer", row(SEEN, A, SEEN, A, SEEN, A, image=["a.jpg", "b.jpg"]), "image markers: 3, images: 2"),
        ("answer", row(("human", "<image><image>"), A, ("human", " "), A, image=["a", "b"]), "question 2 is empty"),
        ("answer", {"image": "a.jpg"}, "conversations is not a list of turns"),
        ("answer", {"image": "a.jpg", "conversations": ["x"]}, "conversations is not a list of turns"),
        ("answer-plain", row(Q, A, SEEN, A), "the image belongs to a later question, the template writes only the"),
        (
            "answer-plain",
            row(SEEN, A, SEEN, A, image=["a", "b"]),
            "the image belongs to a later question, the template",
        ),
        ("answer-plain", row(("system", "Be short."), SEEN, A), "a system turn, the template has no place for it"),
    ],
)
def test_what_is_refused(tokenizer, template, given, reason):
    with pytest.raises(Rejected) as caught:
        read(given, template, tokenizer)
    assert str(caught.value).startswith(reason)


def test_several_images_of_a_shard_are_refused():
    turns = [{"role": "user", "text": "Which?"}, {"role": "assistant", "text": "The left."}]
    with pytest.raises(Rejected, match="image markers: 0, images: 2"):
        written(TEMPLATES["answer"], turns, images=2)
    with pytest.raises(Rejected, match="images: 2, the template has a place for 1") as caught:
        written(TEMPLATES["generate"], "two cats", images=2)
    assert caught.value.reason == "several_images"
    with pytest.raises(Rejected, match="images: 0, the template has a place for 1"):
        written(TEMPLATES["generate"], "a cat", images=0)

"""Templates: what a sample reads like, what is learned, and what is refused."""

import pytest

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT
from unifork.data.documents import skeleton
from unifork.data.prompts import TEMPLATES, UNCONDITIONAL, Unusable, question, segments, written
from unifork.data.text_tokenizer import TextTokenizer, train_text_tokenizer
from unifork.vocabulary import SPECIAL_TOKENS, TURN_END

DIALOGUE = [
    {"role": "user", "text": "How many circles are there?"},
    {"role": "assistant", "text": "two"},
    {"role": "user", "text": "Is there a red circle?"},
    {"role": "assistant", "text": "yes"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    texts = ["a photo of two circles", "How many circles are there? two yes no", "USER: ASSISTANT: caption"] * 20
    return train_text_tokenizer(texts, 420, tmp_path_factory.mktemp("text"))


def learned_text(tokenizer, marked):
    made = skeleton(marked, tokenizer, 4)
    ids = made.text_ids_T[made.learned_T]
    return tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_a_caption_to_draw_has_no_learned_text(tokenizer):
    made = skeleton(written(TEMPLATES["generate"], "a red circle"), tokenizer, 9)
    assert not made.learned_T.any()
    assert made.kinds_T[-11:].tolist() == [BEGIN_IMAGE, *[IMAGE] * 9, END_IMAGE]
    assert (made.kinds_T[:-11] == TEXT).all()


def test_answers_and_their_ends_are_learned_and_nothing_else(tokenizer):
    assert learned_text(tokenizer, written(TEMPLATES["answer"], DIALOGUE)) == f" two{TURN_END} yes{TURN_END}"
    assert learned_text(tokenizer, written(TEMPLATES["answer-plain"], DIALOGUE)) == f"two{TURN_END}"
    assert learned_text(tokenizer, written(TEMPLATES["caption-plain"], "two circles")) == f"two circles{TURN_END}"


def test_the_picture_stands_once_in_front_of_the_first_question():
    marked = written(TEMPLATES["answer"], DIALOGUE)
    assert marked.count("<image>") == 1
    assert marked.index("<image>") < marked.index("How many")


def test_a_question_is_what_training_shows_before_the_learned_part():
    marked = written(TEMPLATES["answer"], DIALOGUE[:2])
    assert marked.startswith(question(TEMPLATES["answer"], DIALOGUE[0]["text"]))
    assert question(TEMPLATES["answer"], "Q?").endswith("ASSISTANT:")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("generate", "", "no text"),
        ("generate", None, "no text"),
        ("generate", DIALOGUE, "a caption is expected"),
        ("generate", "a <image> of nothing", "mark"),
        ("generate", f"stop{TURN_END}", "mark"),
        ("answer", DIALOGUE[1:], "roles"),
        ("answer", DIALOGUE[:3], "roles"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(name, value, reason):
    with pytest.raises(Unusable, match=reason):
        written(TEMPLATES[name], value)


def test_special_tokens_are_found_by_name_and_have_one_id(tokenizer):
    ids = [tokenizer.id_of(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert tokenizer.encode(TURN_END) == [tokenizer.id_of(TURN_END)]
    assert len(skeleton(UNCONDITIONAL, tokenizer, 4).kinds_T) > 6


def test_every_template_can_be_cut():
    for template in TEMPLATES.values():
        marked = written(template, "a caption" if template.text else DIALOGUE)
        assert len(segments(marked)) == 2
        assert any(part.learned for part in segments(marked)) == (template.task == "understanding")


def test_transformers_opens_the_directory_too(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    directory = tmp_path / "text"
    made = train_text_tokenizer(["a photo of two circles"] * 9, 400, directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    text = f"a photo of{TURN_END} two circles"
    assert theirs.encode(text, add_special_tokens=False) == made.encode(text)

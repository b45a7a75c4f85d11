"""Templates: what a sample reads like, what is supervised, and what is refused."""

import pytest

from unifork.batch import BEGIN_IMAGE, END_IMAGE, IMAGE, TEXT
from unifork.documents.mixture import skeleton
from unifork.documents.prompts import IMAGE_PIECE, TEMPLATES, UNCONDITIONAL, laid_out, question, written
from unifork.documents.text_tokenizer import TextTokenizer, train_text_tokenizer
from unifork.errors import Rejected
from unifork.vocabulary import DROPPED_PROMPT, SPECIAL_TOKENS, TURN_END

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


def supervised_text(tokenizer, pieces):
    doc = skeleton(pieces, tokenizer, 4)
    ids = doc.text_ids_T[doc.loss_mask_T]
    return tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def test_a_caption_to_draw_has_no_supervised_text(tokenizer):
    doc = skeleton(written(TEMPLATES["generate"], "a red circle"), tokenizer, 9)
    assert not doc.loss_mask_T.any()
    assert doc.kinds_T[-11:].tolist() == [BEGIN_IMAGE, *[IMAGE] * 9, END_IMAGE]
    assert (doc.kinds_T[:-11] == TEXT).all()


def test_answers_and_their_ends_are_supervised_and_nothing_else(tokenizer):
    assert supervised_text(tokenizer, written(TEMPLATES["answer"], DIALOGUE)) == f" two{TURN_END} yes{TURN_END}"
    assert supervised_text(tokenizer, written(TEMPLATES["answer-plain"], DIALOGUE)) == f"two{TURN_END}"
    assert supervised_text(tokenizer, written(TEMPLATES["caption-plain"], "two circles")) == f"two circles{TURN_END}"


def test_the_image_stands_once_in_front_of_the_first_question():
    pieces = written(TEMPLATES["answer"], DIALOGUE)
    assert pieces.count(IMAGE_PIECE) == 1
    assert [piece.text for piece in pieces[pieces.index(IMAGE_PIECE) :]][1:3] == ["\n", "How many circles are there?"]


def test_a_question_is_what_training_shows_before_the_supervised_part(tokenizer):
    for name in ("answer", "answer-plain", "caption"):
        form = TEMPLATES[name]
        shown = skeleton(written(form, "two" if form.text else DIALOGUE[:2]), tokenizer, 4)
        prompt = skeleton(question(form, DIALOGUE[0]["text"]), tokenizer, 4)
        given = int(shown.loss_mask_T.argmax())
        assert shown.text_ids_T[:given].tolist() == prompt.text_ids_T.tolist()
        assert shown.kinds_T[:given].tolist() == prompt.kinds_T.tolist()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("generate", "", "no text"),
        ("generate", None, "no text"),
        ("generate", DIALOGUE, "a caption is expected"),
        ("generate", "a <image> of nothing", "mark"),
        ("answer", "a red circle", "conversations are expected"),
        ("answer", DIALOGUE[1:], "roles"),
        ("answer", DIALOGUE[:3], "roles"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(name, value, reason):
    with pytest.raises(Rejected, match=reason):
        written(TEMPLATES[name], value)


def test_special_tokens_are_found_by_name_and_have_one_id(tokenizer):
    ids = [tokenizer.id_of(name) for name in SPECIAL_TOKENS]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    assert tokenizer.special_tokens == dict(zip(SPECIAL_TOKENS, ids, strict=True))
    assert skeleton(UNCONDITIONAL, tokenizer, 4).text_ids_T.tolist().count(tokenizer.id_of(DROPPED_PROMPT)) == 1


def test_every_template_can_be_tokenized(tokenizer):
    for template in TEMPLATES.values():
        images = 1 if template.images is None else template.images
        pieces = written(template, "a caption" if template.text else DIALOGUE, images)
        doc = skeleton(pieces, tokenizer, 4, template.border)
        assert (doc.kinds_T == IMAGE).sum() == 4 * images
        assert doc.loss_mask_T.any() == (template.task == "understanding")


FOREIGN = "{assistant} {caption} [[x]] <|im_end|><|im_start|>USER: <|video_pad|><|vision_pad|></tool_call>"


def test_whatever_people_write_stays_text(tokenizer):
    turns = [{"role": "user", "text": FOREIGN}, {"role": "assistant", "text": FOREIGN + "."}]
    for pieces, own in (
        (written(TEMPLATES["generate"], FOREIGN), ["<|im_start|>"]),
        (written(TEMPLATES["answer"], turns), ["<|im_start|>", "<|im_end|>"]),
        (question(TEMPLATES["answer"], FOREIGN), ["<|im_start|>"]),
    ):
        ids = skeleton(pieces, tokenizer, 1).text_ids_T.tolist()
        assert [name for number in ids if (name := tokenizer.control_token(number))] == own
        assert FOREIGN in tokenizer.decode(ids)
    assert supervised_text(tokenizer, written(TEMPLATES["answer"], turns)) == f" {FOREIGN}.{TURN_END}"


def test_a_token_across_the_border_of_an_answer(tmp_path):
    """Ours learns tokens of supervised letters alone; the official way counts tokens and is one off here."""
    ours = train_text_tokenizer([*["bc"] * 99, *["abcd"] * 50], 290, tmp_path)
    turns = [{"role": "user", "text": "ab"}, {"role": "assistant", "text": "cd x"}]
    assert [len(ours.encode(text)) for text in ("ab", "abcd", " x")] == [2, 1, 2]
    supervised = {}
    for name in ("answer-plain", "official-answer-plain"):
        template = TEMPLATES[name]
        doc = skeleton(written(template, turns), ours, 1, template.border)
        supervised[name] = ours._tokenizer.decode(doc.text_ids_T[doc.loss_mask_T].tolist(), skip_special_tokens=False)
    assert supervised == {"answer-plain": f" x{TURN_END}", "official-answer-plain": f"x{TURN_END}"}


def test_transformers_opens_the_directory_too(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    directory = tmp_path / "text"
    ours = train_text_tokenizer(["a photo of two circles"] * 9, 400, directory)
    theirs = AutoTokenizer.from_pretrained(directory)
    pieces = laid_out(f"a photo of{TURN_END} two circles", {})
    theirs_ids = theirs.encode(pieces[0].text, add_special_tokens=False)
    assert theirs_ids == ours.encode_pieces(pieces)[0].tolist()

"""The words all parts of the project agree on: tasks, views, special tokens by name.

Special tokens are Qwen2.5's and are looked up by name in whatever tokenizer is in use; no id is
written anywhere in the project.
"""

from typing import Literal, get_args

VOCABULARY_VERSION = 1
"""Raise when a view, a special token or the type of codes changes: codes, documents and models are then made anew.

Constants like this one stand beside the code they cover (`tests/versions.py` says which files) and are part of the
fingerprints of what it makes; DVC reads them as parameters of the stages that run it."""

Task = Literal["understanding", "generation"]
TASKS: tuple[Task, ...] = get_args(Task)
"""The order is fixed: it is the branch number of a task route, and the layout of packed rows."""

View = Literal["crop", "pad"]
VIEWS: tuple[View, ...] = get_args(View)

VIEW_OF_TASK: dict[Task, View] = {"understanding": "pad", "generation": "crop"}
"""Generation reads center crops, understanding reads padded images (official code, data_utils)."""

Modality = Literal["text", "image"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|vision_pad|>"
DROPPED_PROMPT = "<|video_pad|>"
"""Stands for the prompt in the documents that teach unconditional generation."""

SPECIAL_TOKENS: tuple[str, ...] = (
    "<|endoftext|>", TURN_START, TURN_END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", PAD, "<|image_pad|>", DROPPED_PROMPT,
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
"""Qwen2.5's special tokens, in the order of their ids."""

CODE_DTYPE = "<u2"
"""Codes on disk: little-endian unsigned 16-bit integers."""

ROW_GROUP = 256
"""Rows per row group of a shard: the unit of a local read in training, and part of the order of documents."""

MORE_IMAGES = "more_images"
"""Column of the images after a row's first, where a card keeps rows of several; measured, with what they measure."""

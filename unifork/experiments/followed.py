"""The files that a card names, as DVC follows them: one path for each of a stage's dependencies."""

import os
import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import PurePosixPath

from unifork.config import Card, Followed
from unifork.errors import ConfigError
from unifork.filters.rules import DuplicateOptions, rules_of
from unifork.sources import check_installed, source_of

ELSEWHERE = re.compile(r"[~$]")
"""In a path that only this machine knows: what it stands for is written into no file."""
WILD = re.compile(r"[*?\[]")


def followed(card: Card, place: str) -> Followed:
    """What the stages of a data set depend on beside its card, which is `place`.

    Raises ConfigError for a source or rule with wrong options, for a source that needs what is not installed, and
    where files lie too far apart.
    """
    check_installed(card)
    source, options = source_of(card)
    rules = rules_of(card)
    lists = [getattr(chosen, name) for rule, chosen in rules for name in rule.paths]
    files = [getattr(options, name) for name in source.paths]
    compared = any(isinstance(chosen, DuplicateOptions) and chosen.against for _, chosen in rules)
    return Followed(
        source=_folder(filter(None, files), f"{place}: source") or place,
        lists=_folder(lists, f"{place}: filters") or place,
        others="data/raw" if compared else place,
    )


def _folder(texts: Iterable[str], place: str) -> str:
    """The one file or the smallest folder that holds all that is named; nothing for none that can be followed."""
    parts = [PurePosixPath(text).parts for text in texts if not ELSEWHERE.search(text)]
    fixed = [str(PurePosixPath(*takewhile(lambda part: not WILD.search(part), path))) for path in parts]
    if not fixed:
        return ""
    try:
        common = os.path.commonpath(fixed)
    except ValueError:  # absolute and relative ones
        common = ""
    if common in ("", ".", "/"):
        raise ConfigError(f"{place}: {', '.join(fixed)}: DVC follows one folder; put what the card names below one")
    return common

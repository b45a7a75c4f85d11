"""What makers of pictures ask of programs: robots.txt (RFC 9309) and the headers of an answer.

Own parser: the standard library's knows neither `*` nor `$` in paths, with which lists of pictures are denied.
"""

from collections.abc import Iterable
from typing import NamedTuple

RESERVED = frozenset({"noai", "noimageai", "noindex", "noimageindex", "none"})
"""Directives of X-Robots-Tag that reserve a picture: against training, or against copies in an index."""
WITH_VALUE = frozenset({"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"})
"""Directives of X-Robots-Tag that hold a colon themselves."""
MAX_ROBOTS_BYTES = 512 * 1024
"""RFC 9309 asks to read at least 500 KiB."""


class Rule(NamedTuple):
    """One line `Allow` or `Disallow`."""

    allow: bool
    path: str


def parse_robots(text: str, agent: str) -> list[Rule]:
    """The rules of a robots.txt for an agent (lower-case name): those of its groups, else those of `*`."""
    groups: dict[str, list[Rule]] = {}
    names: list[str] = []
    in_names = False
    for line in text.splitlines():
        field, _, value = line.partition("#")[0].partition(":")
        field, value = field.strip().lower(), value.strip()
        if field == "user-agent":
            names = [*names, value.lower()] if in_names else [value.lower()]
            in_names = True
            groups.setdefault(value.lower(), [])
        elif field in ("allow", "disallow"):
            in_names = False
            if value:
                for name in names:
                    groups[name].append(Rule(field == "allow", value))
    return groups.get(agent, groups.get("*", []))


def may_fetch(rules: Iterable[Rule], path: str) -> bool:
    """Whether rules allow a path with its query: the longest matching rule decides, `Allow` at equal length."""
    matching = [(len(rule.path), rule.allow) for rule in rules if _matches(rule.path, path)]
    return max(matching)[1] if matching else True


def _matches(pattern: str, path: str) -> bool:
    """Without regular expressions, whose cost a hostile pattern could make exponential."""
    first, *parts = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    end, position = pattern.endswith("$"), len(first)
    if not parts:
        return not end or position == len(path)
    for part in parts[:-1]:
        found = path.find(part, position)
        if found < 0:
            return False
        position = found + len(part)
    if end:
        return path.endswith(parts[-1]) and len(path) - len(parts[-1]) >= position
    return parts[-1] in path[position:]


def reservation(headers: Iterable[tuple[str, str]], agent: str) -> str | None:
    """The header by which an answer reserves its content for this agent (lower-case name); None without one."""
    for name, value in headers:
        if name.lower() == "tdm-reservation" and value.strip() == "1":
            return f"{name}: {value}"
        if name.lower() != "x-robots-tag":
            continue
        addressed = agent
        for part in value.lower().split(","):
            who, colon, directive = part.partition(":")
            if colon and who.strip() in WITH_VALUE:
                continue
            if colon:  # `name: directive` addresses it and what follows to one agent
                addressed = who.strip()
            if addressed in (agent, "*") and (directive if colon else who).strip() in RESERVED:
                return f"{name}: {value}"
    return None

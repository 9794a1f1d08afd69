"""Names of parameters: which ones a pattern means, and what was meant if there are none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Final

_SHOWN: Final = 3
"""Names that a message lists."""


def fits(name: str, pattern: str) -> bool:
    """Returns whether a pattern means a name: all of it, or its beginning up to a dot."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def near_misses(pattern: str, names: Sequence[str]) -> str:
    """Returns what to say of a pattern that means none of the names.

    Patterns that differ from it in few parts, and mean some; else names that are alike; else the
    first of all names.
    """
    mended = _mended(pattern, names)
    tried = [*mended, *(f"*.{other}" for other in mended if not other.startswith("*"))]
    meant = [other for other in tried if any(fits(name, other) for name in names)]
    if not meant:
        plain = pattern.replace("*", "").strip(".")
        meant = get_close_matches(plain, [*names, *_beginnings(names)], _SHOWN)
    if meant:
        return f"Did you mean {' or '.join(map(repr, meant))}?"
    return f"The parameters have names such as {', '.join(map(repr, names[:_SHOWN]))}."


def _mended(pattern: str, names: Iterable[str]) -> list[str]:
    """Returns the pattern with its unknown parts replaced by known ones that are alike."""
    known = sorted({part for name in names for part in name.split(".")})
    mended: list[list[str]] = [[]]
    for part in pattern.split("."):
        plain = part.strip("*")
        if not plain or any(fnmatchcase(other, part) for other in known):
            parts = [part]
        else:
            parts = [
                part.replace(plain, other) for other in get_close_matches(plain, known, _SHOWN)
            ]
        mended = [[*before, each] for before in mended for each in parts]
    return [".".join(parts) for parts in mended][:_SHOWN]


def _beginnings(names: Iterable[str]) -> list[str]:
    """Returns the names of the modules that the parameters are in, each once."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(".".join(parts[:length]) for length in range(1, len(parts)))
    return list(found)

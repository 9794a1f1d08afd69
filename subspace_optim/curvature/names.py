"""Which parameters are meant: by their names, patterns of these, or themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import Tensor, nn

from subspace_optim._validation import ArgumentError

Params = Iterable[Tensor | str] | str | Callable[[str, Tensor], bool] | None
"""Which parameters: tensors, patterns of names, a predicate of (name, tensor), or all."""
_SHOWN: Final = 3
"""Names that a message lists."""


def chosen(
    params: Params, named: Sequence[tuple[str, Tensor]], label: str = "params"
) -> tuple[list[Any], str]:
    """Returns the parameters that are meant, and what to say where they cannot be used.

    Args:
        params: which ones.
        named: that there are, each with its name.
        label: of the argument, for messages.

    Raises:
        ArgumentError: a pattern means none of them, or it is a module.
    """
    names = [name for name, _ in named]
    if params is None:
        remedy = "The model has no parameter that requires a gradient."
        return [p for _, p in named if p.requires_grad], remedy
    if isinstance(params, nn.Module):
        allowed = "tensors, patterns of names, or a predicate of (name, tensor)"
        remedy = "Pass what its `parameters()` returns."
        raise ArgumentError(label, type(params).__name__, allowed, remedy)
    if callable(params):
        some = ", ".join(map(repr, names[:3]))
        remedy = f"It is called with the name and the tensor of each, with names such as {some}."
        return [p for name, p in named if params(name, p)], remedy
    found: dict[int, Any] = {}
    for index, item in enumerate([params] if isinstance(params, Tensor | str) else params):
        if not isinstance(item, str):
            found[-index - 1] = item  # not by identity: one that is listed twice is an error
            continue
        meant = {id(p): p for name, p in named if fits(name, item)}
        if not meant:
            allowed = "a pattern of at least one parameter's name"
            raise ArgumentError(label, item, allowed, near_misses(item, names))
        found |= meant
    return list(found.values()), "Leave `params` out for all that require a gradient."


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

"""How objects show themselves: a few facts in a line, and in a notebook as a small table.

Only what is known already is shown: nothing is computed, and no device is waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

import torch
from torch import Tensor

_SHOWN: Final = 6
"""Numbers of a list that are shown; the last one is among them."""


class Shown:
    """Something that shows facts of itself, under their names."""

    def _facts(self) -> Mapping[str, str]:
        """Returns what is known: names and texts."""
        return {}

    def __repr__(self) -> str:
        try:
            facts = ", ".join(f"{name}={text}" for name, text in self._facts().items())
        except AttributeError:  # of an object whose constructor has raised, as a debugger shows it
            return super().__repr__()
        return f"{type(self).__name__}({facts})"

    def _repr_html_(self) -> str:
        return html_facts(type(self).__name__, self._facts())


def number(value: Any) -> str:
    """Returns a short text: of a count all digits, else four."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def numbers(values: Tensor | Sequence[float]) -> str:
    """Returns a list in short; where a device would have to be waited for, where it is."""
    if isinstance(values, Tensor):
        if _busy(values.device):
            return f"{len(values)} on {values.device}"
        values = values.tolist()
    shown = [number(value) for value in values]
    if len(shown) > _SHOWN:
        shown[_SHOWN - 1 : -1] = ["…"]
    return f"[{', '.join(shown)}]"


def _busy(device: torch.device) -> bool:
    """Returns whether to read from a device would wait for work that is queued there."""
    return device.type == "cuda" and not torch.cuda.current_stream(device).query()


def html_facts(title: str, facts: Mapping[str, str]) -> str:
    """Returns a table of facts, in the colours of the page that it is shown on."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th>'
        f'<td style="text-align: left">{escape(text)}</td></tr>'
        for name, text in facts.items()
    )
    return f"<div><strong>{escape(title)}</strong><table><tbody>{rows}</tbody></table></div>"


def html_rows(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns a table of rows; a wide one scrolls."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(number(row[column]))}</td>" for column in columns) + "</tr>"
        for row in rows
    )
    return (
        '<div style="overflow-x: auto"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )

"""Tables as ``exhibits.toml`` tells them: a row for each run, or for each of several quantities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.papers.panels import filled
from benchmarks.papers.reductions import mean_of
from benchmarks.papers.reproduction import Raw, RawOfSeeds, Rows


@dataclass(frozen=True)
class Cell:
    """What stands in a cell.

    Attributes:
        value: of each seed; ``None``: there is the text alone.
        show: how values are told: ``range``, their mean, and the smallest and largest where they
            differ, with so many digits (default: 3); ``mean``, ``each`` or ``first`` in a format;
            or ``share``, of how many it holds.
        text: what stands there instead; ``{run}`` is the title of the run, ``{name}`` its name.
        head: of the column.
        quantity: what it is, where it has a row of its own ...
        paper: ... and what the paper has.
    """

    value: Callable[[Raw], Any] | None = None
    show: str = "range"
    text: str = ""
    head: str = ""
    quantity: str = ""
    paper: str = "–"

    def of(self, seeds: Mapping[int, Raw], **words: str) -> str:
        """Returns the text of the cell for the seeds of a run."""
        if self.value is None:
            return filled(self.text, {}, **words)
        values = [self.value(seeds[seed]) for seed in sorted(seeds)]
        how, _, form = self.show.partition(" ")
        if how == "each":
            return " ".join(format(value, form) for value in values)
        if how == "first":
            return format(values[0], form) if values else "–"
        if how == "share":
            return f"{sum(values)} of {len(values)}"
        if how == "mean":
            return number(mean_of(values), form)
        return over_seeds(values, int(form or 3))


def rows_of_runs(
    raws: RawOfSeeds, columns: Sequence[Cell], titles: Mapping[str, str], runs: Iterable[str]
) -> Rows:
    """Returns a table with a row for each run."""
    rows = [[cell.head for cell in columns]]
    return rows + [
        [cell.of(raws[run], run=titles[run], name=run) for cell in columns] for run in runs
    ]


def rows_of_quantities(of_seeds: Mapping[int, Raw], cells: Sequence[Cell]) -> Rows:
    """Returns a table with a row for each quantity of a run."""
    rows = [["quantity", "paper", "ours"]]
    return rows + [[cell.quantity, cell.paper, cell.of(of_seeds)] for cell in cells]


def number(value: float, form: str = ".2f") -> str:
    """Returns a number in a format; a dash for what is none."""
    return format(value, form) if math.isfinite(value) else "–"


def over_seeds(values: Iterable[float], digits: int = 3) -> str:
    """Returns the mean of the seeds, with the smallest and the largest where they differ."""
    found = [float(value) for value in values]
    if not found:
        return "–"
    average = sum(found) / len(found)  # NaN, and no complaint, for infinities of both signs
    if math.isnan(average):
        return "nan"
    mean, low, high = (f"{value:.{digits}g}" for value in (average, min(found), max(found)))
    return mean if low == high else f"{mean} ({low} to {high})"

"""The table that a monitor fills: a column for each number, a row for each recorded step."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_optim._validation import ArgumentError

if TYPE_CHECKING:
    import pandas as pd


class Table:
    """Rows of numbers; some columns hold a list in each row.

    In files and frames each entry of a list has a column of its own.

    Args:
        columns: the names, the first of which counts the steps.
        lists: of the columns with lists, how long they are in each row.

    Attributes:
        history: a list for each column, with an entry for each row.
    """

    def __init__(self, columns: Sequence[str], lists: Mapping[str, int]) -> None:
        self.history: dict[str, list[Any]] = {column: [] for column in columns}
        self._lists = dict(lists)

    @property
    def names(self) -> list[str]:
        """The columns of files and frames."""
        return list(self.flat(self.unknown(0)))

    def unknown(self, step: int) -> dict[str, Any]:
        """Returns a row of which nothing is known but the step."""
        row: dict[str, Any] = dict.fromkeys(self.history, math.nan) | {"step": step}
        return row | {column: [math.nan] * count for column, count in self._lists.items()}

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row with all columns."""
        for column, values in self.history.items():
            values.append(row[column])

    def flat(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a row with a column for each entry of a list, at the end."""
        flat = {column: value for column, value in row.items() if column not in self._lists}
        for column in self._lists:
            one = column.removesuffix("s")
            flat |= {f"{one}_{i + 1}": value for i, value in enumerate(row[column])}
        return flat

    def rows(self) -> list[dict[str, Any]]:
        """Returns all rows, as ``flat`` makes them."""
        values = zip(*self.history.values(), strict=True)
        return [self.flat(dict(zip(self.history, row, strict=True))) for row in values]

    def latest(self, count: int) -> list[dict[str, Any]]:
        """Returns the last rows, at most ``count`` of them, as ``flat`` makes them."""
        values = zip(*(column[-count:] for column in self.history.values()), strict=True)
        return [self.flat(dict(zip(self.history, row, strict=True))) for row in values]

    def load(self, history: Mapping[str, Sequence[Any]]) -> None:
        """Puts a history in the place of what is there.

        Raises:
            ArgumentError: its lists are of another length.
        """
        for column, count in self._lists.items():
            if any(len(values) != count for values in history[column]):
                allowed = f"{count} in each row"
                remedy = "It is of another k, or of other measures."
                raise ArgumentError("the loaded state", f"of other {column}", allowed, remedy)
        for column in self.history:
            self.history[column] = list(history[column])

    def to_frame(self) -> pd.DataFrame:
        """Returns it as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415 (an extra)
        except ImportError as error:
            message = "to_frame() needs pandas: pip install 'subspace_optim[plots]'"
            raise ImportError(message) from error
        return pd.DataFrame(self.rows(), columns=self.names)

    def to_csv(self, path: str | Path) -> None:
        """Writes it to a file."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.names)
            writer.writeheader()
            writer.writerows(self.rows())

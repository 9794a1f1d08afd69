"""Where the rows of a monitor go as they come: files, TensorBoard, any callable."""

from __future__ import annotations

import csv
import io
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_optim._validation import ArgumentError, LogWarning

Row = Mapping[str, Any]
Send = Callable[[Row], None]


class Log:
    """Sends rows to one place, in order, and keeps those that did not arrive for the next time.

    Training is worth more than its record: a place that fails (a full disk, a lost connection) is
    a ``LogWarning``, and what it missed is sent before the next row.

    Args:
        name: of the place, for the warning.
        send: takes one row.
    """

    def __init__(self, name: str, send: Send) -> None:
        self.name, self._send = name, send
        self._pending: list[Row] = []

    def __call__(self, row: Row) -> None:
        """Sends the row, after those that wait."""
        self._pending.append(row)
        self.flush()

    def flush(self) -> None:
        """Sends what waits."""
        try:
            while self._pending:
                self._send(self._pending[0])
                del self._pending[0]
        except Exception as error:  # noqa: BLE001 (whatever a place of the user's raises)
            message = (
                f"{self.name} did not take a row of the monitor "
                f"({type(error).__name__}: {error}). Training goes on; {len(self._pending)} "
                "rows wait for the next one, and all are in the monitor's history."
            )
            warnings.warn(message, LogWarning, stacklevel=2)


def logs(targets: Any, columns: Sequence[str], *, append: bool) -> list[Log]:
    """Returns a log for each target.

    Args:
        targets: a path that ends in .csv or .jsonl, an object with ``add_scalar`` such as
            TensorBoard's ``SummaryWriter``, a callable that takes a dict; a sequence of these;
            ``None`` for nothing.
        columns: the names in every row.
        append: whether files may be there already; theirs must be the same columns.

    Raises:
        ArgumentError: a target is none of these, or its file cannot be written.
    """
    if targets is None:
        return []
    one = isinstance(targets, str | Path) or callable(targets) or hasattr(targets, "add_scalar")
    if not one and not isinstance(targets, Iterable):
        raise ArgumentError("log", type(targets).__name__, _ALLOWED)
    return [_log(target, columns, append) for target in ([targets] if one else targets)]


_ALLOWED = "a path that ends in .csv or .jsonl, a SummaryWriter, a callable, or a list of these"


def _log(target: Any, columns: Sequence[str], append: bool) -> Log:
    if isinstance(target, str | Path):
        path = Path(target)
        if path.suffix not in _FORMATS:
            raise ArgumentError("log", str(path), _ALLOWED)
        header, line = _FORMATS[path.suffix]
        _begin(path, header(columns), append)
        return Log(str(path), lambda row: _write(path, line(row)))
    if hasattr(target, "add_scalar"):
        return Log(type(target).__name__, lambda row: _scalars(target, row))
    if callable(target):
        return Log(getattr(target, "__qualname__", type(target).__name__), target)
    raise ArgumentError("log", type(target).__name__, _ALLOWED)


def _begin(path: Path, header: str, append: bool) -> None:
    """Makes the file, or sees to it that the one that is there can be continued.

    Raises:
        ArgumentError: it cannot be.
    """
    try:
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(header, encoding="utf-8")
            return
        if not append:
            remedy = "Choose another name, or append=True to add the rows of a resumed run."
            raise ArgumentError("log", str(path), "a file that is not there yet", remedy)
        with path.open("r+", encoding="utf-8", newline="") as file:
            first = file.readline()
            if header and first != header:
                allowed, remedy = "a table of the same columns", "Choose another name."
                raise ArgumentError("log", str(path), allowed, remedy)
            _end_last_line(file)
    except OSError as error:
        remedy = "Make its folder, or choose another."
        found = f"{path} ({error.strerror})"
        raise ArgumentError("log", found, "a file that can be written", remedy) from error


def _end_last_line(file: io.TextIOWrapper) -> None:
    """Ends a line that a kill has cut off, so that the next row does not continue it."""
    text = file.read()
    if text and not text.endswith("\n"):
        file.write("\n")


def _write(path: Path, line: str) -> None:
    # Opened for each row: what is written is the system's, and outlives a kill.
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(line)


def _csv(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _json(row: Row) -> str:
    # JSON has no word for NaN and infinities: they become null.
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite) + "\n"


def _scalars(writer: Any, row: Row) -> None:
    """Writes a row to a ``SummaryWriter``; what is not measured leaves a gap in the curve."""
    for name, value in row.items():
        if name != "step" and math.isfinite(value):
            writer.add_scalar(f"subspace/{name}", value, row["step"])


_FORMATS: dict[str, tuple[Callable[[Sequence[str]], str], Callable[[Row], str]]] = {
    ".csv": (_csv, lambda row: _csv(row.values())),
    ".jsonl": (lambda _: "", _json),
}

"""Where the rows of a monitor go as they come: files, TensorBoard, any callable."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_optim._validation import ArgumentError, LogWarning

Row = Mapping[str, Any]


class Log:
    """Sends rows to one place, in order.

    Training is worth more than its record: a place that fails is a ``LogWarning``, once until it
    takes a row again. What could not arrive (an ``OSError``: a full disk, a lost connection) is
    sent before the next row; a row that was refused is left out.

    Args:
        name: of the place, for the warning.
        send: takes one row.
    """

    def __init__(self, name: str, send: Callable[[Row], None]) -> None:
        self.name, self._send = name, send
        self._pending: list[Row] = []
        self._failing = self._sending = False

    def __call__(self, row: Row) -> None:
        """Sends the row, after those that wait."""
        self._pending.append(row)
        self.flush()

    def flush(self) -> None:
        """Sends what waits. A place that takes a row may call for it again."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._pending:
                self._send(self._pending[0])
                del self._pending[0]
                self._failing = False
        except OSError as error:
            self._warn(error, "Rows wait until it does")
        except Exception as error:  # noqa: BLE001 (whatever a place of the user's raises)
            del self._pending[0]
            self._warn(error, "Rows that it refuses are left out")
        finally:
            self._sending = False

    def _warn(self, error: Exception, consequence: str) -> None:
        if not self._failing:
            self._failing = True
            message = (
                f"{self.name} did not take a row of the monitor ({type(error).__name__}: {error}). "
                f"{consequence}, training goes on, and all rows are in the monitor's history."
            )
            warnings.warn(message, LogWarning, stacklevel=3)


def logs(targets: Any, columns: Sequence[str], *, append: bool, files: bool = True) -> list[Log]:
    """Returns a log for each target.

    Args:
        targets: a path that ends in .csv or .jsonl, an object with ``add_scalar`` such as
            TensorBoard's ``SummaryWriter``, a callable that takes a dict; a sequence of these;
            ``None`` for nothing.
        columns: the names in every row.
        append: whether files may be there already; theirs must be the same columns.
        files: whether this process writes them; if not, they are left to the one that does.

    A target that is none of these, or a file that cannot be written, raises ``ArgumentError``.
    """
    if targets is None:
        return []
    several = isinstance(targets, Iterable) and not _is_one(targets)
    chosen = list(targets) if several else [targets]
    if not files:
        chosen = [target for target in chosen if not isinstance(target, str | Path)]
    for target in chosen:
        _check(target, append)
    return [_log(target, columns) for target in chosen]


def _is_one(target: Any) -> bool:
    """Whether it is of a kind that takes rows."""
    return isinstance(target, str | Path) or callable(target) or hasattr(target, "add_scalar")


_ALLOWED = "a path that ends in .csv or .jsonl, a SummaryWriter, a callable, or a list of these"


def _check(target: Any, append: bool) -> None:
    """Checks a target before any file is made.

    Raises:
        ArgumentError: it is no log, or a file that is there or cannot be.
    """
    if not _is_one(target):
        raise ArgumentError("log", type(target).__name__, _ALLOWED)
    if not isinstance(target, str | Path):
        return
    path = Path(target)
    if path.suffix not in _FORMATS:
        raise ArgumentError("log", str(path), _ALLOWED)
    if not path.absolute().parent.is_dir():
        remedy = "Make its folder, or choose another."
        raise ArgumentError("log", f"{path} (no such folder)", "a file in a folder", remedy)
    if path.exists() and path.stat().st_size and not append:
        remedy = "Choose another name, or append=True to add the rows of a resumed run."
        raise ArgumentError("log", str(path), "a file that is not there yet", remedy)


def _log(target: Any, columns: Sequence[str]) -> Log:
    if isinstance(target, str | Path):
        path = Path(target).absolute()  # the working directory may change
        make_header, line = _FORMATS[path.suffix]
        header = make_header(columns)
        _begin(path, header)
        return Log(str(path), lambda row: _write(path, header, line(row)))
    if hasattr(target, "add_scalar"):
        return Log(type(target).__name__, lambda row: _scalars(target, row))
    return Log(getattr(target, "__qualname__", type(target).__name__), target)


def _begin(path: Path, header: str) -> None:
    """Makes the file, or sees to it that the one that is there can be continued.

    A kill can cut the last line off. It is taken away: the next row would be written onto its end,
    and be lost with it.

    Raises:
        ArgumentError: it cannot be.
    """
    try:
        if not path.exists() or path.stat().st_size == 0:
            path.write_text(header, encoding="utf-8")
            return
        content = path.read_bytes()
        if not content.startswith(header.encode()):
            allowed, remedy = "a table of the same columns", "Choose another name."
            raise ArgumentError("log", str(path), allowed, remedy)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
    except OSError as error:
        remedy = "Choose another."
        found = f"{path} ({error.strerror})"
        raise ArgumentError("log", found, "a file that can be written", remedy) from error


def _write(path: Path, header: str, line: str) -> None:
    """Adds a line, or nothing: half of one, as on a full disk, would spoil the next too.

    Raises:
        OSError: the file cannot be written.
    """
    # Opened for each row: what is written is the system's, and outlives a kill.
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(line if size else header + line)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


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

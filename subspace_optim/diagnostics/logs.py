"""Where the rows of a monitor go as they come: files, loggers, any callable."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_optim._validation import ArgumentError, LogWarning

Row = Mapping[str, Any]
PREFIX = "subspace/"
"""Of the columns, in loggers that others write to as well."""


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
        targets: a path that ends in .csv or .jsonl, a logger as ``Monitor`` names them, a callable
            that takes a dict; a sequence of these; ``None`` for nothing.
        columns: the names in every row.
        append: whether files may be there already; theirs must be the same columns.
        files: whether this process writes them; if not, they are left to the one that does.

    A target that is none of these, or a file that cannot be written, raises ``ArgumentError``.
    """
    chosen = targets_of(targets)
    if not files:
        chosen = [target for target in chosen if not isinstance(target, str | Path)]
    check_targets(chosen)
    for target in chosen:
        _check_is_new(target, append)
    return [_log(target, columns) for target in chosen]


def targets_of(targets: Any) -> list[Any]:
    """Returns one target, several, or none as a list."""
    if targets is None:
        return []
    several = isinstance(targets, Iterable) and not _is_one(targets)
    return list(targets) if several else [targets]


def _is_one(target: Any) -> bool:
    """Whether it is of a kind that takes rows."""
    kinds = str | Path | logging.Logger
    return (
        isinstance(target, kinds) or callable(target) or any(hasattr(target, m) for m in _METHODS)
    )


_METHODS = ("add_scalar", "define_metric", "log_metrics")
"""That TensorBoard, W&B, and MLflow and Lightning's loggers can be told by."""
_ALLOWED = (
    "a path that ends in .csv or .jsonl, a SummaryWriter, wandb, mlflow, a logger of Lightning or "
    "of logging, a callable, or a list of these"
)


def check_targets(targets: Iterable[Any]) -> None:
    """Checks what rows are to go to, before anything is made.

    Raises:
        ArgumentError: one is no log, or a file that cannot be.
    """
    for target in targets:
        if not _is_one(target):
            raise ArgumentError("log", type(target).__name__, _ALLOWED)
        if isinstance(target, str | Path):
            if Path(target).suffix not in _FORMATS:
                raise ArgumentError("log", str(target), _ALLOWED)
            check_folder("log", target)


def check_folder(argument: str, path: str | Path) -> Path:
    """Returns the path of a file that can be made: that of a name in a folder.

    Raises:
        ArgumentError: the folder is not there, or the path is a folder itself.
    """
    file = Path(path)
    if file.is_dir():
        remedy = "Add the name of the file."
        raise ArgumentError(argument, f"{file} (a folder)", "a file in a folder", remedy)
    if not file.absolute().parent.is_dir():
        remedy = "Make its folder, or choose another."
        found = f"{file} (no such folder)"
        raise ArgumentError(argument, found, "a file in a folder", remedy)
    return file


def _check_is_new(target: Any, append: bool) -> None:
    """Checks a target before any file is made.

    Raises:
        ArgumentError: it has no run, or is a file that is there.
    """
    if hasattr(target, "define_metric") and getattr(target, "run", target) is None:
        raise ArgumentError("log", "wandb without a run", "one", "Call wandb.init() before.")
    if not isinstance(target, str | Path):
        return
    path = Path(target)
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
    if isinstance(target, logging.Logger):
        return Log(f"the logger {target.name!r}", lambda row: _line(target, row))
    name = getattr(target, "__qualname__", type(target).__name__)
    owner = getattr(target, "__self__", target)  # of wandb.log, which is a method of a run
    if hasattr(owner, "define_metric"):
        return Log("wandb", _Run(getattr(owner, "run", owner)))
    if hasattr(target, "add_scalar"):
        return Log(name, lambda row: _scalars(target, row))
    if hasattr(target, "log_metrics"):
        return Log(name, lambda row: _metrics(target.log_metrics, row))
    if getattr(target, "__name__", "") == "log_metrics":
        return Log(name, lambda row: _metrics(target, row))
    return Log(name, target)


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
    for name, value in measured(row).items():
        writer.add_scalar(name, value, row["step"])


def _metrics(log: Callable[..., Any], row: Row) -> None:
    """Writes a row by MLflow's and Lightning's ``log_metrics``."""
    log(measured(row), step=row["step"])


def _line(logger: logging.Logger, row: Row) -> None:
    """Writes a row as a line."""
    values = ", ".join(f"{name} {value:.4g}" for name, value in measured(row).items())
    logger.info("step %d: %s", row["step"], values)


class _Run:
    """Adds rows to a run of W&B: to the steps that it has, and with an axis of their own.

    A row comes with what the run logs next. Where another one is still waiting for that, it takes
    a step of its own: the two would be one.
    """

    def __init__(self, run: Any) -> None:
        self._run, self._waits_at = run, -1
        run.define_metric(f"{PREFIX}step", hidden=True)
        run.define_metric(f"{PREFIX}*", step_metric=f"{PREFIX}step")

    def __call__(self, row: Row) -> None:
        run = self._run
        if run.step == self._waits_at:
            run.log({}, commit=True)
        run.log({f"{PREFIX}step": row["step"]} | measured(row), commit=False)
        self._waits_at = run.step


def measured(row: Row) -> dict[str, float]:
    """Returns the columns with a prefix, but for the step and for what could not be measured."""
    return {
        f"{PREFIX}{name}": value
        for name, value in row.items()
        if name != "step" and math.isfinite(value)
    }


_FORMATS: dict[str, tuple[Callable[[Sequence[str]], str], Callable[[Row], str]]] = {
    ".csv": (_csv, lambda row: _csv(row.values())),
    ".jsonl": (lambda _: "", _json),
}

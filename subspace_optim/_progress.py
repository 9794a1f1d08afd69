"""Signs of life of what can take long: how far it is, told where somebody listens.

What is at work makes a ``Progress`` and ticks. ``shown`` decides who is told: without it the log of
``subspace_optim`` is, after 10 seconds and then every 20; a bar, or a function of the user's, where
he asked for one. Of what runs inside of something else, such as the passes over the data of a
solve, the outer one tells.

The package configures no handler. ``logging.basicConfig(level=logging.INFO)`` shows the lines.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Self

from subspace_optim._validation import ArgumentError

LOGGER: Final = logging.getLogger("subspace_optim")
FIRST: Final = 10.0
"""Seconds before the first line of the log: what ends sooner says nothing."""
NEXT: Final = 20.0
"""Seconds between lines. They come with a tick, and up to 10 s between ticks still make 30 s."""
_BAR_AFTER: Final = 0.5
"""Seconds before a bar: what ends sooner needs none."""
_INSIDE: Final = 1.0
"""Seconds between what is told for the sake of what runs inside."""


@dataclass(frozen=True)
class ProgressReport:
    """How far a solve is, as ``progress=`` of solves tells it. ``str()`` is one line.

    Attributes:
        what: is being done, such as ``"top 10 eigenpairs"``.
        done: how much of it.
        total: of how much; ``None`` where that cannot be told.
        unit: of both, such as ``"products"``.
        estimated: the total is a guess, made anew as the solve goes on.
        residual: the largest of the wanted pairs, relative as ``tol`` is; ``None`` before it is
            known, and of what has none.
        seconds: since it has begun.
        inside: what it is doing at the moment, if that takes long itself.
    """

    what: str
    done: int
    total: int | None
    unit: str
    estimated: bool
    residual: float | None
    seconds: float
    inside: str = ""

    def __str__(self) -> str:
        told = f"{self.what}: {self.amount}"
        if self.residual is not None:
            told += f", largest residual {self.residual:.1e}"
        if self.inside:
            told += f" ({self.inside})"
        return f"{told}, {self.seconds:.0f} s"

    @property
    def amount(self) -> str:
        """How much of how much, in words."""
        about = "about " if self.estimated else ""
        of = "" if self.total is None else f" of {about}{self.total}"
        return f"{self.done}{of} {self.unit}"


ProgressOption = bool | Callable[[ProgressReport], object]
"""``True`` for a bar, or lines where there is no tqdm; a function of each report; or ``False``."""


class Progress:
    """Something that is at work, and how far it is.

    Entered, it is what is told of for all that runs inside. It decides nothing: where nobody
    listens it is a clock that nobody reads.

    Args:
        what: is being done, as a line is to begin.
        unit: of what is counted, in the plural.
        total: how much there is of it, if that is known.
        estimated: the totals are guesses.
        clock: seconds, from any start.
    """

    def __init__(
        self,
        what: str,
        unit: str,
        total: int | None = None,
        *,
        estimated: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._unit, self._estimated = what, unit, estimated
        self._at: tuple[int, int | None, float | None] = (0, total, None)
        self._clock = clock
        self._start = clock()
        self._listener = _LISTENER.get()
        self._due = self._start + self._listener.first
        self._due_within = max(self._due, self._start + _INSIDE)
        self._outer: Progress | None = None

    def __enter__(self) -> Self:
        self._outer = _OUTERMOST.get()
        if self._outer is None:
            _OUTERMOST.set(self)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outer is None:
            _OUTERMOST.set(None)
            self._listener.close()

    def tick(self, done: int, total: int | None = None, residual: float | None = None) -> None:
        """Notes how far it is, and tells, if that is due; else it reads the clock, and that is all.

        Args:
            done: how much.
            total: of how much, if that is another than before.
            residual: the largest, if there is one.
        """
        self._at = done, self._at[1] if total is None else total, residual
        outermost = _OUTERMOST.get() or self
        outermost.tell(self._clock(), self)

    def tell(self, now: float, ticked: Progress) -> None:
        """Tells how far it is, if that is due.

        Args:
            now: what the clock says.
            ticked: itself, or what runs inside and gives occasion to it.
        """
        within = ticked is not self
        if now < (self._due_within if within else self._due):
            return
        every = self._listener.every
        self._due, self._due_within = now + every, now + max(every, _INSIDE)
        inside = ""
        if within:
            report = ticked.report(now)
            inside = f"{report.what}: {report.amount}"
        self._listener.told(self.report(now, inside))

    def report(self, now: float, inside: str = "") -> ProgressReport:
        """Returns how far it is."""
        done, total, residual = self._at
        return ProgressReport(
            self._what,
            done,
            total,
            self._unit,
            self._estimated,
            residual,
            now - self._start,
            inside,
        )


class _Log:
    """Lines in the log, now and then.

    Attributes:
        first: seconds before the first report.
        every: seconds between reports.
    """

    @property
    def first(self) -> float:
        return FIRST

    @property
    def every(self) -> float:
        return NEXT

    def told(self, report: ProgressReport) -> None:
        LOGGER.info("%s", report)

    def close(self) -> None:
        """Ends what was shown of the one thing that was at work."""


class _Lines(_Log):
    """Lines that were asked for: where the log shows none they go to stderr."""

    first, every = 1.0, 5.0

    def told(self, report: ProgressReport) -> None:
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info("%s", report)
        else:
            sys.stderr.write(f"{report}\n")


class _Function(_Log):
    """Every report, to a function."""

    first = every = 0.0

    def __init__(self, function: Callable[[ProgressReport], object]) -> None:
        self._function = function

    def told(self, report: ProgressReport) -> None:
        self._function(report)


class _Bar(_Log):
    """A bar of tqdm's, in a terminal or a notebook. It leaves nothing behind."""

    first = every = 0.0

    def __init__(self) -> None:
        with warnings.catch_warnings():  # of a notebook without widgets, where the bar is text
            warnings.simplefilter("ignore")
            from tqdm.auto import tqdm  # noqa: PLC0415 (optional)
        self._make: Callable[..., Any] = tqdm
        self._bar: Any = None
        self._what = ""

    def told(self, report: ProgressReport) -> None:
        if self._bar is None or self._what != report.what:
            self.close()
            self._what = report.what
            self._bar = self._make(
                desc=report.what,
                total=report.total,
                unit=f" {report.unit}",
                delay=_BAR_AFTER,
                miniters=1,
                leave=False,
            )
        bar = self._bar
        _set_total(bar, report.total)
        parts = [report.inside] if report.inside else []
        if report.residual is not None:
            parts.insert(0, f"residual {report.residual:.1e}")
        bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.update(report.done - bar.n)
        if report.inside:  # time goes on, though nothing was counted
            bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def _set_total(bar: Any, total: int | None) -> None:
    """Gives a bar another total; in a notebook the widget has to be told as well."""
    if bar.total == total:
        return
    bar.total = total
    widgets: Any = getattr(getattr(bar, "container", None), "children", ())
    if total is not None and len(widgets) == 3:
        widgets[1].max = total


_LISTENER: ContextVar[_Log] = ContextVar("listener", default=_Log())  # noqa: B039 (it holds nothing)
_OUTERMOST: ContextVar[Progress | None] = ContextVar("outermost", default=None)


def check_progress(progress: ProgressOption) -> ProgressOption:
    """Returns the argument.

    Raises:
        ArgumentError: it is neither True, False nor callable.
    """
    if not isinstance(progress, bool) and not callable(progress):
        remedy = "A function is called with a ProgressReport."
        raise ArgumentError("progress", progress, "True, False or a function", remedy)
    return progress


@contextmanager
def shown(progress: ProgressOption, rank: int = 0) -> Iterator[None]:
    """Shows what is at work inside.

    Args:
        progress: how; ``False`` leaves it to whoever listens already.
        rank: of this process: of several one shows a bar. A function is called on each.

    ``ArgumentError`` where it is none of what is allowed.
    """
    check_progress(progress)
    if progress is False or (progress is True and rank != 0):
        yield
        return
    listener: _Log = _Function(progress) if callable(progress) else _bar_or_lines()
    tokens = _LISTENER.set(listener), _OUTERMOST.set(None)
    try:
        yield
    finally:
        listener.close()
        _LISTENER.reset(tokens[0])
        _OUTERMOST.reset(tokens[1])


def _bar_or_lines() -> _Log:
    return _Lines() if importlib.util.find_spec("tqdm") is None else _Bar()

"""Signs of life: bars in a terminal, and in a log file a line at least every 30 seconds.

What is at work says so with ``doing``, wherever it is called from, and how far it is by ``at``:

    with doing("BulkSGD", total=400) as task:
        for step in range(400):
            ...
            task.at(step + 1, f"loss {loss:.4f}")

That only writes it down. What a command has opened with ``shown`` reads it from a thread of its
own, so that a line comes during one long solve too. Where nothing is opened nothing is shown.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeVar

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_T = TypeVar("_T")

EVERY: Final = 20.0
"""Seconds between lines: the promised 30, less what a busy machine may take to write one."""


class Task:
    """Something that is at work, and how far it is.

    Args:
        what: in words.
        total: steps; ``None`` where they cannot be counted.
        unit: of the steps.
        figures: the latest, or a function that tells them when they are shown.
    """

    def __init__(
        self,
        what: str,
        total: int | None = None,
        *,
        unit: str = "step",
        figures: str | Callable[[], str] = "",
    ) -> None:
        self.what, self.total, self.unit, self.figures = what, total, unit, figures
        self.step = 0
        self._begun = time.monotonic()

    def at(self, step: int, figures: str | None = None) -> None:
        """Takes note of how far it is; the figures stay where none are given."""
        self.step = step
        if figures is not None:
            self.figures = figures

    @property
    def seconds(self) -> float:
        """Returns how long it has been at work."""
        return time.monotonic() - self._begun

    @property
    def latest(self) -> str:
        """Returns the latest figures."""
        return self.figures() if callable(self.figures) else self.figures

    def __str__(self) -> str:
        parts = [self.what]
        if self.total is not None:
            parts.append(f"{self.unit} {self.step} of {self.total}")
        parts += [f"{self.seconds:.0f} s", self.latest]
        return ", ".join(part for part in parts if part)


_tasks: list[Task] = []
"""What is at work, the outermost first."""
_say: list[Callable[[str], None]] = []
"""Writes a line that stays, the innermost last; none where nothing is shown."""


@contextmanager
def doing(
    what: str,
    total: int | None = None,
    *,
    unit: str = "step",
    figures: str | Callable[[], str] = "",
    keep: bool = False,
) -> Iterator[Task]:
    """Tells that something is at work, for as long as it is.

    Args:
        what: in words.
        total: steps; ``None`` where they cannot be counted.
        unit: of the steps.
        figures: the latest, or a function that tells them when they are shown.
        keep: how far it came stays as a line when it ends.

    Yields:
        The task, to be told how far it is.
    """
    task = Task(what, total, unit=unit, figures=figures)
    _tasks.append(task)
    try:
        yield task
    finally:
        _tasks.remove(task)
        if keep and _say:
            _say[-1](str(task))


def counted(what: str, steps: Sequence[_T], *, unit: str = "step") -> Iterator[_T]:
    """Yields the steps, and tells which is at work."""
    with doing(what, len(steps), unit=unit) as task:
        for number, step in enumerate(steps, 1):
            task.at(number)
            yield step


class Log:
    """Lines in a log file, each with the seconds since the start.

    Args:
        console: that writes to it.
        every: seconds without a line after which there is one.
    """

    def __init__(self, console: Console, every: float = EVERY) -> None:
        self.console, self.every = console, every
        self._begun = self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Writes a line, and flushes it."""
        self._last = time.monotonic()
        line = f"[{self._last - self._begun:5.0f} s] {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def beat(self) -> None:
        """Writes what is at work, if it is time for a line."""
        if time.monotonic() - self._last >= self.every and _tasks:
            self.say(" | ".join(map(str, tuple(_tasks))))

    def keep_beating(self, ended: threading.Event) -> None:
        """Beats until the end; or until nobody can read it, for the work goes on."""
        while not ended.wait(self.every / 10):
            try:
                self.beat()
            except (OSError, ValueError):  # the file was closed, or the disk is full
                return


class _Lines(logging.Handler):
    """The package's own lines, beside ours."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one."""
        try:
            self.say(record.getMessage())
        except Exception:  # noqa: BLE001 (as all handlers do: logging must not end the work)
            self.handleError(record)


@contextmanager
def _listening(say: Callable[[str], None]) -> Iterator[None]:
    """Shows what the package logs of its long solves."""
    logger, handler = logging.getLogger("subspace_optim"), _Lines(say)
    level = logger.level
    logger.addHandler(handler)
    if logger.getEffectiveLevel() > logging.INFO:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _bars() -> Table:
    """What is at work, a bar each."""
    table = Table.grid(padding=(0, 1))
    for task in tuple(_tasks):  # another thread adds and removes them
        bar = ProgressBar(task.total, task.step, width=20, pulse=task.total is None)
        count = "" if task.total is None else f"{task.step}/{task.total}"
        minutes, seconds = divmod(int(task.seconds), 60)
        # As texts: what stands in brackets is no markup.
        table.add_row(Text(task.what), bar, count, f"{minutes}:{seconds:02d}", Text(task.latest))
    return table


@contextmanager
def shown(what: str, console: Console, every: float = EVERY) -> Iterator[Task]:
    """Shows what is at work: bars in a terminal, else lines.

    Args:
        what: all that is done meanwhile, in words.
        console: where.
        every: seconds without a line after which a log file gets one.

    Yields:
        The outermost task.
    """
    with doing(what) as task:
        if console.file.isatty() and not console.is_dumb_terminal:
            say = partial(console.print, markup=False, highlight=False)
            # Twice a second: what is timed meanwhile does not notice.
            live = Live(get_renderable=_bars, console=console, refresh_per_second=2, transient=True)
            with live, _said_by(say):
                yield task
            return
        log, ended = Log(console, every), threading.Event()
        # A daemon: it keeps no process alive that has nothing else to do.
        thread = threading.Thread(target=log.keep_beating, args=(ended,), daemon=True)
        thread.start()
        try:
            with _said_by(log.say), _listening(log.say):
                yield task
        finally:
            ended.set()
            thread.join()


@contextmanager
def _said_by(say: Callable[[str], None]) -> Iterator[None]:
    _say.append(say)
    try:
        yield
    finally:
        _say.remove(say)

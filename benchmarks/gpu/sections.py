"""Sections in the order of their worth, each with a time limit of its own."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Final

from benchmarks.files import first_line

NEEDS_CUDA: Final = "needs CUDA"
"""What a row says that only a GPU can fill."""
_SHORTEST: Final = 1.0
"""Seconds: with less left, a section is not begun."""


@dataclass(frozen=True)
class Section:
    """A part of the run.

    Attributes:
        name: in the file that is written.
        seconds: after which it is ended.
        measure: writes what it finds into the rows that it is given, one after the other, so that
            those that are there outlast its end.
    """

    name: str
    seconds: float
    measure: Callable[[dict[str, Any]], None]


class OutOfTimeError(BaseException):
    """A section has used up its time; no ``except Exception`` on the way keeps it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends what is inside after so many seconds, by an ``OutOfTimeError`` between two operations.

    In the main thread alone, where signals arrive.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise OutOfTimeError(f"ended after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    outer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def run(
    sections: Sequence[Section],
    measured: dict[str, Any],
    ends: float,
    write: Callable[[], None],
    tell: Callable[[str], None],
) -> None:
    """Runs the sections that are not there yet, until the time is over.

    What goes wrong in one is noted in its place, and the next begins.

    Args:
        sections: the most important first.
        measured: of each section, by its name: its rows, ``seconds`` and ``status``.
        ends: the time, as of ``time.time()``, after which no section goes on.
        write: called before and after each section.
        tell: is given a line about each.
    """
    for section in sections:
        if section.name in measured:
            continue
        left = ends - time.time()
        rows: dict[str, Any] = {}
        outcome = measured[section.name] = {"status": "not begun: no time left", "rows": rows}
        if left < _SHORTEST:
            write()
            continue
        outcome["status"] = "killed"  # if nothing else is written below
        write()
        began = time.time()
        try:
            with time_limit(min(section.seconds, left)):
                section.measure(rows)
            outcome["status"] = "done"
        except OutOfTimeError as error:
            outcome["status"] = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next section has its turn
            outcome["status"] = f"failed: {first_line(error)}"
        outcome["seconds"] = time.time() - began
        write()
        tell(f"{section.name}: {outcome['status']}, {outcome['seconds']:.1f} s")

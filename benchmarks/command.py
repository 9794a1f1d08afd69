"""What the commands share: where they print, how signals end them, and which errors they tell."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console

from benchmarks.files import BusyError

REFUSED: Final = 2
"""The exit status of what cannot be run."""
INTERRUPTED: Final = 130


def console(width: int) -> Console:
    """Returns the terminal, or lines of that width, as the widest table needs, where none is."""
    return Console() if sys.stdout.isatty() else Console(width=width)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A polite kill, and the end of the terminal, end the work as Ctrl-C does.

    Ctrl-C too: a shell starts its background jobs with that signal ignored. What was told to
    outlive its terminal (``nohup``) does.
    """
    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        kinds.append(signal.SIGHUP)
    before = {kind: signal.signal(kind, signal.default_int_handler) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def status(name: str, work: Callable[[], int], *refusals: type[Exception], kept: str = "") -> int:
    """Does the work of a command, and returns its exit status.

    Args:
        name: of the command.
        work: returns the exit status.
        refusals: errors that tell in one sentence what cannot be run, beside ``BusyError``.
        kept: what there is after an interrupt.
    """
    told: tuple[type[Exception], ...] = (BusyError, *refusals)
    try:
        with ended_by_signals():
            return work()
    except told as error:
        print(f"{name}: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("; ".join(filter(None, (f"{name}: interrupted", kept))), file=sys.stderr)
        return INTERRUPTED

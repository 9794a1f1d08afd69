"""What the commands share: where they print, how signals end them, and which errors they tell."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console

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

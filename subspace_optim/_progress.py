"""A sign of life of what can take long: a line in the log of ``subspace_optim``, now and then.

The package configures no handler. ``logging.basicConfig(level=logging.INFO)`` shows the lines.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

LOGGER: Final = logging.getLogger("subspace_optim")
FIRST: Final = 10.0
"""Seconds before the first line: what ends sooner says nothing."""
NEXT: Final = 20.0
"""Seconds between lines. They come with a tick, and up to 10 s between ticks still make 30 s."""


class Progress:
    """Tells that a solve or a pass goes on, at most every 20 seconds, and not in the first 10.

    Nothing is decided by it: without a handler for ``INFO`` it is a clock that nobody reads.

    Args:
        what: is being done, as the line is to begin.
        clock: seconds, from any start.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.what = what
        self._clock = clock
        self._start = clock()
        self._due = self._start + FIRST

    def tick(self, describe: Callable[[], str]) -> None:
        """Logs a line if one is due; else it reads the clock, and that is all.

        Args:
            describe: how far it is; called only for a line.
        """
        now = self._clock()
        if now < self._due:
            return
        self._due = now + NEXT
        if LOGGER.isEnabledFor(logging.INFO):  # a description can cost a synchronisation
            LOGGER.info("%s: %s, %.0f s", self.what, describe(), now - self._start)

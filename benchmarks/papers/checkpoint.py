"""What an interrupted run takes up again: kept now and then, and when its process is to end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.files import ForeignFileError, first_line, replacing

SAVE_EVERY: Final = 10.0  # seconds
_SHARE: Final = 0.02
"""Of the time, that keeping takes at most: a large state is kept more rarely."""


class Checkpoint:
    """The state of a loop on disk.

    Args:
        path: its file; ``None``: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._saved, self._took = time.monotonic(), 0.0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lets a signal to end wait for the step to be over."""
        _open.append(self)
        try:
            yield
        finally:
            _open.remove(self)

    def take_up(self, device: torch.device, load: Callable[[dict[str, Any]], None]) -> None:
        """Calls ``load`` with what was kept, if anything was.

        Raises:
            ForeignFileError: the file is something else, or ``load`` cannot make use of it.
        """
        if self.path is None or not self.path.exists():
            return
        try:
            load(torch.load(self.path, map_location=device, weights_only=True))
        except Exception as error:  # whatever torch, pickle and zipfile say to a foreign file
            kind, remedy = "checkpoint of this run", "Remove it to begin anew."
            raise ForeignFileError(self.path, kind, first_line(error), remedy) from error

    def keep(
        self, state: Callable[[], dict[str, Any]], *, measured: bool = False, over: bool = False
    ) -> None:
        """Writes the state if it is time to: a kill leaves the one before, or this one.

        Args:
            state: what to keep.
            measured: something was, which is not to wait.
            over: nothing more will come: it is time.
        """
        asked = _ending and not over
        if self.path is not None:
            now = time.monotonic()
            due = now - self._saved > max(0.0 if measured else SAVE_EVERY, self._took / _SHARE)
            if over or asked or due:
                with replacing(self.path) as partial:
                    torch.save(state(), partial)
                self._saved = time.monotonic()
                self._took = self._saved - now
        if asked:
            sys.exit(_TERMINATED)


_TERMINATED: Final = 143
"""The exit status of a process that SIGTERM ended, as a shell tells it."""
_open: list[Checkpoint] = []
_ending: list[int] = []
"""Signals that asked this process to end."""


def end_when_kept(number: int, _: object) -> None:
    """Ends the process: after the present step if that can be kept then, a second time at once."""
    if not _open or _ending:
        sys.exit(_TERMINATED)
    _ending.append(number)

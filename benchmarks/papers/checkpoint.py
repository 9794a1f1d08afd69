"""What an interrupted run takes up again: kept now and then, and when its process is to end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import torch

from benchmarks.files import ForeignFileError, replacing

SAVE_EVERY: Final = 10.0  # seconds
_SHARE: Final = 0.02
"""Of the time, that keeping takes at most: a large state is kept more rarely."""


class Checkpoint:
    """The state of a loop on disk. Inside ``with``, a signal to end waits for the step to be over.

    Args:
        path: its file; ``None``: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._saved, self._took = time.monotonic(), 0.0

    def __enter__(self) -> Checkpoint:
        _open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _open.remove(self)

    def read(self, device: torch.device) -> dict[str, Any] | None:
        """Returns what was kept; ``None`` if nothing was, an error if the file is foreign."""
        if self.path is None or not self.path.exists():
            return None
        try:
            kept = torch.load(self.path, map_location=device, weights_only=True)
        except Exception as error:  # whatever torch, pickle and zipfile say to a foreign file
            raise self.foreign(error) from error
        if not isinstance(kept, dict):
            raise self.foreign(f"it holds a {type(kept).__name__}")
        return kept

    def foreign(self, reason: object) -> ForeignFileError:
        """Returns the error of a file that cannot be taken up."""
        if isinstance(reason, Exception):
            first = str(reason).partition("\n")[0]
            reason = f"{type(reason).__name__}: {first}"
        path = self.path or Path()
        return ForeignFileError(path, "checkpoint of this run", reason, "Remove it to begin anew.")

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

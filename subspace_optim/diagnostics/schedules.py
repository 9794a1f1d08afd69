"""``every_share``: rows as often as a share of the time of training allows.

The one place of the package where a clock decides anything: which steps are recorded, never what.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import fmean, median
from typing import Any

import torch

from subspace_optim._validation import ArgumentError, check_integer, check_number
from subspace_optim.curvature.process_group import Ranks

_STEPS = 64
"""The latest steps, whose durations tell what one takes."""
_FEWEST = 5
"""Of fewer nothing is concluded: a single one may be a pause, or have compiled the model."""
_LONGEST = 4.0
"""Times the median, above which a step is a pause, and counts as a step of so long."""
_ROWS = 5
"""The latest rows, whose median is expected of the next one."""
_WITHOUT_PROOFS = 0.25
"""What the second row is expected to take, of the first: that one proves the operator."""
_FARTHEST = 2**40
"""Steps: further ahead nothing is planned."""


class EveryShare:
    r"""Rows as often as they take no more than a share of the time of training.

    .. math:: R + r \le \text{share} \cdot T

    is when the next row is due: R is what rows have taken, r what the next one is expected to
    take, and T what the steps between them have, each counted with the typical duration of its
    time. So a pause, such as a validation epoch, allows no more rows than a step does. The first
    row is that of the first step; what it takes, proofs included, is paid back before the next.

    On ordinary steps a clock is read and nothing else is done. When the next row comes is looked at
    1, 2, 4, 8 … steps after the last, by all ranks together: the slowest one decides.

    Whoever records calls ``attach`` once, the schedule at the beginning of each step, and
    ``spending()`` around all that a row takes, in as many pieces as there are. A copy, a pickled
    one too, starts anew.

    Args:
        share: of the time of training: 0.05 makes it 1.05 times as long.

    Raises:
        ArgumentError: ``share`` is no number between 0 and 1.
    """

    def __init__(self, share: float) -> None:
        check_number("share", share, exclusive=True)
        if share >= 1:
            remedy = "0.05 makes a training 1.05 times as long."
            raise ArgumentError("share", share, "above 0 and below 1", remedy)
        self.share = float(share)
        self._clock = time.perf_counter
        self._ranks: Ranks | None = None
        self._device = torch.device("cpu")
        self._step = -1  # the present one
        self._began = 0.0  # when it began
        self._taken = 0.0  # by a row, since
        self._durations: deque[float] = deque(maxlen=_STEPS)  # of the latest steps
        self._uncounted = 0  # steps that are not in `_trained` yet
        self._trained = self._spent = 0.0  # T and R
        self._first: float | None = None  # what the first row has taken, ...
        self._rows: deque[float] = deque(maxlen=_ROWS)  # ... and the latest of the others
        self._row_at = self._look_at = 0  # the step of the latest row, and of the next look

    def attach(self, ranks: Ranks, device: torch.device) -> None:
        """Takes who has to agree on the rows: called once, by the monitor that it is given to.

        Args:
            ranks: all of them call the schedule at the same steps.
            device: where a row computes; it is waited for where a piece of a row begins and ends.

        Raises:
            ArgumentError: it belongs to another monitor already.
        """
        if self._ranks is not None:
            remedy = f"Make another one: every_share({self.share})."
            raise ArgumentError(
                "every", "the schedule of another monitor", "one of its own", remedy
            )
        self._ranks, self._device = ranks, device

    def __call__(self, step: int) -> bool:  # noqa: ARG002 (a resumed run begins at any)
        """Returns whether the step that begins is recorded."""
        self._note(self._clock())
        if self._step < self._look_at:
            return False
        missing = self._missing() if self._step else 0
        if missing:
            self._look_at = self._step + min(missing, self._step - self._row_at)
            return False
        self._row_at, self._look_at = self._step, self._step + 1
        return True

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Counts what is done inside to the row of the present step."""
        self._wait()
        began = self._clock()
        try:
            yield
        finally:
            self._wait()
            self._taken += self._clock() - began

    def _note(self, now: float) -> None:
        """Notes how long the step before has taken, and its row."""
        if self._step >= 0:
            self._durations.append(max(0.0, now - self._began - self._taken))
            self._uncounted += 1
            self._spent += self._taken
            if self._step == self._row_at:
                if self._first is None:
                    self._first = self._taken
                else:
                    self._rows.append(self._taken)
        self._step += 1
        self._began, self._taken = now, 0.0

    def _missing(self) -> int:
        """Returns how many steps are left until the next row is due, on the slowest rank."""
        own = self._missing_here()
        if self._ranks is None or self._ranks.group is None:
            return own
        with self._ranks.summed((self._ranks.size,), torch.int64, self._device) as each:
            each[self._ranks.rank] = own
        return int(each.max())

    def _missing_here(self) -> int:
        if len(self._durations) < _FEWEST:
            return 1
        typical = self._typical()
        self._trained += self._uncounted * typical
        self._uncounted = 0
        missing = (self._spent + self._expected()) / self.share - self._trained
        return max(0, min(_FARTHEST, math.ceil(missing / max(typical, 1e-9))))

    def _typical(self) -> float:
        """Returns the mean duration of the latest steps, in which pauses count as slow steps."""
        longest = _LONGEST * median(self._durations)
        return fmean(min(duration, longest) for duration in self._durations)

    def _expected(self) -> float:
        """Returns what the next row is expected to take."""
        return median(self._rows) if self._rows else _WITHOUT_PROOFS * (self._first or 0.0)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EveryShare) and other.share == self.share

    def __hash__(self) -> int:
        return hash((EveryShare, self.share))

    def __reduce__(self) -> Any:
        return EveryShare, (self.share,)

    def __repr__(self) -> str:
        return f"every_share({self.share})"


def every_share(share: float) -> EveryShare:
    """Returns a schedule for ``Monitor(..., every=...)``: rows for a share of the time.

    Args:
        share: of the time of training, between 0 and 1.

    Returns:
        The schedule: ``EveryShare``, which tells how it decides.
    """
    return EveryShare(share)


def checked_schedule(every: int | Callable[[int], bool]) -> int | Callable[[int], bool]:
    """Returns the argument ``every``.

    ``ArgumentError`` where it is neither a number of steps nor a function.
    """
    if callable(every):
        return every
    remedy = (
        "Or a function of the step that tells whether it is recorded, or every_share(0.05), which "
        "takes that share of the time."
    )
    return check_integer("every", every, minimum=1, remedy=remedy)

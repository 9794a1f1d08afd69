"""The step count: how many training steps a subspace knows of, and who tells it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import times_written
from subspace_optim.step_hooks.optimizers import in_two_calls, parameters_of


class StepCount:
    """Numbers the parameter states that a training passes through; the first is 1.

    A step is what brings the training from one state to another, and two kinds of witnesses know of
    it. Who asks for a basis *looks*: a digest of the parameters shows whether they have changed.
    Who follows an optimizer without asking at each step, as a monitor that records every tenth,
    *tells*, which costs nothing: it marks that a step has moved the parameters, and the next step
    that begins, or the next look, counts that once, however many have marked it.

    What is told can be a step too many, where nothing moved after all. A look finds that out if
    nothing has changed since the look before: all that was told in between is taken back.

    Attributes:
        now: the number of the latest state that is known; 0 before the first.
        looks: how often somebody has looked.
    """

    def __init__(self, operator: CurvatureOperator) -> None:
        self.now = self.looks = 0
        self._operator = operator
        self._seen: int | None = None  # the state at the last look ...
        self._seen_at = 0  # ... and its number
        self._moved = False  # since the number was last settled, as somebody has told
        self._loaded: int | None = None  # of the parameters at the state that was loaded as seen
        self._alias: tuple[int, int | None] = (0, 0)  # what is seen as what was loaded

    def name(self, state: int) -> int | None:
        """Returns what the present state is called here: by its digest, or that at an earlier run.

        Of a sharded model digests depend on which rank has what of it, and it may have been saved
        on other ranks. So one that does not depend on that is saved too, and compared up to the
        first look: all ranks ask at once.
        """
        if self._loaded is not None and self._loaded == self._operator.parameters.digest_of_whole():
            self._alias, self._loaded = (state, self._seen), None
        return self._alias[1] if state == self._alias[0] else state

    def number(self, state: int) -> int:
        """Returns the number of the present state, without counting it."""
        if self.name(state) == self._seen:
            return self._seen_at
        return max(self.now + self._moved, self._seen_at + 1)

    def look(self, state: int | None = None) -> int:
        """Counts the present state, if it is a new one, and returns its number.

        Args:
            state: its digest (default: that of the operator's state).
        """
        if state is None:
            state = hash(self._operator.state())
        self.now = self.number(state)
        self._seen, self._seen_at, self._moved = self.name(state), self.now, False
        self._loaded = None
        self.looks += 1
        return self.now

    def begin(self) -> None:
        """Tells that a step begins: if the one before has moved anything, this is another state."""
        self.now += self._moved
        self._moved = False

    def moved(self) -> None:
        """Tells that the parameters have changed since the step began."""
        self._moved = True

    def on_any_rank(self, holds: bool) -> bool:
        """Whether it holds on any rank that has some of the coordinates."""
        space = self._operator.parameters
        flag = torch.tensor(float(holds), dtype=torch.float64, device=space.device)
        return bool(space.inner.sum(flag))

    def state_dict(self) -> dict[str, int | None]:
        """Returns the count as a resumed run takes it up, a step that was told of included."""
        entries = {
            "clock": self.now + self._moved,
            "state": self._seen,
            "state_clock": self._seen_at,
        }
        space = self._operator.parameters
        if space.layout is not None:
            present = self.name(hash(self._operator.state()))
            entries["whole"] = space.digest_of_whole() if present == self._seen else None
        return entries

    def load(self, now: int, seen: int | None, seen_at: int, whole: int | None = None) -> None:
        """Takes the entries of ``state_dict()``; those that follow steps then look first."""
        self.now, self._seen, self._seen_at, self._moved = now, seen, seen_at, False
        self._loaded, self._alias = whole, (0, 0)
        self.looks += 1


class StepTeller:
    """Tells a count of the steps of optimizers that are followed, at which perhaps nobody looks.

    It looks itself only where somebody else has looked outside of the steps that it follows: then
    the parameters may have moved there, or not.

    Args:
        count: the subspace's; ``None`` for one that counts no steps.
        optimizers: those that are followed, as one step.
    """

    def __init__(self, count: StepCount | None, optimizers: Sequence[Optimizer]) -> None:
        self._count = count
        self._optimizers = optimizers
        self._looks: int | None = None  # when the last step ended
        self._versions = 0  # of the parameters at the beginning of the step ...
        self._before: int | None = None  # ... and their digest, if it is needed

    def begin(self, *, looks: bool) -> None:
        """A step begins.

        Args:
            looks: whether the basis will be asked for before anything moves.
        """
        if self._count is None:
            return
        if self._count.looks == self._looks:
            self._count.begin()
        elif not looks:
            self._count.look()
        self._versions = times_written(parameters_of(*self._optimizers))
        # SAM puts back what it has moved where a gradient is not finite. A digest tells.
        returns = any(map(in_two_calls, self._optimizers))
        self._before = self._digest() if returns and not looks else None

    def end(self, moved: bool | None = None) -> None:
        """The step has ended.

        Args:
            moved: whether it has changed the parameters; ``None`` if the caller has not measured.
        """
        if self._count is None:
            return
        if moved is None and self._before is not None:
            moved = self._count.on_any_rank(self._digest() != self._before)
        if moved is None:
            # Fused optimizers, and those that write to `p.data`, leave no trace in the versions.
            parameters = parameters_of(*self._optimizers)
            has_gradient = any(p.grad is not None for p in parameters)
            moved = has_gradient or times_written(parameters) != self._versions
        if moved:
            self._count.moved()
        self._looks = self._count.looks

    def _digest(self) -> int:
        return int(digest(parameters_of(*self._optimizers)))

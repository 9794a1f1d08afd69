"""``JointSteps``: optimizers that step in turn, as one step with a beginning and an end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import ASGD, Optimizer, Rprop

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.parameters import ParameterSpace


def optimizers_of(argument: Any, space: ParameterSpace) -> list[Optimizer]:
    """Returns one optimizer, or a sequence of them, as a list.

    Raises:
        ArgumentError: there is none, one is no torch optimizer or is there twice, or none of its
            parameters is in ``space``.
    """
    optimizers = list(argument) if isinstance(argument, Iterable) else [argument]
    for each in optimizers:
        if not isinstance(each, Optimizer):
            kind = type(each).__name__
            raise ArgumentError("optimizer", kind, "a torch.optim.Optimizer, or several")
    if not optimizers:
        raise ArgumentError("optimizer", "an empty sequence", "at least one optimizer")
    if len({id(each) for each in optimizers}) < len(optimizers):
        raise ArgumentError("optimizer", f"a sequence of {len(optimizers)}", "without repetition")
    known = {id(p) for p in space.tensors}
    for each in optimizers:
        if not any(id(p) in known for group in each.param_groups for p in group["params"]):
            remedy = "Build operator and subspace from the model that the optimizer trains."
            raise ArgumentError("optimizer", "of another model", "one of the subspace's", remedy)
    return optimizers


class JointSteps:
    """Calls ``begin`` before the first of some optimizers steps, ``end`` after the last has.

    It works through torch's public step hooks. A step that moves nothing is none: one with all
    rates zero prepares a checkpoint, and one with infinities is skipped by the gradient scaler
    inside of a fused optimizer. A round does not wait for an optimizer whose gradients are not
    finite, since the scaler skips it, and if one steps again before the others have, the round ends
    there and another begins. A step that raised is begun anew. The step of a subclass that calls
    ``super().step()`` is one step, though torch calls the hooks of both.

    Args:
        optimizers: which of them.
        begin: before anything of the round has moved.
        end: after all of it has.
        last: ``end`` comes after the hooks that others have registered, in whatever order.

    Attributes:
        watchful: whether a round may end early, where the scaler will skip what is left of it. To
            see that takes a pass over the gradients.
    """

    def __init__(
        self,
        optimizers: list[Optimizer],
        begin: Callable[[], None],
        end: Callable[[], None],
        *,
        last: bool,
    ) -> None:
        self.optimizers = optimizers
        self._begin, self._end, self._last = begin, end, last
        self.watchful = True
        self._round: set[int] = set()  # those that step in this round ...
        self._waiting: set[int] = set()  # ... and those of them that have still to
        self._before = [each.register_step_pre_hook(self._pre) for each in optimizers]
        self._after = {id(each): each.register_step_post_hook(self._post) for each in optimizers}

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in (*self._before, *self._after.values()):
            handle.remove()
        self._before, self._after, self._waiting = [], {}, set()

    def finish(self) -> None:
        """Ends a round of which some have stepped."""
        if self._waiting and self._waiting != self._round:
            self._waiting = set()
            self._end()

    def _pre(self, optimizer: Optimizer, *_: object) -> None:
        moving = {id(each) for each in self.optimizers if _moves(each)}
        if id(optimizer) not in moving or _is_nested(optimizer):
            return
        if self._last and not self._comes_last(optimizer):
            self._after[id(optimizer)].remove()
            self._after[id(optimizer)] = optimizer.register_step_post_hook(self._post)
        if self._waiting and self._waiting != self._round:
            if id(optimizer) in self._waiting:
                return
            self.finish()
        self._round = moving
        self._waiting = set(self._round)
        try:
            self._begin()
        except BaseException:
            self._waiting = set()
            raise

    def _comes_last(self, optimizer: Optimizer) -> bool:
        """Whether no hook was registered after ours: they run in the order of registration."""
        hooks = optimizer._optimizer_step_post_hooks  # noqa: SLF001 (no public way to look)
        return next(reversed(hooks), None) == self._after[id(optimizer)].id

    def _post(self, optimizer: Optimizer, *_: object) -> None:
        if id(optimizer) not in self._waiting or _is_nested(optimizer):
            return
        self._waiting.discard(id(optimizer))
        waiting = [each for each in self.optimizers if id(each) in self._waiting]
        if waiting and not self.watchful:
            return
        if not any(_is_finite(each) for each in waiting):
            self._waiting = set()
            self._end()


def _moves(optimizer: Optimizer) -> bool:
    """Whether a step can change anything."""
    found: Any = getattr(optimizer, "found_inf", None)  # set by the scaler, for fused optimizers
    if isinstance(found, Tensor) and bool(found):
        return False
    if isinstance(optimizer, _OWN_RATES) and optimizer.state:
        return True
    rates = [group.get("lr") for group in optimizer.param_groups]
    return any(rate is None or float(rate) != 0 for rate in rates)


def _is_finite(optimizer: Optimizer) -> bool:
    """Whether all of its gradients are finite."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    finite = [gradient.isfinite().all() for gradient in gradients if gradient is not None]
    return not finite or bool(torch.stack(finite).all())


_OWN_RATES = (ASGD, Rprop)  # the rate of the step before, and one for each coordinate
_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__  # of what torch wraps step() in


def _is_nested(optimizer: Optimizer) -> bool:
    """Whether a hook is called for ``super().step()``, inside of the optimizer's own step."""
    frame, depth = sys._getframe(1), 0  # noqa: SLF001
    while frame is not None:
        if frame.f_code is _HOOKED:
            depth += frame.f_locals["args"][:1] == (optimizer,)
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1

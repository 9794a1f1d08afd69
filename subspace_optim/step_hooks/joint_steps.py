"""``JointSteps``: optimizers that step in turn, as one step with beginning and end."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import wraps
from types import MethodType
from typing import Any, TypeVar

import torch
from torch.optim import Optimizer

from subspace_optim._inner_product import InnerProduct
from subspace_optim._validation import UnseenStepsWarning
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.dtensors import local
from subspace_optim.curvature.parameters import ParameterSpace, times_written
from subspace_optim.step_hooks.optimizers import (
    Followed,
    moves,
    outside_autocast,
    parameters_of,
)

Owner = TypeVar("Owner")


class JointSteps:
    """Calls ``begin`` before the first of several optimizers steps, and ``end`` after the last.

    It works through torch's public step hooks. One step of each optimizer is a *round*:

    - A step that moves nothing does not count: with all rates zero it prepares a checkpoint, and
      with infinities the gradient scaler skips it inside of a fused optimizer.
    - A round does not wait for an optimizer whose gradients are not finite, since the scaler skips
      it. If an optimizer steps again before the others have, the round ends and another begins.
    - The step of a subclass that calls ``super().step()`` is one step, and so is that of an
      optimizer which steps another inside.
    - A step that raises is undone.

    ``begin``, ``end`` and ``undo`` are called outside of autocast.

    Args:
        optimizers: which of them.
        space: the parameters that are looked at.
        owner: whom the steps are followed for.
        begin: before anything of the round has moved.
        end: after all of it has.
        undo: after an exception, wherever it was raised.
        last: ``end`` comes after the hooks that others have registered, in whatever order.

    Attributes:
        optimizers: the outermost ones.
        owner: as given.
        closure: whether the step that begins was called with a closure.
        watchful: whether a round may end early, where the scaler will skip what is left of it. To
            see that takes a pass over the gradients.
    """

    def __init__(
        self,
        optimizers: list[Followed],
        space: ParameterSpace,
        *,
        owner: object,
        begin: Callable[[], None],
        end: Callable[[], None],
        undo: Callable[[], None],
        last: bool,
    ) -> None:
        self.optimizers = [each.optimizer for each in optimizers]
        self.owner = owner
        self.watchful = True
        self.closure = False
        self._begin, self._end, self._undo, self._last = begin, end, undo, last
        self._device, self._inner = space.device, space.inner
        self._round: set[int] = set()  # those that step in this round ...
        self._waiting: set[int] = set()  # ... and those of them that have still to
        held = set(map(id, parameters_of(*self.optimizers)))
        self._watched = [p for p in space.tensors if id(p) in held]
        self._start: int | None = int(digest(self._watched))  # until a step is seen
        self._wrapped = any(each.wrapped for each in optimizers)
        self._left: int | None = None  # the versions of the parameters after the latest step
        self._removed = False
        self._of = {id(member): each for each in optimizers for member in each.members}
        members = [member for each in optimizers for member in each.members]
        for each in members:
            _guard(each)
        self._before = [each.register_step_pre_hook(self._pre) for each in members]
        self._after = {id(each): each.register_step_post_hook(self._post) for each in members}

    def remove(self) -> None:
        """Takes the hooks off; of a step that is under way, after it."""
        self._removed, self._waiting, self._start = True, set(), None
        if not any(each.calls for each in self._of.values()):
            for handle in (*self._before, *self._after.values()):
                handle.remove()

    def finish(self) -> None:
        """Ends a round of which some have stepped."""
        if self._waiting and self._waiting != self._round:
            self._call(self._end)

    def check(self) -> None:
        """Warns once if the parameters have moved and no step was seen."""
        if self._start is not None and int(digest(self._watched)) != self._start:
            self._start = None
            message = (
                f"The parameters have moved since {type(self.owner).__name__} was attached, but no "
                f"step of {self._kinds} was seen. If a checkpoint was loaded, all is well; if the "
                "model was trained, another optimizer did it, a copy of this one, or a compiled "
                "step: attach it to the optimizer whose step() is called."
            )
            warnings.warn(message, UnseenStepsWarning, stacklevel=3)

    def _check_wrapper(self) -> None:
        """Warns once if a wrapper moves the parameters itself, between steps that it passes on."""
        if self._left is None or self._left == times_written(self._watched):
            return
        self._wrapped, self._left = False, None
        message = (
            f"The parameters move between the steps of {self._kinds}, which was given inside of a "
            f"wrapper: what moves them there is not seen by {type(self.owner).__name__}. If a "
            "checkpoint was loaded, all is well; a wrapper that moves them itself, as Lookahead "
            "does, has to be a torch.optim.Optimizer with a state of its own."
        )
        warnings.warn(message, UnseenStepsWarning, stacklevel=3)

    @property
    def _kinds(self) -> str:
        return ", ".join(type(each).__name__ for each in self.optimizers)

    def forget(self) -> None:
        """Takes the parameters as they are now for those of the attachment."""
        if self._start is not None:
            self._start = int(digest(self._watched))

    def enter(self, optimizer: Optimizer) -> None:
        """``step()`` was called."""
        self._of[id(optimizer)].calls += 1

    def leave(self, optimizer: Optimizer, *, failed: bool) -> None:
        """It has returned, or raised."""
        followed = self._of[id(optimizer)]
        followed.calls -= 1
        if followed.calls:
            return
        followed.hooks = 0
        if self._removed:
            self.remove()
        if failed:
            self._waiting = set()
            with outside_autocast(self._device):
                self._undo()
        if self._wrapped:
            self._left = times_written(self._watched)

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        followed = self._of[id(optimizer)]
        if not followed.calls:  # it was called past the guard, so that an exception is not seen
            followed.hooks = 0
        followed.hooks += 1
        if followed.hooks > 1 or self._removed:
            return
        self._start = None
        moving = {id(each) for each in self.optimizers if moves(each)}
        own = id(followed.optimizer)
        if own not in moving:
            return
        if self._last and not self._comes_last(optimizer):
            self._after[id(optimizer)].remove()
            self._after[id(optimizer)] = optimizer.register_step_post_hook(self._post)
        if self._waiting and self._waiting != self._round:
            if own in self._waiting:
                return
            self.finish()
        self._round = moving
        self._check_wrapper()
        self.closure = any(map(callable, (*args[1:], *kwargs.values())))
        self._call(self._begin)
        self._waiting = set(moving)

    def _comes_last(self, optimizer: Optimizer) -> bool:
        """Whether no hook was registered after ours: they run in the order of registration."""
        hooks = optimizer._optimizer_step_post_hooks  # noqa: SLF001 (no public way to look)
        return next(reversed(hooks), None) == self._after[id(optimizer)].id

    def _post(self, optimizer: Optimizer, *_: object) -> None:
        followed = self._of[id(optimizer)]
        followed.hooks -= 1
        own = id(followed.optimizer)
        if followed.hooks or own not in self._waiting:
            return
        self._waiting.discard(own)
        waiting = [each for each in self.optimizers if id(each) in self._waiting]
        if waiting and not self.watchful:
            return
        if not any(_is_finite(each, self._inner) for each in waiting):
            self._call(self._end)

    def _call(self, part: Callable[[], None]) -> None:
        self._waiting = set()
        with outside_autocast(self._device):
            try:
                part()
            except BaseException:
                self._undo()
                raise


def owners_of(optimizers: Iterable[Followed], kind: type[Owner]) -> list[Owner]:
    """Returns those of one class for whom the steps of any optimizer are followed already."""
    members = [each for followed in optimizers for each in followed.members]
    owners = dict.fromkeys(steps.owner for each in members for steps in _followers(each))
    return [owner for owner in owners if isinstance(owner, kind)]


def _followers(optimizer: Optimizer) -> list[JointSteps]:
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {}).values()
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, JointSteps)]


def _guard(optimizer: Optimizer) -> None:
    """Lets those that follow ``optimizer.step`` know of its beginning and its exceptions.

    Torch's hooks know no exceptions. They are made to fire, too, where a class keeps torch from
    wrapping its ``step``, by not calling ``super().__init__()``.
    """
    for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if name not in vars(optimizer):
            setattr(optimizer, name, OrderedDict())
    step: Any = optimizer.step
    if getattr(step, "guarded", False):
        return

    @wraps(step)
    def unbound(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    function = getattr(step, "__func__", unbound)  # not a method where a scheduler has wrapped it
    if not getattr(step, "hooked", False):
        function = Optimizer.profile_hook_step(function)

    @wraps(function)
    def guarded(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        followers, failed = _followers(optimizer), True
        for each in followers:
            each.enter(optimizer)
        try:
            result = function(optimizer, *args, **kwargs)
            failed = False
        finally:
            for each in followers:
                each.leave(optimizer, failed=failed)
        return result

    guarded.guarded = guarded.hooked = True  # type: ignore[attr-defined]
    optimizer.step = MethodType(guarded, optimizer)  # type: ignore[method-assign]


def _is_finite(optimizer: Optimizer, inner: InnerProduct) -> bool:
    """Whether all of its gradients are finite."""
    gradients = [p.grad for p in parameters_of(optimizer)]
    finite = [local(gradient).isfinite().all() for gradient in gradients if gradient is not None]
    return not finite or not inner.sum(torch.stack(finite).all().logical_not().double())

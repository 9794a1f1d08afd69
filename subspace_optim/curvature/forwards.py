"""What a model was called with in training, taken by a hook that stands in nobody's way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from subspace_optim.curvature.surroundings import ALONE


class Call(NamedTuple):
    """The arguments that a model was called with; ``call(model)`` calls it with them again.

    Attributes:
        args: those by position.
        kwargs: those by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, model: Callable[..., Any]) -> Any:
        """Returns ``model(*args, **kwargs)``."""
        return model(*self.args, **self.kwargs)


class Taking:
    """A forward pre-hook that hands on the calls of a training.

    It hands on nothing under ``no_grad``, nothing that the package itself computes, and no part
    that a backward pass computes again. Copies of the model, pickled ones too, have a hook that
    does nothing: whoever trains them makes a ``CurrentBatch`` of their own.

    Args:
        take: a bound method, called with the call; it is held weakly.
    """

    def __init__(self, take: Callable[[Call], None] | None = None) -> None:
        self._take = None if take is None else weakref.WeakMethod(take)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hands the call on, if it is one of a training."""
        if torch.compiler.is_compiling():  # the hook is no part of what is compiled
            return
        take = None if self._take is None else self._take()
        if take is not None and _is_of_training():
            take(Call(args, kwargs))

    def __reduce__(self) -> Any:
        return Taking, ()


def _is_of_training() -> bool:
    if not torch.is_grad_enabled() or ALONE.held_here:
        return False
    in_backward = torch._C._current_graph_task_id() != -1  # noqa: SLF001 (no public way to ask)
    in_transform = torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001
    return not in_backward and not in_transform  # its tensors are not to be used outside

"""The values that a loss takes for constants: detached, or computed without gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

_DATA: Any = Tensor.data
_STOPS = (Tensor.detach, torch.detach, _DATA.__get__)


class ReplayError(Exception):
    """The loss stops gradients in another order at other parameters."""


class StoppedGradients(TorchFunctionMode):
    """Records what a loss detaches or computes without gradients, and replays it elsewhere.

    The derivatives of the loss take these values for constants. A difference of gradients agrees
    with the derivatives only if the loss has the same constants at the other parameters too.

    Attributes:
        recorded: each function that stopped a gradient, and what it returned, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Any] = []
        self._replayed: Iterator[Any] | None = None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Returns the recorded values where a gradient is stopped inside."""
        self._replayed = iter(self.recorded)
        try:
            with self:
                yield
        finally:
            self._replayed = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result: Any
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        stops = func in _STOPS or not torch.is_grad_enabled()
        if not stops or not any(t.requires_grad for t in tensors):
            return func(*args, **kwargs)
        if self._replayed is None:
            result = func(*args, **kwargs)
            with torch.no_grad():
                self.recorded.append((func, tree_map(copied, result)))
            return result
        noted: Any = next(self._replayed, (None, None))
        known, held = noted
        if known is not func:
            raise ReplayError
        written = kwargs.get("out", args[0] if args else None)  # by functions that write
        if not isinstance(written, Tensor):
            return held
        return written.copy_(held) if func(*args, **kwargs) is written else held


def copied(leaf: Any) -> Any:
    """Returns a copy of a tensor, since a view would hold the whole batch; other leaves as is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf

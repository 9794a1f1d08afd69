"""A tensor operation that fails: what is left after it must be whole."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Fails(TorchDispatchMode):
    """Raises in the place of the n-th operation, if there are as many; 0: of none."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        if self.seen == self.at:
            raise self.error
        return func(*args, **(kwargs or {}))


class FailsAfter(TorchFunctionMode):
    """Raises after the n-th call with tensors has returned, as an interrupt does."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.at, self.error, self.seen = at, error, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += bool(args) and isinstance(args[0], torch.Tensor | list)  # no switch of modes
        if self.seen == self.at:
            self.seen += 1  # once
            raise self.error
        return result

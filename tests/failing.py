"""A tensor operation that fails: what is left after it must be whole."""

from typing import Any

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

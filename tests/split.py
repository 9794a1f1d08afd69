"""Vectors that are split over ranks: the ranks are threads, and nothing is communicated.

Each rank runs the same function with the columns that lie on it. What it draws for its coordinates
are its columns of what one process draws for all of them, so that all that is found has to be what
``WHOLE`` finds, up to the order of sums.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode

from subspace_optim._inner_product import InnerProduct

_T = TypeVar("_T")
_OF_COORDINATES = 1 << 40
"""Is added to the seeds of what is drawn for coordinates, so that it can be told from the rest."""
_PATIENCE = 10.0


class _Meeting:
    """Where the ranks put what they have, and take what all have put there."""

    def __init__(self, ranks: int) -> None:
        self._barrier = threading.Barrier(ranks)
        self._table: list[Any] = [None] * ranks

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._table[rank] = value
        self._barrier.wait(_PATIENCE)
        found = list(self._table)
        self._barrier.wait(_PATIENCE)
        return found

    def abort(self) -> None:
        self._barrier.abort()


class SplitInnerProduct(InnerProduct):
    """One rank's, which holds some columns of all vectors.

    Attributes:
        rank: which one it is.
        columns: that lie on it.
        calls: of ``sum``, so far.
    """

    def __init__(self, meeting: _Meeting, rank: int, sizes: Sequence[int]) -> None:
        self._meeting, self.rank, self._sizes = meeting, rank, list(sizes)
        self._before = sum(sizes[:rank])
        self.columns = slice(self._before, self._before + sizes[rank])
        self.calls = 0

    def sum(self, partial: Tensor) -> Tensor:
        self.calls += 1
        parts = self._meeting.exchange(self.rank, partial.detach().clone())
        kinds = {(part.shape, part.dtype) for part in parts}
        assert len(kinds) == 1, f"the ranks sum different things: {kinds}"
        return torch.stack(parts).sum(0)

    def size(self, here: int) -> int:
        assert here == self._sizes[self.rank]
        return sum(self._sizes)

    def here(self, size: int) -> int:
        assert size == sum(self._sizes)
        return self._sizes[self.rank]

    def before(self, size: int) -> int:
        assert size == sum(self._sizes)
        return self._before

    def seed(self, seed: int) -> int:
        return seed + _OF_COORDINATES

    # What a function of the columns here is made of in a test.

    def mine(self, vectors: Tensor) -> Tensor:
        """Returns the columns that lie here, of all."""
        return vectors[..., self.columns].clone()

    def whole(self, vectors: Tensor) -> Tensor:
        """Returns all columns, of those that lie here; as all ranks have to at once."""
        parts = self._meeting.exchange(self.rank, vectors.detach().clone())
        return torch.cat(parts, dim=-1)

    def products(self, matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Returns products with a matrix that takes and returns all columns."""
        return lambda vectors: self.mine(matrix(self.whole(vectors)))


class Unsplit(InnerProduct):
    """That of one process, ``WHOLE``, with the same methods: the truth."""

    columns = slice(None)

    def mine(self, vectors: Tensor) -> Tensor:
        return vectors.clone()

    def whole(self, vectors: Tensor) -> Tensor:
        return vectors.clone()

    def products(self, matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return matrix


Either = SplitInnerProduct | Unsplit


class _Draws(TorchFunctionMode):
    """Draws for all coordinates where those of one rank are asked for, and returns its own."""

    def __init__(self, inner: SplitInnerProduct, size: int) -> None:
        super().__init__()
        self._inner, self._size = inner, size
        self._generators: dict[int, tuple[Any, torch.Generator]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = kwargs.get("generator")
        if func not in (torch.randn, torch.randint) or given is None:
            return func(*args, **kwargs)
        if given.initial_seed() < _OF_COORDINATES:
            return func(*args, **kwargs)
        if id(given) not in self._generators:
            seed = given.initial_seed() - _OF_COORDINATES
            own = torch.Generator(given.device).manual_seed(seed)
            self._generators[id(given)] = (given, own)
        *rest, last = args
        # The sizes come one by one, or as a tuple: the columns are the last of them.
        columns = last[-1] if isinstance(last, tuple) else last
        if columns != self._inner.here(self._size):  # of some of the coordinates: its own draws
            given.manual_seed(given.initial_seed() + 1 + self._inner.rank)
            return func(*args, **kwargs)
        last = (*last[:-1], self._size) if isinstance(last, tuple) else self._size
        drawn = func(*rest, last, **kwargs | {"generator": self._generators[id(given)][1]})
        return self._inner.mine(drawn)


def on_ranks(sizes: Sequence[int], function: Callable[[SplitInnerProduct], _T]) -> list[_T]:
    """Returns what the function returns on each rank; what one raises is raised.

    Args:
        sizes: the columns of each rank, in order.
        function: is called with the rank's inner product.
    """
    meeting = _Meeting(len(sizes))
    results: list[Any] = [None] * len(sizes)
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        inner = SplitInnerProduct(meeting, rank, sizes)
        try:
            with _Draws(inner, sum(sizes)):
                results[rank] = function(inner)
        except threading.BrokenBarrierError as error:
            errors.append(error)
            meeting.abort()
        except BaseException as error:  # noqa: BLE001 (raised below)
            errors.insert(0, error)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def unlocked(*classes: type) -> None:
    """Takes the locks off their cached properties, which up to Python 3.11 all objects share.

    A rank that sums inside of one would keep the others, which are threads, from getting there.
    """
    for each in classes:
        for attribute in vars(each).values():
            if isinstance(attribute, cached_property):
                vars(attribute)["lock"] = nullcontext()


def alike(results: Sequence[_T]) -> _T:
    """Returns what all ranks have found, bit for bit: plain numbers, and tensors of them."""
    first = results[0]
    for other in results[1:]:
        if isinstance(first, Tensor):
            torch.testing.assert_close(first, other, rtol=0, atol=0, equal_nan=True)
        else:
            assert first == other
    return first


def joined(results: Sequence[Tensor]) -> Tensor:
    """Returns all columns of what each rank has found for its own."""
    return torch.cat(list(results), dim=-1)


def splits(size: int) -> st.SearchStrategy[list[int]]:
    """Two to four ranks, of any numbers of columns that add up to ``size``; some may have none."""
    ends = st.lists(st.integers(0, size), min_size=1, max_size=3).map(sorted)
    return ends.map(lambda ends: [b - a for a, b in zip([0, *ends], [*ends, size], strict=True)])

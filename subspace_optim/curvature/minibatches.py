"""Minibatches of the data of an operator, in a random order, as a training on them sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.samples import rows_of, taken

_FIRST, _MOST = 8, 32
"""Batches that the first pass over the data looks for, and at most that any does."""

_Item = TypeVar("_Item")
Read = Callable[[], Iterator[Any]]
"""Begins a pass over the data."""


def own_batches(read: Read, count: int, seed: int) -> Iterator[tuple[int, Any]]:
    """Yields the batches of the data in a random order, each once, with its number.

    A pass over the data looks for several, which are held until they are yielded: data that are
    made anew in each pass are not read once for every batch.

    Args:
        read: begins a pass.
        count: of the batches.
        seed: of the order.
    """
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(seed)).tolist()
    for some in _rounds(iter(order)):
        wanted = set(some)
        found = {i: batch for i, batch in enumerate(read()) if i in wanted}
        for i in some:
            yield i, found.pop(i)


def drawn_batches(
    read: Read, rows: list[int], batch_size: int, seed: int
) -> Iterator[tuple[int, Any]]:
    """Yields batches of rows drawn from all of the data, without an end, each with its number.

    They are drawn without replacement until fewer than ``batch_size`` rows are left, and then
    anew from all, as by a loader that shuffles and drops the last batch.

    Args:
        read: begins a pass.
        rows: of each batch of the data.
        batch_size: rows of each batch that is drawn, at most all that there are.
        seed: of the draws.
    """
    starts = [0, *accumulate(rows)]
    number = 0
    for groups in _rounds(_draws(starts[-1], batch_size, seed)):
        parts: list[list[Any]] = [[] for _ in groups]
        for start, end, batch in zip(starts, starts[1:], read(), strict=False):
            for group, found in zip(groups, parts, strict=True):
                inside = group[(group >= start) & (group < end)] - start
                if len(inside):
                    found.append(taken(batch, inside))
        for pieces in parts:
            yield number, _joined(pieces)
            number += 1


def rows_of_all(batches: Iterator[Any], batch_size: int) -> list[int]:
    """Returns the rows of each batch, from which batches of ``batch_size`` can be drawn.

    Raises:
        ArgumentError: a batch has no rows, or all of them have fewer than that.
    """
    rows = [rows_of(batch) for batch in batches]
    remedy = "Leave batch_size out: the batches are then those of the data."
    if 0 in rows:
        found = f"{batch_size}, and batch {rows.index(0)} of the data cannot be cut into rows"
        raise ArgumentError("batch_size", found, "None, or of tensors of one length", remedy)
    if batch_size > sum(rows):
        raise ArgumentError("batch_size", batch_size, f"at most {sum(rows)}, the examples")
    return rows


def _draws(count: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yields the numbers of the rows of each batch."""
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch_size * batch_size].split(batch_size)


def _rounds(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    """Yields the items in lists, the later ones longer: few passes, and none for a few items."""
    size, some = _FIRST, list[_Item]()
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            size, some = min(2 * size, _MOST), []
    if some:
        yield some


def _joined(pieces: list[Any]) -> Any:
    """Returns rows of several batches as one batch.

    Raises:
        ArgumentError: they cannot be joined, as those of sequences of other lengths.
    """

    def join(*leaves: Any) -> Any:
        if isinstance(leaves[0], Tensor):
            return torch.cat(leaves)
        if any(leaf != leaves[0] for leaf in leaves):
            raise ValueError
        return leaves[0]

    if len(pieces) == 1:
        return pieces[0]
    try:
        return tree_map(join, *pieces)
    except (RuntimeError, ValueError, TypeError) as error:
        remedy = "Leave batch_size out: the batches are then those of the data."
        found, allowed = "of rows that cannot be joined", "alike, where rows are drawn from all"
        raise ArgumentError("the batches of data", found, allowed, remedy) from error

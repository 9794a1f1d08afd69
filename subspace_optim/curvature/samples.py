"""Samples of the data of an operator: some of its batches, or rows of its only one.

They are drawn without replacement by a seed, and a larger sample holds the smaller one of the same
seed. A batch is cut into rows only where its loss is the mean over them: not where examples are
coupled, as by batch statistics, dropout masks or a contrastive loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from subspace_optim.curvature.averages import examples
from subspace_optim.curvature.structure import tensors

PIECES = 8
"""The batches that rows of one batch are dealt to: enough to see how they scatter."""
_LEAST = 2
"""The fewest examples of such a batch."""
_FEW = (24, 15)
"""Examples of the two parts on which it is looked at whether a batch may be cut."""
_COUPLED = 1e-3
"""Relative difference between the gradient of a batch and the mean of its parts', at most."""


class Drawn(NamedTuple):
    """The data of a sample.

    Attributes:
        batches: to compute with.
        pieces: the same examples, in batches that tell how they scatter.
    """

    batches: list[Any]
    pieces: list[Any]


def size_of(batch: Any) -> int:
    """Returns the number of examples of a batch: of a pair, or the length of its first tensor."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return examples(*batch)
    return next((len(t) for t in tensors(batch) if t.dim()), 1)


def some_batches(sizes: list[int], share: float, seed: int) -> list[int]:
    """Returns the numbers of the batches of a sample of at least this share of the examples."""
    order = torch.randperm(len(sizes), generator=_generator(seed)).tolist()
    wanted, taken, chosen = share * sum(sizes), 0, []
    for index in order:
        if taken >= wanted:
            break
        chosen.append(index)
        taken += sizes[index]
    return sorted(chosen)


def some_rows(batch: Any, share: float, seed: int, pieces: int) -> Drawn:
    """Returns a sample of the rows of a batch that can be cut: together, and dealt to pieces."""
    size = rows_of(batch)
    wanted = min(size, max(_LEAST * pieces, math.ceil(share * size)))
    rows = torch.randperm(size, generator=_generator(seed))[:wanted]
    parts = [taken(batch, part) for part in rows.tensor_split(min(pieces, wanted))]
    return Drawn([taken(batch, rows)], parts)


def dealt(count: int, groups: int, seed: int, first: int = 0) -> list[int]:
    """Returns the group of each of so many batches, at random and in groups of like numbers.

    At random, because data may come in an order: groups of every ``groups``-th batch would be more
    alike than what is drawn is.

    Args:
        count: of batches.
        groups: at most.
        seed: of the deal.
        first: the group that is dealt to first.
    """
    order = torch.randperm(count, generator=_generator(seed))
    found: list[int] = ((order + first) % groups).tolist()
    return found


def has_few_rows(batch: Any) -> bool:
    """Whether a batch has so few rows, or none, that it is not cut."""
    return rows_of(batch) < max(_LEAST * PIECES, sum(_FEW))


def can_be_cut(
    batch: Any,
    differentiate: Callable[[Any], tuple[Tensor, Tensor]],
    norm: Callable[[Tensor], float],
) -> bool:
    """Whether the loss of a batch of many rows is the weighted mean of those of parts of it.

    Args:
        batch: of the data.
        differentiate: returns the weight of a batch, and the gradient of its mean loss.
        norm: of a gradient.
    """
    ends = (0, _FEW[0], sum(_FEW))
    parts = [taken(batch, slice(*part)) for part in pairwise(ends)]
    whole = taken(batch, slice(ends[-1]))
    try:
        (weight, gradient), *others = map(differentiate, (whole, *parts))
    except Exception:  # noqa: BLE001 (a loss of batches of one size only)
        return False
    mean = sum(w * g for w, g in others) / weight
    return norm(gradient - mean) <= _COUPLED * norm(gradient)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def rows_of(batch: Any) -> int:
    """Returns the one length of all tensors in a batch; 0 of one that has no rows."""
    leaves = tree_leaves(batch)
    if not all(isinstance(leaf, Tensor | int | float | str | None) for leaf in leaves):
        return 0
    held = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    lengths = {len(t) if t.dim() and t.layout == torch.strided else 0 for t in held}
    return lengths.pop() if len(lengths) == 1 else 0


def taken(batch: Any, rows: Tensor | slice) -> Any:
    """Returns some rows of a batch: copies of those of a tensor of indices, a view of a slice."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf[rows if isinstance(rows, slice) else rows.to(leaf.device)]

    return tree_map(of, batch)


def drawn(
    batches: Callable[[], Iterator[Any]],
    sizes: list[int],
    share: float,
    seed: int,
    may_be_cut: Callable[[Any], bool],
    pieces: int = PIECES,
) -> Drawn | None:
    """Returns a sample; ``None`` of one batch that cannot be cut.

    Args:
        batches: begins a pass over the data.
        sizes: the examples of each batch.
        share: of the examples, at least.
        seed: of the draw.
        may_be_cut: whether the only batch can be.
        pieces: that its rows are dealt to.
    """
    if len(sizes) > 1:
        chosen = set(some_batches(sizes, share, seed))
        kept = [batch for index, batch in enumerate(batches()) if index in chosen]
        return Drawn(kept, kept)
    only = next(batches())
    return some_rows(only, share, seed, pieces) if may_be_cut(only) else None

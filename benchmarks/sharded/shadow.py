"""A solve that was measured: what it has read decides how a solve of a larger model goes.

How many products a solve takes depends on the spectrum, which a model of no memory has not. So a
small decoder is trained and solved, with all that depends on P told that of the large model; the
small matrices that this solve reads are what the other one reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import subspace_optim as so
from benchmarks.architectures import next_token_loss
from benchmarks.sharded.dry import Recorder
from benchmarks.sharded.models import Shape, made
from benchmarks.text import windows
from subspace_optim._inner_product import InnerProduct
from subspace_optim.linalg import top_eigenpairs

_STEPS = 60
_WINDOWS = 32


@dataclass(frozen=True)
class Solved:
    """A solve.

    Attributes:
        products: that it took.
        eigenvalues: that it found.
        read: the matrices that it has read, in order.
    """

    products: int
    eigenvalues: list[float]
    read: list[np.ndarray[Any, Any]]


class _Pretended(InnerProduct):
    """Of vectors that are shorter than they are said to be."""

    def __init__(self, size: int, here: int) -> None:
        self._size, self._here = size, here

    def size(self, here: int) -> int:  # noqa: ARG002
        """Returns what is said."""
        return self._size

    def here(self, size: int) -> int:  # noqa: ARG002
        """Returns what is."""
        return self._here


def solved(matmat: Callable[[Tensor], Tensor], here: int, size: int, k: int) -> Solved:
    """Solves a matrix, as if it were of another size.

    Args:
        matmat: its products.
        here: its size.
        size: that it is said to have.
        k: how many pairs.
    """
    with Recorder(2 * k + 6) as recorder:
        solution = top_eigenpairs(matmat, size, k, inner=_Pretended(size, here))
    return Solved(solution.products, solution.basis.eigenvalues.tolist(), recorder.seen)


def trained(shape: Shape, data_root: str | None = None) -> tuple[so.HessianOperator, str]:
    """Returns the Hessian of a small decoder after some steps of AdamW, and where its text is from.

    Args:
        shape: of the decoder.
        data_root: folder of data sets.
    """
    text = windows(data_root, count=_WINDOWS, length=shape.length, vocabulary=shape.vocabulary)
    model = made(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        next_token_loss(model(text.tokens), text.following).backward()
        optimizer.step()
    data = (text.tokens, text.following)
    return so.HessianOperator(model, next_token_loss, data, verify=False), text.source

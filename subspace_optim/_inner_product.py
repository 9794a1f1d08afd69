"""``InnerProduct``: how sums over the coordinates of vectors are completed.

The vectors of a model that is sharded over several ranks are sharded with it: each rank holds some
of the coordinates, and every coordinate lies on one rank. What is done to each coordinate by
itself needs nothing else; a sum over all of them is the sum of what each rank has found.
"""

from __future__ import annotations

import torch
from torch import Tensor


class InnerProduct:
    """Of vectors whose coordinates all lie here: a sum over them is complete as it is.

    A subclass sums over ranks. Its methods are then called by all ranks in the same order, and
    return the same on all of them, bit for bit.
    """

    def sum(self, partial: Tensor) -> Tensor:
        """Returns sums over all coordinates, of those over the coordinates that lie here.

        Args:
            partial: of any shape, and no longer needed: the result may have its memory.
        """
        return partial

    def sums(self, *partial: Tensor) -> list[Tensor]:
        """Returns several sums over all coordinates, completed at once.

        Args:
            *partial: of any shapes, as of ``sum``; the results have the widest of their dtypes.
        """
        whole = self.sum(torch.cat([each.flatten() for each in partial]))
        parts = whole.split([each.numel() for each in partial])
        return [part.view(each.shape) for part, each in zip(parts, partial, strict=True)]

    def size(self, here: int) -> int:
        """Returns P, the number of coordinates of vectors of which ``here`` lie here."""
        return here

    def here(self, size: int) -> int:
        """Returns how many coordinates of a vector of P = ``size`` lie here."""
        return size

    def before(self, size: int) -> int:  # noqa: ARG002 (others look it up)
        """Returns how many coordinates of a vector of P = ``size`` lie on ranks before this one."""
        return 0

    def seed(self, seed: int) -> int:
        """Returns the seed of what is drawn for the coordinates here: each rank has its own."""
        return seed


WHOLE = InnerProduct()
"""Of vectors that lie whole in memory."""

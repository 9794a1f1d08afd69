"""``Unseen``: when it is due to look at what lies outside of a basis (``linalg.outside``).

Probes and refinements see the basis and its guard. What rises from the rest of the bulk is in
neither, and the more a basis has turned since all was last looked at, the less is known of it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from subspace_optim.subspaces.checkpoints import SavedState
from subspace_optim.subspaces.staleness import Drift

_TURNED = 1.0
"""The staleness, added up over refinements, after which it is looked at again."""
_PRODUCTS = 150
"""Products, after which it is in any case: a look takes at most 12."""
_LONGER = 3.0
"""A drift of this many times the longest of the latest is a move of a kind not seen before."""
_MEMORY = 8
"""How many the latest are."""


@dataclass(frozen=True)
class Unseen:
    """What has happened since it was last made sure that nothing outside is at the top; a value.

    Attributes:
        turned: the staleness that refinements have found and mended, added up.
        present: what the basis has now.
        products: that probes and refinements have taken.
        refined: the basis is another one since.
        unusual: there was a move that was much longer than those before, or the gaps have shrunk.
        lengths: of the latest drifts at which there was a probe or a refinement.
        level: the eigenvalue that came next after those of the basis when it was made sure.
    """

    turned: float = 0.0
    present: float = 0.0
    products: int = 0
    refined: bool = False
    unusual: bool = False
    lengths: tuple[float, ...] = ()
    level: float = -math.inf

    @property
    def is_due(self) -> bool:
        """Whether something outside may have come to the top."""
        turned = self.turned + self.present
        return self.unusual or turned > _TURNED or self.products >= _PRODUCTS

    def probed(self, drift: Drift, staleness: float, products: int, *, fallen: bool) -> Unseen:
        """Returns what is known after a probe.

        Args:
            drift: of the parameters since the last refresh.
            staleness: that was found.
            products: that it took.
            fallen: the gaps have shrunk, or an eigenvalue is below the ``level``: what was far
                below the basis may be above it now.
        """
        met = self._met(drift, products)
        unusual = met.unusual or fallen
        return replace(met, present=max(met.present, staleness), unusual=unusual)

    def turned_by(self, drift: Drift, staleness: float, products: int, *, drifted: bool) -> Unseen:
        """Returns what is known after a refinement that has found this staleness, and mended it.

        Args:
            drift: of the parameters since the last refresh.
            staleness: that was found.
            products: that it took.
            drifted: it came with the drift; else from a matrix that is known better, of the same
                parameters.
        """
        met = self._met(drift, products)
        turned = met.turned + max(met.present, staleness)
        return replace(met, turned=turned, present=0.0, refined=self.refined or drifted)

    def looked(self, level: float) -> Unseen:
        """Returns what is known after a look at what is outside, or a solve.

        Args:
            level: the largest eigenvalue that was found there.
        """
        return Unseen(lengths=self.lengths, level=level)

    def _met(self, drift: Drift, products: int) -> Unseen:
        longest, length = max(self.lengths, default=math.inf), drift.length
        return replace(
            self,
            products=self.products + products,
            unusual=self.unusual or length > _LONGER * longest,
            lengths=(*self.lengths, length)[-_MEMORY:] if length > 0 else self.lengths,
        )

    def numbers(self) -> dict[str, Any]:
        """Returns all of it, for a state dict."""
        return asdict(self) | {"lengths": list(self.lengths)}

    @classmethod
    def loaded(cls, state: SavedState) -> Unseen:
        """Returns what was saved under ``"unseen"``; ``ArgumentError`` where it cannot be."""
        saved = state.inside("unseen", [field.name for field in fields(cls)])
        return cls(
            turned=saved.number("turned", minimum=0, infinite=True),
            present=saved.number("present", minimum=0, infinite=True),
            products=saved.count("products"),
            refined=saved.flag("refined"),
            unusual=saved.flag("unusual"),
            lengths=tuple(saved.numbers("lengths", minimum=0)),
            level=saved.number("level", infinite=True),
        )

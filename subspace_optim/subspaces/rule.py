"""``RefreshRule``: the seam between a subspace and the rule that decides when it is renewed."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import COSTS, CurvatureOperator, State
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.subspaces import eigenpairs
from subspace_optim.subspaces.checkpoints import SavedState, checksum
from subspace_optim.subspaces.eigenpairs import TopPairs


@dataclass
class SubspaceStats:
    """What a basis has cost so far, and how good it is.

    Attributes:
        refreshes: times that it was made anew.
        cold: those of them that were cold solves; the others refined the basis that was there.
        probes: looks at it that did not change it.
        looks: at what is outside of it, for directions that have come to the top.
        bound: of the sine of the largest angle between the basis and the true subspace, to first
            order in the staleness, at the last refresh or probe. It is too small with a probability
            of at most 5 %; 1 where the basis was refined and nobody has looked outside since.
        estimate: of that sine at the last update: measured there, or carried forward since. Both
            are known for ``refresh="auto"`` alone, and are 1 where there is no gap.
        sampling_error: what a sample adds to the estimate: the sine, as expected with a margin, of
            the largest angle between its subspace and that of all data.
        examples: that the basis is of; ``None`` where no sample has had a part in it.
        failures: refreshes and probes that failed, and left the last basis in use.
        products: curvature products of all refreshes and probes.
        full_products: the same, each counted as the share of the data that it was over.
        gradients: gradients over the data that the kept graphs of all of these began with.
        full_gradients: the same, each counted as the share of the data that it was over.
        seconds: wall time of all of these.
    """

    refreshes: int = 0
    cold: int = 0
    probes: int = 0
    looks: int = 0
    bound: float | None = None
    estimate: float | None = None
    sampling_error: float = 0.0
    examples: int | None = None
    failures: int = 0
    products: int = 0
    full_products: float = 0.0
    gradients: int = 0
    full_gradients: float = 0.0
    seconds: float = 0.0


class Situation(NamedTuple):
    """What a rule may look at.

    Attributes:
        now: the present parameter state.
        then: that of the last refresh or probe.
        steps: of training since the last refresh.
    """

    now: State
    then: State
    steps: int


class RefreshRule(ABC):
    """Decides when a basis is renewed, and how; it holds the basis.

    This is the seam of ``DominantSubspace``, which knows who asks, what to do about failures, and
    that all ranks do the same. At an update it asks ``is_due``, and if so ``plan``, which names
    the method that renews the basis. That method is called on a ``trial``, a copy whose attributes
    the rule takes over once all has succeeded: so they are replaced there, and what they hold is
    not written into. Of ``stats`` the rule counts refreshes, cold solves and probes, and tells
    bound and estimate; the rest is the subspace's.

    A rule of your own defines ``is_due``. One that wants other vectors than the top eigenvectors
    overrides ``solve``, which ends with ``settle``. One that holds more than pairs defines
    ``numbers`` and ``take``, so that it goes on from a saved state.

    Attributes:
        operator: whose eigenpairs they are.
        k: how many.
        tol: relative residual of a solve.
        seed: of the random vectors.
        stats: what the basis has cost so far.
        basis_dtype: that vectors are held in between renewals; ``None``: the operator's.
        pairs: the eigenpairs; ``None`` before the first solve.
    """

    operator: CurvatureOperator
    k: int
    tol: float
    seed: int
    basis_dtype: torch.dtype | None

    def __init__(self) -> None:
        self.stats = SubspaceStats()
        self.pairs: TopPairs | None = None

    def attach(
        self,
        operator: CurvatureOperator,
        k: int,
        *,
        tol: float,
        seed: int,
        basis_dtype: torch.dtype | None = None,
    ) -> None:
        """Takes what it is to find: called once, by the subspace that it is given to.

        Raises:
            ArgumentError: it belongs to another subspace already, or was not set up.
        """
        if hasattr(self, "operator"):
            raise ArgumentError("refresh", "the rule of another subspace", "one of its own")
        if not hasattr(self, "pairs"):
            remedy = "Call super().__init__() in its constructor."
            raise ArgumentError("refresh", "a rule that was not set up", "one that was", remedy)
        self.operator, self.k, self.tol, self.seed = operator, k, tol, seed
        self.basis_dtype = basis_dtype

    def options(self) -> dict[str, Any]:
        """Returns what it was made with: the same on all ranks."""
        return {}

    # --- when -----------------------------------------------------------------------------------

    @abstractmethod
    def is_due(self, seen: Situation) -> bool:
        """Returns whether the basis is to be renewed, at a state where that was not yet decided.

        Each rank asks for itself: no products, and no sums over ranks but those over the
        coordinates of a sharded model, which all of its ranks take.
        """

    def plan(self, seen: Situation, *, forced: bool) -> str:  # noqa: ARG002 (other rules do)
        """Returns the name of the method that renews the basis.

        Args:
            seen: the situation.
            forced: the user asked for it, due or not.
        """
        return "solve"

    def fits(self) -> bool:
        """Whether there is a basis, in the dtype and on the device that the parameters have now."""
        operator, pairs = self.operator, self.pairs
        own = (operator.dtype, operator.device)
        return pairs is not None and (pairs.basis.dtype, pairs.basis.device) == own

    # --- how ------------------------------------------------------------------------------------

    @property
    def basis(self) -> EigenBasis | None:
        """The basis of the last refresh; ``None`` before the first."""
        return None if self.pairs is None else self.pairs.basis

    def _present(self) -> TopPairs:
        assert self.pairs is not None  # noqa: S101 (a solve comes first)
        return self.pairs

    def carry_out(self, plan: str) -> None:
        """Calls the method that ``plan`` has named.

        Raises:
            ArgumentError: it has found no pairs.
        """
        getattr(self, plan)()
        if self.pairs is None:
            found = f"what {plan}() of {type(self).__name__} has found"
            raise ArgumentError(found, "nothing", "pairs, which settle() takes")
        self.store()

    def solve(self) -> None:
        """Finds the top k eigenpairs at the present parameters, by a cold solve."""
        self.stats.cold += 1
        self.settle(eigenpairs.solve(self.operator, self.k, tol=self.tol, seed=self.seed))

    def settle(self, pairs: TopPairs) -> None:
        """Takes new pairs, of the present parameters: a refresh."""
        self.pairs = pairs
        self.stats.refreshes += 1

    def store(self) -> float:
        """Holds the vectors in ``basis_dtype`` from here on; a renewal ends with it.

        What was certified was so of the vectors as they were found: bound and estimate grow by
        what they are turned by now, the bound by all of it, the estimate as by a random direction.

        Returns:
            The sine that the basis is turned by; 0 where it is held so already.
        """
        pairs, stats = self._present(), self.stats
        self.pairs = pairs.stored(self.basis_dtype)
        turned = self.pairs.basis.rounding - pairs.basis.rounding
        if stats.bound is not None:
            stats.bound = min(1.0, stats.bound + turned)
        if stats.estimate is not None:
            stats.estimate = min(1.0, math.hypot(stats.estimate, turned))
        return turned

    def trial(self) -> Self:
        """Returns a copy to work on: what fails half-way leaves the original as it is."""
        trial = copy.copy(self)
        trial.stats = replace(self.stats)
        return trial

    def warn(self) -> None:  # noqa: B027 (a rule that has nothing to tell)
        """Warns of what the latest refresh has found; after it has been taken over."""

    # --- checkpoints ----------------------------------------------------------------------------

    def fingerprint(self) -> int:
        """Returns a number that ranks which hold the same basis have in common."""
        values = None if self.pairs is None else self.pairs.basis.eigenvalues
        stats = replace(self.stats, **dict.fromkeys(COSTS, 0), seconds=0.0)
        return checksum(self.numbers() | {"eigenvalues": values, "stats": asdict(stats)})

    def numbers(self) -> dict[str, Any]:
        """Returns what the rule knows beside the pairs, as plain numbers, for a state."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Returns what else it holds, as copies, of the same shapes whatever is known."""
        return {}

    def take(self, saved: SavedState) -> None:  # noqa: B027 (a rule that holds no more)
        """Takes what ``numbers`` and ``tensors`` gave; ``ArgumentError`` for what cannot be.

        Args:
            saved: by a rule of the same class, beside the pairs that are there already.
        """

    def adopt(self) -> None:
        """Is told, in the place of ``take``, that the pairs that are there are another rule's."""
        self.stats.bound = self.stats.estimate = None

    def state_dict(self) -> dict[str, Any]:
        """Returns copies of the eigenpairs, and what the rule knows of them."""
        own = {"kind": type(self).__name__} | self.numbers() | self.tensors()
        pairs = eigenpairs.saved(self.pairs, self.operator, self.k, self.basis_dtype)
        return pairs | {"rule": own}

    def loaded(self, state: SavedState) -> Self:
        """Returns a copy that holds what was saved; ``ArgumentError`` if that cannot be."""
        loaded = self.trial()
        loaded.stats = _loaded_stats(state)
        loaded.pairs = eigenpairs.loaded(state, self.operator, self.k)
        kind = type(self).__name__
        if state.inside("rule", {"kind"}).text("kind") == kind:
            loaded.take(state.inside("rule", {"kind", *self.numbers(), *self.tensors()}))
        else:
            loaded.adopt()
        if loaded.pairs is not None:
            loaded.store()
        return loaded


def _loaded_stats(state: SavedState) -> SubspaceStats:
    """Returns the counts that were saved.

    Raises:
        ArgumentError: one is none.
    """
    stats = state.inside("stats", [field.name for field in fields(SubspaceStats)])
    counts = ("refreshes", "cold", "probes", "looks", "failures", "products", "gradients")
    examples = stats.optional("examples", minimum=0)
    loaded = SubspaceStats(
        **{name: stats.count(name) for name in counts},
        bound=stats.optional("bound", minimum=0, maximum=1),
        estimate=stats.optional("estimate", minimum=0, maximum=1),
        sampling_error=stats.number("sampling_error", minimum=0, maximum=1),
        examples=None if examples is None else int(examples),
        full_products=stats.number("full_products", minimum=0),
        full_gradients=stats.number("full_gradients", minimum=0),
        seconds=stats.number("seconds", minimum=0),
    )
    if loaded.cold > loaded.refreshes:
        allowed = f"at most the refreshes, {loaded.refreshes}"
        raise ArgumentError("the loaded stats.cold", loaded.cold, allowed)
    return loaded

"""``project_updates``: the Dom or Bulk version of any optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from subspace_optim._validation import ArgumentError, AttachedTwiceWarning
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.optim._base import Part, restrict_, write
from subspace_optim.optim._checks import check_same
from subspace_optim.step_hooks import (
    Followed,
    JointSteps,
    optimizers_of,
    owners_of,
    parameters_of,
)
from subspace_optim.subspaces import Subspace, check_subspace, projector_of


class Projection:
    """What ``project_updates`` returns: its ``remove()`` makes the optimizers whole again."""

    def __init__(self, optimizers: list[Followed], subspace: Subspace, onto: Part) -> None:
        self.subspace, self.onto = subspace, onto
        self._before: _Before | None = None
        self._steps = JointSteps(
            optimizers,
            subspace.parameters,
            owner=self,
            begin=self._begin,
            end=self._project,
            undo=self._undo,
            last=False,
        )

    def remove(self) -> None:
        """Lets the optimizers make their own updates again."""
        self._steps.check()
        self._steps.remove()
        self._before = None

    @torch.no_grad()
    def _begin(self) -> None:
        optimizers, space = self._steps.optimizers, self.subspace.parameters
        tensors = check_same(parameters_of(*optimizers), space)
        if self._before is not None:  # the step before raised, and was called past our guard
            self._forget_pairs()
        basis, restores = projector_of(self.subspace), [_state_kept(each) for each in optimizers]
        self._before = _Before(tensors, space.flatten(tensors), basis, restores)

    @torch.no_grad()
    def _project(self) -> None:
        before = self._before
        if before is None:
            return
        update = self.subspace.parameters.flatten(before.tensors).sub_(before.theta)
        restrict_(update, before.basis, self.onto)
        self._write(before, update.add_(before.theta))
        self._forget_pairs()

    def _undo(self) -> None:
        before = self._before
        if before is None:
            return
        self._write(before, before.theta)
        for restore in before.restores:
            restore()
        self._forget_pairs()

    def _write(self, before: _Before, theta: Tensor) -> None:
        values = self.subspace.parameters.unflatten(theta)  # what fails here can still be undone
        try:
            write(before.tensors, values)
        finally:
            self._before = None

    def _forget_pairs(self) -> None:
        """Lets LBFGS begin anew: its pairs tell of moves that were not made."""
        for each in self._steps.optimizers:
            if isinstance(each, LBFGS):
                for state in each.state.values():
                    state["n_iter"] = 0


def _state_kept(optimizer: Optimizer) -> Callable[[], None]:
    """Returns a function that puts the entries of an optimizer's state back, and their counts.

    Moments that a step changes in place are not copied: that would cost as much as they do.
    """
    held = {p: dict(entries) for p, entries in optimizer.state.items()}
    values = [value for entries in held.values() for value in entries.values()]
    counts = [v for v in values if isinstance(v, Tensor) and v.numel() == 1]
    counted = [count.clone() for count in counts]

    def restore() -> None:
        state = optimizer.state
        for p in state.keys() - held.keys():
            del state[p]
        for p, entries in held.items():
            state[p].clear()
            state[p].update(entries)
        write(counts, counted)

    return restore


class _Before(NamedTuple):
    """What a step begins with."""

    tensors: list[Tensor]  # the parameters ...
    theta: Tensor  # ... their values, as one vector
    basis: EigenBasis
    restores: list[Callable[[], None]]  # of what the optimizers know


def project_updates(
    optimizer: Optimizer | Iterable[Optimizer],
    subspace: Subspace,
    onto: Part,
) -> Projection:
    r"""Projects every update of any ``torch.optim.Optimizer`` onto a subspace or its complement.

    .. math:: \theta_{t+1} = \theta_t + P_k(\theta_t)\, u_t \quad\text{or}\quad
              \theta_t + P_k^\perp(\theta_t)\, u_t

    where :math:`u_t` is the whole displacement that one ``step()`` makes, weight decay included.
    The optimizer's own buffers see the raw gradients. `song_2024` (sections 3.1 and 3.3) does so to
    SGD.

    It goes through torch's public step hooks, so that schedulers, gradient scalers, closures and
    monitors go on as before. Wrappers such as Accelerate's, Lightning's and Fabric's are followed
    to the optimizer inside; of an optimizer that steps another one, such as Lookahead, the whole
    displacement is projected. An exception in a step leaves the parameters as they were, and the
    optimizer's counts and entries; moments that it changes in place it may have begun to change,
    since a copy of them would be needed at every step.

    ``LBFGS`` moves many times in a step: its whole displacement is projected, and its memory of
    pairs is cleared, since they tell of moves that were not made.

    Args:
        optimizer: an optimizer, wrapped or not, or a sequence that together holds the parameters
            of the subspace (Muon, and AdamW for the rest): they are projected jointly, after the
            last has stepped.
        subspace: where the basis comes from, such as ``DominantSubspace``. It is asked once a
            step, before it.
        onto: ``"dominant"`` or ``"bulk"``.

    Returns:
        A handle; its ``remove()`` ends the projection. One that is there already, as where a cell
        of a notebook is run again, is removed with a warning.

    Raises:
        ArgumentError: an argument is of the wrong kind, or a parameter is held by one side alone.
    """
    if onto not in ("dominant", "bulk"):
        raise ArgumentError("onto", onto, "'dominant' or 'bulk'")
    check_subspace(subspace, projects=True)
    space = subspace.parameters
    optimizers = optimizers_of(optimizer, space)
    check_same(parameters_of(*(each.optimizer for each in optimizers)), space)
    before = owners_of(optimizers, Projection)
    for each in before:
        each.remove()
    projection = Projection(optimizers, subspace, onto)
    if before:
        message = (
            f"The optimizer was projected already, onto={before[0].onto!r}. That projection is "
            f"removed, as by its handle.remove(); onto={onto!r} takes its place."
        )
        warnings.warn(message, AttachedTwiceWarning, stacklevel=2)
    return projection

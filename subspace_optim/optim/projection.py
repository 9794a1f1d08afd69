"""``project_updates``: the Dom or Bulk version of any optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from subspace_optim._validation import ArgumentError
from subspace_optim.joint_steps import JointSteps, optimizers_of
from subspace_optim.optim._base import check_same
from subspace_optim.subspace import EigenBasis, Subspace, check_subspace, projector_of


class Projection:
    """What ``project_updates`` returns: its ``remove()`` makes the optimizers whole again."""

    def __init__(
        self, optimizers: list[Optimizer], subspace: Subspace, onto: Literal["dominant", "bulk"]
    ) -> None:
        self.subspace, self.onto = subspace, onto
        self._optimizers = optimizers
        self._before: tuple[Tensor, EigenBasis] | None = None  # θ_t, and the basis there
        self._steps = JointSteps(optimizers, self._begin, self._project, last=False)

    def remove(self) -> None:
        """Lets the optimizers make their own updates again."""
        self._steps.remove()
        self._before = None

    @torch.no_grad()
    def _begin(self) -> None:
        space = self.subspace.parameters
        check_same(_parameters(self._optimizers), space)
        if self._before is not None:  # the step before raised, somewhere between its moves
            self._forget_pairs()
        self._before = space.flatten(space.tensors), projector_of(self.subspace)

    @torch.no_grad()
    def _project(self) -> None:
        if self._before is None:
            return
        space, (theta, basis) = self.subspace.parameters, self._before
        self._before = None
        update = space.flatten(space.tensors).sub_(theta)
        if self.onto == "dominant":
            basis.project(update, out=update)
        else:
            basis.project_out(update, out=update)
        for p, value in zip(space.tensors, space.unflatten(theta.add_(update)), strict=True):
            p.copy_(value)
        self._forget_pairs()

    def _forget_pairs(self) -> None:
        """Lets LBFGS begin anew: its pairs tell of moves that were not made."""
        for each in self._optimizers:
            if isinstance(each, LBFGS):
                for state in each.state.values():
                    state["n_iter"] = 0


def _parameters(optimizers: list[Optimizer]) -> list[Tensor]:
    return [p for each in optimizers for group in each.param_groups for p in group["params"]]


def project_updates(
    optimizer: Optimizer | Iterable[Optimizer],
    subspace: Subspace,
    onto: Literal["dominant", "bulk"],
) -> Projection:
    r"""Projects every update of any ``torch.optim.Optimizer`` onto a subspace or its complement.

    .. math:: \theta_{t+1} = \theta_t + P_k(\theta_t)\, u_t \quad\text{or}\quad
              \theta_t + P_k^\perp(\theta_t)\, u_t

    where :math:`u_t` is the whole displacement that one ``step()`` makes, weight decay included.
    The optimizer's own buffers see the raw gradients. `song_2024` (sections 3.1 and 3.3) does so to
    SGD.

    It goes through torch's public step hooks, so that schedulers, gradient scalers, closures and
    monitors go on as before. ``LBFGS`` moves many times in a step: its whole displacement is
    projected, and its memory of pairs is cleared, since they tell of moves that were not made.

    Args:
        optimizer: an optimizer, or a sequence that together holds the parameters of the subspace
            (Muon, and AdamW for the rest): they are projected jointly, after the last has stepped.
        subspace: where the basis comes from, such as ``DominantSubspace``. It is asked once a
            step, before it.
        onto: ``"dominant"`` or ``"bulk"``.

    Returns:
        A handle; its ``remove()`` ends the projection.

    Raises:
        ArgumentError: an argument is of the wrong kind, or a parameter is held by one side alone.
    """
    if onto not in ("dominant", "bulk"):
        raise ArgumentError("onto", onto, "'dominant' or 'bulk'")
    check_subspace(subspace, projects=True)
    optimizers = optimizers_of(optimizer, subspace.parameters)
    check_same(_parameters(optimizers), subspace.parameters)
    return Projection(optimizers, subspace, onto)

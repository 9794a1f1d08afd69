"""``LowRankNewton`` and ``ClassGradientQuasiNewton``: Newton in a subspace, SGD outside."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim._validation import check_number
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.optim._base import Gather, SubspaceOptimizer, options
from subspace_optim.subspaces import Subspace

Curvature = EigenBasis | LowRankCurvature


def _factors(basis: Curvature, inside: float, outside: float, damping: float) -> Tensor:
    r"""Returns ``r/(λ_i + δ) − η`` for each pair: what replaces the rate outside by that inside.

    Pairs with ``λ_i + δ ≤ ε max|λ|``, ε of the dtype, belong to the complement: along them Newton's
    method would climb, or leap. Their factor is 0.
    """
    values = basis.eigenvalues.double()
    curvature = values + damping
    safe = curvature > torch.finfo(basis.dtype).eps * basis.largest
    newton = inside / torch.where(safe, curvature, 1.0) - outside
    return torch.where(safe, newton, 0.0).to(basis.dtype)


class SubspaceNewton(SubspaceOptimizer):
    r"""Newton's method in the subspace, SGD in its complement, along the direction :math:`d_t`.

    .. math:: \theta_{t+1} = \theta_t - \eta\, d_t
              - \sum_i \Big(\frac{r}{\lambda_i + \delta} - \eta\Big) (v_i^\top d_t)\, v_i

    (`class_gradient_2020`, eq. 15), with the rate r inside and the rate η outside of each group.
    """

    _projects = False  # class gradients are not orthogonal

    def _rates(self, group: dict[str, Any]) -> tuple[float, float, float]:
        """Returns r, η and δ of a group."""
        raise NotImplementedError

    def _update(self, basis: Curvature, gather: Gather) -> None:
        update = gather(lambda _: 1.0)
        space = self._subspace().parameters
        rates = {p: self._rates(group) for group in self.param_groups for p in group["params"]}
        runs = [
            (sum(size for _, size in members), of_run)
            for of_run, members in groupby(
                zip(space.tensors, space.sizes, strict=True), lambda member: rates[member[0]]
            )
        ]  # neighbours with the same rates are one piece: all of the vector, if there is one group
        coefficients = basis.coefficients(update)
        start = 0
        for length, (inside, outside, damping) in runs:
            columns = slice(start, start := start + length)
            piece = update[columns].mul_(-outside)
            factors = _factors(basis, inside, outside, damping)
            basis.add_to(piece, factors * coefficients, alpha=-1, columns=columns)


class LowRankNewton(SubspaceNewton):
    r"""Newton's method in the dominant subspace.

    .. math:: \theta_{t+1} = \theta_t
              - \eta \sum_{i=1}^k \frac{u_i^\top d_t}{\lambda_i + \delta}\, u_i
              - \eta \beta\, P_k^\perp d_t

    with :math:`d_t` the momentum buffer of the raw gradients (the gradient itself without
    momentum). With :math:`\beta = \delta = 0` it is eq. 11 of `gur_ari_2018`, which moves in the
    subspace alone. Pairs with :math:`\lambda_i + \delta \le \epsilon \max|\lambda|`, ε of the
    dtype, count as complement: along them Newton's method would climb.

    The eigenvalues are those of the basis's last refresh: as the basis of ``refresh="auto"`` may
    serve for many steps, a rate well below 1 or some damping is safer there than eq. 11.

    Args:
        params: parameters or groups: together those of the subspace's operator.
        lr: η, a number or a tensor of one element; 1 is a full Newton step.
        damping: δ, in the unit of the eigenvalues.
        bulk_ratio: β: SGD outside of the subspace has the rate ηβ.
        momentum: μ.
        subspace: where the pairs come from, such as ``DominantSubspace``.

    Raises:
        ArgumentError: an option is out of range, or a parameter is none of the subspace's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        damping: float = 0.0,
        bulk_ratio: float = 0.0,
        momentum: float = 0.0,
        *,
        subspace: Subspace,
    ) -> None:
        super().__init__(params, options(locals()), subspace)

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_number("lr", group["lr"], tensor=True)
        for name in ("damping", "bulk_ratio", "momentum"):
            check_number(name, group[name])

    def _rates(self, group: dict[str, Any]) -> tuple[float, float, float]:
        lr = float(group["lr"])
        return lr, lr * group["bulk_ratio"], group["damping"]


class ClassGradientQuasiNewton(SubspaceNewton):
    r"""Newton's method along the class gradients, SGD outside of them.

    .. math:: \theta_{t+1} = \theta_t - \eta\, d_t
              - \sum_{k=1}^C \Big(\frac{r}{\lambda_k + \delta} - \eta\Big) (v_k^\top d_t)\, v_k

    (`class_gradient_2020`, eq. 15 with :math:`r = 1, \delta = 0`), with :math:`d_t` the momentum
    buffer of the raw gradients. The rate inside follows the schedule of the rate outside:
    :math:`r` is ``newton_lr`` times ``lr`` over the ``lr`` that the group was made with. Momentum
    is 0.9 by default, as in appendix D there. Classes with :math:`\lambda_k + \delta` of 0, to
    rounding, have SGD's rate.

    In the loop, ``subspace.observe(x, y)`` comes before ``step()``. The paper's tables show it
    ahead of SGD and its text behind, and diverging above η = 0.1; as its λ_k go to 0 where all
    examples of a class are fitted, some damping helps.

    Args:
        params: parameters or groups: together those of the subspace.
        lr: η, a number above 0 or a tensor of one element. It may become 0 later.
        newton_lr: r at the start.
        momentum: μ.
        damping: δ, in the unit of the λ_k.
        subspace: ``ClassGradientSubspace``, as printed or orthogonal, or any other.

    Raises:
        ArgumentError: an option is out of range, or a parameter is none of the subspace's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        newton_lr: float = 1.0,
        momentum: float = 0.9,
        *,
        damping: float = 0.0,
        subspace: Subspace,
    ) -> None:
        super().__init__(params, options(locals()), subspace)

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_number("lr", group["lr"], tensor=True)
        for name in ("newton_lr", "damping", "momentum"):
            check_number(name, group[name])
        check_number("first_lr", group.get("first_lr", 1.0), exclusive=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads options and state. A group of another optimizer keeps the first ``lr`` it has."""
        first = [group["first_lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, lr in zip(self.param_groups, first, strict=True):
            group.setdefault("first_lr", lr)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        remedy = "newton_lr is scaled with lr over this first one: a schedule may go to 0 later."
        check_number("lr", group["lr"], exclusive=True, tensor=True, remedy=remedy)
        group.setdefault("first_lr", float(group["lr"]))

    def _rates(self, group: dict[str, Any]) -> tuple[float, float, float]:
        lr = float(group["lr"])
        return group["newton_lr"] * lr / group["first_lr"], lr, group["damping"]

"""``DomSGD`` and ``BulkSGD``: SGD restricted to the dominant subspace, or to the bulk."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim.optim._base import RestrictedSGD, options
from subspace_optim.optim._checks import check_sgd_options
from subspace_optim.subspaces import Subspace


class SubspaceSGD(RestrictedSGD):
    """The options of ``torch.optim.SGD``, and a subspace."""

    _check_options = staticmethod(check_sgd_options)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        subspace: Subspace,
    ) -> None:
        super().__init__(params, options(locals()), subspace)


class DomSGD(SubspaceSGD):
    r"""SGD whose updates are projected onto the dominant subspace.

    .. math:: \theta_{t+1} = \theta_t + P_k(\theta_t)\, u_t

    where :math:`u_t` is the update that ``torch.optim.SGD`` would make (:math:`-\eta g_t` without
    momentum and weight decay). `song_2024` (Dom-SGD, section 3.1) finds that it hardly lowers the
    training loss, although most of each gradient lies in that subspace.

    The arguments are those of ``torch.optim.SGD``, in the same order, and ``subspace``. All
    groups are projected together. ``fused=True`` and ``differentiable=True`` are refused.

    Args:
        params: parameters or groups: together those of the subspace's operator. Frozen ones are
            passed over; parameters without a gradient count as zeros in the direction.
        lr: η, a number or a tensor of one element.
        momentum: μ.
        dampening: τ.
        weight_decay: w, part of the projected update.
        nesterov: Nesterov's momentum.
        maximize: maximizes the objective.
        foreach: False computes the directions one by one, else all at once.
        differentiable: not supported.
        fused: not supported.
        subspace: where the basis comes from, such as ``DominantSubspace``. It is asked once a
            step, after the closure, and refreshes at most once for each parameter state.

    Raises:
        ArgumentError: an option is out of range, or a parameter is none of the subspace's.
    """

    _part = "dominant"


class BulkSGD(SubspaceSGD):
    r"""SGD whose updates are projected out of the dominant subspace, onto the bulk.

    .. math:: \theta_{t+1} = \theta_t + P_k^\perp(\theta_t)\, u_t
                           = \theta_t + u_t - P_k(\theta_t)\, u_t

    where :math:`u_t` is the update that ``torch.optim.SGD`` would make. `song_2024` (Bulk-SGD,
    section 3.3) finds that it lowers the training loss as well as SGD does, with the smaller part
    of each update.

    The arguments are those of ``DomSGD``.
    """

    _part = "bulk"

"""``SAM``, ``DomSAM`` and ``BulkSAM``: sharpness-aware minimisation, whole or in a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim._validation import ArgumentError, check_number
from subspace_optim.optim._base import (
    CheckedOptimizer,
    RestrictedSGD,
    check_sgd_options,
    sgd_directions,
)
from subspace_optim.subspace import EigenBasis, Subspace


class _TwoSteps(CheckedOptimizer):
    """A step from θ_t with the gradient at ``θ_t + e``, the ascent of the linearised loss."""

    _before: dict[Tensor, Tensor] | None = None  # θ_t, between first_step() and second_step()
    _finite = True  # whether the gradient at θ_t was
    _ready = False  # second_step() has made sure of the gradients, and calls step()

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_sgd_options(group)
        check_number("rho", group["rho"])
        if not isinstance(group["adaptive"], bool):
            raise ArgumentError("adaptive", group["adaptive"], "True or False")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step, with two evaluations of the closure.

        A gradient that is not finite, in either of them, leaves parameters and buffers as they
        were. An error in the closure does so too, and goes on.

        Args:
            closure: clears the gradients, evaluates the loss on the minibatch, calls
                ``backward()`` and returns the loss.

        Returns:
            What ``closure`` returned at θ_t.

        Raises:
            RuntimeError: there is no closure, and ``second_step()`` is not the caller.
        """
        if self._ready or (closure is None and not self._moves()):
            self._descend()  # without any rate, as checkpoints are prepared: only buffers are made
            return None
        if closure is None:
            raise RuntimeError(
                f"{type(self).__name__} needs the gradient at two points: call step(closure), or "
                "first_step() after a backward pass and second_step() after another."
            )
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        try:
            if self._finite:
                with torch.enable_grad():
                    closure()
        except BaseException:
            self._return()
            raise
        if self._return():
            self._descend()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._before = None  # another state was loaded: there is no way back to the old θ_t

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Moves from θ_t to ``θ_t + e``, by the gradients that are there.

        They may carry the scale of a ``GradScaler``: ``e`` does not depend on it. If they are not
        finite nothing moves, and ``second_step()`` will take no step.

        Args:
            zero_grad: clears the gradients afterwards.

        Raises:
            RuntimeError: it was called before, without ``second_step()``.
        """
        if self._before is not None:
            raise RuntimeError("first_step() was called before: second_step() has to follow it.")
        self._check_gradients()
        moving = [
            (p, group)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad and p.grad is not None
        ]
        norm = _norm([p.grad * p.abs() if g["adaptive"] else p.grad for p, g in moving])
        self._finite = math.isfinite(norm)
        self._before = {p: p.detach().clone() for p, _ in moving} if self._finite else {}
        if self._finite and norm > 0:
            for p, group in moving:
                slope = p.grad.to(torch.promote_types(p.dtype, torch.float32)) / norm
                if group["adaptive"]:
                    slope.mul_(p.abs().square())
                p.add_(slope, alpha=-group["rho"] if group["maximize"] else group["rho"])
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Moves back to θ_t, and from there along the gradients that are there.

        With a ``GradScaler``, ``scaler.unscale_(optimizer)`` comes before and
        ``scaler.update()`` after it. If a gradient of either pass is not finite, there is no step:
        the parameters are θ_t, and step hooks are not called. The scaler knows of the gradients
        of this pass alone: an overflow in the first one alone does not lower its scale.

        Args:
            zero_grad: clears the gradients afterwards.

        Raises:
            RuntimeError: ``first_step()`` was not called.
        """
        if self._before is None:
            raise RuntimeError("second_step() was called without first_step() before it.")
        if self._return():
            self._ready = True
            try:
                self.step()  # the hooked one: hooks and schedulers see one step, from θ_t
            finally:
                self._ready = False
        if zero_grad:
            self.zero_grad()

    def _return(self) -> bool:
        """Puts θ_t back, and tells whether the gradients of both passes were finite."""
        before, self._before = self._before or {}, None
        for p, value in before.items():
            p.copy_(value)
        return self._finite and math.isfinite(_norm(list(self._gradients())))

    def _gradients(self) -> Iterator[Tensor]:
        for p in self._parameters():
            if p.requires_grad and p.grad is not None:
                yield p.grad


def _norm(tensors: list[Tensor]) -> float:
    """Returns the norm of all tensors together, summed up in float32 at least."""
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    norm = float(torch.nn.utils.get_total_norm(wide))
    if norm == 0 or math.isinf(norm):  # squares of float32 vanish, or overflow from 1e19 on
        double = [t.to(torch.promote_types(t.dtype, torch.float64)) for t in wide]
        norm = float(torch.nn.utils.get_total_norm(double))
    return norm


class SAM(_TwoSteps):
    r"""Sharpness-aware minimisation: SGD by the gradient at the worst point nearby.

    .. math:: \theta_{t+1} = \theta_t - \eta\, \nabla L(\theta_t + e_t), \qquad
              e_t = \rho\, \frac{\nabla L(\theta_t)}{\|\nabla L(\theta_t)\|}

    or, ``adaptive``, :math:`\rho\, T_t^2 \nabla L(\theta_t) / \|T_t \nabla L(\theta_t)\|` with
    :math:`T_t = |\theta_t|` elementwise. `song_2024` (section B.2) after Foret et al. 2021; the
    adaptive form is that of Kwon et al. 2021. The norm is over all groups together, and a gradient
    of 0 gives no perturbation. Weight decay and momentum are those of ``torch.optim.SGD``, and
    belong to the step, not to ``e_t``. With ``maximize``, ``e_t`` points downhill.

    Either ``step(closure)``, or ``first_step()`` after a backward pass and ``second_step()`` after
    another: two gradients a step. Layers that keep running statistics see both passes.

    Args:
        params: parameters or groups. ``rho`` and ``adaptive`` may differ between groups.
        lr: η, a number or a tensor of one element.
        rho: ρ, the radius.
        momentum: μ of the step.
        dampening: τ.
        weight_decay: w, part of the step alone.
        nesterov: Nesterov's momentum.
        adaptive: scales the perturbation with the parameters.
        maximize: maximizes the objective.
        foreach: False computes the directions one by one, else all at once.
        differentiable: not supported.
        fused: not supported.

    Raises:
        ArgumentError: an option is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rho: float = 0.05,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        adaptive: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "adaptive": adaptive,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _descend(self) -> None:
        for group in self.param_groups:
            lr = float(group["lr"])
            params = [p for p in group["params"] if p.requires_grad and p.grad is not None]
            for p, direction in sgd_directions(params, group, self.state):
                p.add_(direction, alpha=-lr)


class SubspaceSAM(_TwoSteps, RestrictedSGD):
    """The arguments of ``SAM``, and ``subspace``."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        rho: float = 0.05,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        adaptive: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        subspace: Subspace,
    ) -> None:
        defaults = {
            "lr": lr,
            "rho": rho,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "adaptive": adaptive,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, subspace)


class DomSAM(SubspaceSAM):
    r"""SAM whose updates are projected onto the dominant subspace.

    .. math:: \theta_{t+1} = \theta_t - \eta\, P_k(\theta_t)\, \nabla L(\theta_t + e_t)

    with :math:`e_t` of ``SAM``, not projected. The basis is that of θ_t, the gradient that of the
    perturbed point. `song_2024` (Dom-SAM, section B.2) finds that it does not go on lowering the
    training loss.

    The arguments are those of ``SAM``, and ``subspace`` as of ``DomSGD``.
    """

    def _restrict(self, basis: EigenBasis, update: Tensor) -> Tensor:
        return basis.project(update, out=update)


class BulkSAM(SubspaceSAM):
    r"""SAM whose updates are projected out of the dominant subspace, onto the bulk.

    .. math:: \theta_{t+1} = \theta_t - \eta\, P_k^\perp(\theta_t)\, \nabla L(\theta_t + e_t)

    with :math:`e_t` of ``SAM``, not projected. `song_2024` (Bulk-SAM, section B.2) finds that it
    lowers the training loss as SAM does.

    The arguments are those of ``SAM``, and ``subspace`` as of ``DomSGD``.
    """

    def _restrict(self, basis: EigenBasis, update: Tensor) -> Tensor:
        return basis.project_out(update, out=update)

"""``SAM``, ``DomSAM`` and ``BulkSAM``: sharpness-aware minimisation, whole or in a subspace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim._validation import ArgumentError, check_flag, check_number
from subspace_optim.curvature.dtensors import is_sharded, total_norm
from subspace_optim.curvature.parameters import times_written
from subspace_optim.optim._base import (
    CheckedOptimizer,
    Loss,
    Moves,
    RestrictedSGD,
    options,
    sgd_directions,
    write,
)
from subspace_optim.optim._checks import check_sgd_options
from subspace_optim.step_hooks import innermost, moves, outside_autocast, parameters_of
from subspace_optim.subspaces import Subspace


class _TwoSteps(CheckedOptimizer):
    """A step from θ_t by the gradient at ``θ_t + e``, where ``e`` ascends the linearised loss."""

    _before: dict[Tensor, Tensor] | None = None  # θ_t, between first_step() and second_step()
    _finite = True  # whether the gradient at θ_t was
    _ready = False  # second_step() has made sure of the gradients, and calls step()

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_sgd_options(group)
        check_number("rho", group["rho"])
        check_flag("adaptive", group["adaptive"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one step, with two evaluations of the closure.

        A gradient that is not finite, in either of them, leaves parameters and buffers as they
        were. An error in the closure does so too, and goes on. After ``first_step()`` it is
        ``second_step()``, with a closure that is evaluated before.

        Args:
            closure: evaluates the loss on the minibatch, calls ``backward()`` and returns the
                loss. It may clear the gradients; it may not add to those of earlier minibatches,
                which it cannot evaluate again.

        Returns:
            What ``closure`` returned at θ_t.
        """
        if self._before is None:
            return self._take(closure)
        loss = None
        if closure is not None:
            with self._going_back(), torch.enable_grad():
                loss = closure()
        self.second_step()
        return loss

    # Torch would call the step hooks around all of step(): after first_step() they would see the
    # parameters displaced. So what they are called around is here.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.optim.Optimizer.profile_hook_step
    @torch.no_grad()
    def _take(self, closure: Callable[[], Loss] | None) -> Loss | None:
        """Takes a step from θ_t.

        Raises:
            RuntimeError: there is no closure, and ``second_step()`` is not the caller.
        """
        loss = None
        # Without any rate, as checkpoints are prepared, only buffers are made.
        if not self._ready and (closure is not None or moves(self)):
            if closure is None:
                raise RuntimeError(
                    f"{type(self).__name__} needs the gradient at two points: call step(closure), "
                    "or first_step() after a backward pass and second_step() after another."
                )
            with _nothing_added(parameters_of(self)), torch.enable_grad():
                loss = closure()
            with self._going_back():
                self.first_step()
                if self._finite:
                    self.zero_grad()
                    with torch.enable_grad():
                        closure()
                finite = self._return()
            if not finite:
                return loss
        with outside_autocast(self._device):
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
            RuntimeError: it was called before, without ``second_step()``. The parameters are back
                at θ_t then.
        """
        own = self._own()
        if own is not self:
            own.first_step(zero_grad)
            return
        if self._before is not None:
            self.put_back()
            raise RuntimeError(
                "first_step() was called before: second_step() has to follow it. The parameters "
                "are back where that first_step() found them: begin the step anew."
            )
        self._check_gradients()
        with outside_autocast(self._device):
            self._displace()
        if zero_grad:
            self.zero_grad()

    def _own(self) -> Any:
        """Returns the optimizer inside of a wrapper that has taken on our class."""
        return self if type(self).__module__ == __name__ else innermost(self)

    def _displace(self) -> None:
        groups = [(g, params) for g in self.param_groups if (params := _with_gradients(g))]
        norm = _norm(
            [p.grad * p.abs() if g["adaptive"] else p.grad for g, params in groups for p in params]
        )
        self._finite = math.isfinite(norm)
        groups = groups if self._finite else []
        self._before = {p: p.detach().clone() for _, params in groups for p in params}
        with self._going_back():
            alike = [(g, some) for g, params in groups for some in _of_one_kind(params)]
            for group, params in alike if norm > 0 else []:
                slopes = torch._foreach_div(_wide([p.grad for p in params]), norm)
                if group["adaptive"]:
                    torch._foreach_mul_(slopes, [p.abs().square() for p in params])
                rho = -group["rho"] if group["maximize"] else group["rho"]
                torch._foreach_add_(params, slopes, alpha=rho)
        torch.clear_autocast_cache()  # its copies of parameters

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Moves back to θ_t, and from there along the gradients that are there.

        With a ``GradScaler``, ``scaler.unscale_(optimizer)`` comes before and
        ``scaler.update()`` after it. If a gradient of either pass is not finite, there is no step:
        the parameters are θ_t, and step hooks are not called. The scaler knows of the gradients
        of this pass alone: an overflow in the first one alone does not lower its scale. An error
        leaves the parameters at θ_t.

        Args:
            zero_grad: clears the gradients afterwards.

        Raises:
            RuntimeError: ``first_step()`` was not called.
        """
        own = self._own()
        if own._before is None:  # noqa: SLF001 (ours)
            raise RuntimeError("second_step() was called without first_step() before it.")
        if own is not self:
            self.step()  # the wrapper's, which counts it, and calls that of `own`
        else:
            with self._going_back():
                self._ready = self._return()
            try:
                if self._ready:
                    self.step()  # the hooked one: hooks and schedulers see one step, from θ_t
            finally:
                self._ready = False
        if zero_grad:
            self.zero_grad()

    def _return(self) -> bool:
        """Puts θ_t back, and tells whether the gradients of both passes were finite."""
        self.put_back()
        gradients = [p.grad for group in self.param_groups for p in _with_gradients(group)]
        with outside_autocast(self._device):
            return self._finite and math.isfinite(_norm(gradients))

    @torch.no_grad()
    def put_back(self) -> None:
        """Puts the parameters back to θ_t, if ``first_step()`` has moved them from there."""
        before = self._before or {}
        with outside_autocast(self._device):
            try:
                write(list(before), list(before.values()))
            finally:
                self._before = None

    @contextmanager
    def _going_back(self) -> Iterator[None]:
        """An exception puts θ_t back."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise


@contextmanager
def _nothing_added(params: list[Tensor]) -> Iterator[None]:
    """Refuses a closure that adds to gradients which are there already, or computes none.

    At the perturbed point a closure can evaluate its own minibatch alone, and not those whose
    gradients were accumulated before.

    Raises:
        ArgumentError: the closure called inside does either.
    """
    known = {p: p.grad for p in params if p.requires_grad and p.grad is not None}
    written = times_written(known.values())
    if not known:
        yield
        return
    found: list[bool] = []  # whether a gradient was there as one arrived, and was added to it
    added: list[bool] = []
    last = next(reversed(known))
    handles = [
        last.register_hook(lambda _: found.append(last.grad is not None and bool(last.grad.any()))),
        last.register_post_accumulate_grad_hook(lambda _: added.extend(found[:1])),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    untouched = all(p.grad is gradient for p, gradient in known.items())
    untouched &= written == times_written(known.values())
    if untouched or (added and added[0]):
        raise ArgumentError(
            "closure",
            f"one that {'computes no' if untouched else 'adds to the'} gradients",
            "one that computes the gradients of all of the step's data",
            "Where they are accumulated, take the step in two calls (in Lightning by manual "
            "optimization): first_step() after the backward passes, second_step() after the same "
            "passes again.",
        )


def _of_one_kind(params: list[Any]) -> list[list[Any]]:
    """Divides parameters in those that are sharded and those that are not: torch mixes no two."""
    kinds = [[p for p in params if is_sharded(p) is sharded] for sharded in (False, True)]
    return [some for some in kinds if some]


def _with_gradients(group: dict[str, Any]) -> list[Any]:
    return [p for p in group["params"] if p.requires_grad and p.grad is not None]


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the tensors in float32 at least."""
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _norm(tensors: list[Tensor]) -> float:
    """Returns the norm of all tensors together, summed up in float32 at least."""
    wide = _wide(tensors)
    norm = total_norm(wide)
    if norm == 0 or math.isinf(norm):  # squares of float32 vanish, or overflow from 1e19 on
        norm = total_norm([t.to(torch.promote_types(t.dtype, torch.float64)) for t in wide])
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
        super().__init__(params, options(locals()))

    def _descend(self) -> None:
        buffers: dict[Tensor, Tensor] = {}
        moves: Moves = []
        for group in self.param_groups:
            params = _with_gradients(group)
            directions = [d for _, d in sgd_directions(params, group, self.state, buffers)]
            moves.append((params, directions, -float(group["lr"])))
        self._commit(buffers, moves)


class SubspaceSAM(_TwoSteps, RestrictedSGD):
    """The step of ``SAM``, of which one part is taken."""

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
        super().__init__(params, options(locals()), subspace)


class DomSAM(SubspaceSAM):
    r"""SAM whose updates are projected onto the dominant subspace.

    .. math:: \theta_{t+1} = \theta_t - \eta\, P_k(\theta_t)\, \nabla L(\theta_t + e_t)

    with :math:`e_t` of ``SAM``, not projected. The basis is that of θ_t, the gradient that of the
    perturbed point. `song_2024` (Dom-SAM, section B.2) finds that it does not go on lowering the
    training loss.

    The arguments are those of ``SAM``, and ``subspace`` as of ``DomSGD``.
    """

    _part = "dominant"


class BulkSAM(SubspaceSAM):
    r"""SAM whose updates are projected out of the dominant subspace, onto the bulk.

    .. math:: \theta_{t+1} = \theta_t - \eta\, P_k^\perp(\theta_t)\, \nabla L(\theta_t + e_t)

    with :math:`e_t` of ``SAM``, not projected. `song_2024` (Bulk-SAM, section B.2) finds that it
    lowers the training loss as SAM does.

    The arguments are those of ``SAM``, and ``subspace`` as of ``DomSGD``.
    """

    _part = "bulk"

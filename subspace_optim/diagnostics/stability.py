r"""How sharp the loss may be before a step overshoots.

On a quadratic of curvature λ a gradient method stays bounded while λ is below its threshold. Along
training the sharpness λ_1 rises to the threshold and stays there: the *edge of stability*
(`song_2024`, appendix B).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from subspace_optim._progress import ProgressOption
from subspace_optim._validation import ArgumentError, check_number
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.diagnostics.spectrum import multiplying, solve
from subspace_optim.step_hooks import optimizers_of


def stability_threshold(
    lr: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> float:
    r"""Returns the sharpness above which gradient descent diverges on a quadratic.

    .. math:: \frac{2 + 2\mu}{\eta (1 - \tau)} - w, \qquad
              \text{with Nesterov's momentum} \quad \frac{2 + 2\mu}{\eta (1 + 2\mu)} - w

    which is 2/η for plain gradient descent. The arguments are those of ``torch.optim.SGD``, and
    so is the update: the momentum buffer is ``μ b + (1 − τ) g``, and the decay ``w θ`` is part
    of ``g``.

    Args:
        lr: η.
        momentum: μ.
        nesterov: whether the momentum is Nesterov's.
        dampening: τ. Without momentum it does nothing, as in torch.
        weight_decay: w.

    Returns:
        The threshold; infinite for a rate of 0.

    Raises:
        ArgumentError: an argument is out of range.

    Reference:
        Cohen, Kaur, Li, Kolter & Talwalkar 2021, *Gradient descent on neural networks typically
        occurs at the edge of stability*.
    """
    check_number("lr", lr)
    check_number("momentum", momentum)
    check_number("dampening", dampening)
    check_number("weight_decay", weight_decay)
    if momentum == 0:
        dampening = 0.0
    if dampening >= 1:
        raise ArgumentError("dampening", dampening, "below 1", "At 1 gradients have no effect.")
    if nesterov and (momentum == 0 or dampening != 0):
        remedy = "torch.optim.SGD has it so."
        raise ArgumentError("nesterov", nesterov, "with momentum and without dampening", remedy)
    rate = lr * (1 + 2 * momentum) if nesterov else lr * (1 - dampening)
    return (2 + 2 * momentum) / rate - weight_decay if rate > 0 else math.inf


def adam_stability_threshold(lr: float, beta1: float = 0.9) -> float:
    r"""Returns the *preconditioned* sharpness above which Adam diverges on a quadratic.

    .. math:: \frac{2 + 2\beta_1}{(1 - \beta_1)\, \eta}

    It is to be held against ``preconditioned_sharpness``, not against λ_1 of the Hessian: 38/η
    at β_1 = 0.9. Adam's first moment is a momentum with dampening β_1.

    Args:
        lr: η.
        beta1: β_1, from 0 to below 1.

    Returns:
        The threshold; infinite for a rate of 0.

    Raises:
        ArgumentError: an argument is out of range.

    Reference:
        Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*.
    """
    check_number("beta1", beta1)
    if beta1 >= 1:
        raise ArgumentError("beta1", beta1, "below 1")
    return stability_threshold(lr, momentum=beta1, dampening=beta1)


def sam_edge(
    gradient_norm: float | Tensor,
    lr: float,
    rho: float,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> Tensor:
    r"""Returns the sharpness above which SAM diverges, at a gradient of this norm.

    .. math:: \frac{\|g\|}{2\rho} \left( \sqrt{1 + \frac{8\rho}{\eta \|g\|}} - 1 \right)

    the positive solution of :math:`\eta \lambda (1 + \rho\lambda / \|g\|) = 2`: along an
    eigenvector SAM's gradient is that of the Hessian times :math:`1 + \rho\lambda / \|g\|`. The
    paper's formula lacks ρ, and its text says that the edge falls with the norm; it grows, to
    the ``stability_threshold`` T for large gradients or small ρ. With momentum, 2/η is T. An
    argument that is out of range raises ``ArgumentError``.

    Args:
        gradient_norm: ``‖∇L(θ_t)‖``.
        lr: η.
        rho: ρ.
        momentum: of ``stability_threshold``, as all that follow.
        nesterov: as there.
        dampening: as there.
        weight_decay: as there. (It takes no part in the perturbation.)

    Returns:
        A float64 scalar tensor; 0 for a gradient of 0, NaN for an infinite threshold.

    Reference:
        `song_2024`, SAM-edge (appendix B.2), corrected; Long & Bartlett 2024, *Sharpness-aware
        minimization and the edge of stability*.
    """
    check_number("rho", rho)
    threshold = stability_threshold(
        lr,
        momentum=momentum,
        nesterov=nesterov,
        dampening=dampening,
        weight_decay=weight_decay,
    )
    norm = torch.as_tensor(gradient_norm, dtype=torch.float64)
    if rho == 0:
        return torch.full_like(norm, threshold)
    # ‖g‖ (√(1 + 4ρT/‖g‖) − 1) / 2ρ, without the difference of nearly equal numbers.
    return 2 * threshold / (1 + (1 + 4 * rho * threshold / norm).sqrt())


def preconditioned_sharpness(
    operator: CurvatureOperator,
    optimizer: Optimizer | Iterable[Optimizer],
    *,
    tol: float = 1e-3,
    seed: int = 0,
    progress: ProgressOption = False,
) -> float:
    r"""Returns the sharpness that Adam sees: the largest eigenvalue of its preconditioned Hessian.

    .. math:: \lambda_1(D^{-1/2} H D^{-1/2}), \qquad
              D = \mathrm{diag}\Big( (1 - \beta_1^t)
              \big( \sqrt{\nu_t / (1 - \beta_2^t)} + \epsilon \big) \Big)

    with the second moments ν_t and the count t of Adam's state. These are those of the last step:
    the next one moves them by its own gradient first, and its ``1 − β_1^t`` is larger (at the
    second step by a factor of two). Adam's ``weight_decay``, which is part of its gradient, adds w
    to H; with ``amsgrad`` ν_t is the largest so far. Parameters that no optimizer moves do not
    count: for them 1/D is 0. It costs a solve for one eigenvalue.

    Args:
        operator: the Hessian.
        optimizer: ``torch.optim.Adam`` or ``AdamW``, or several.
        tol: relative residual of the eigenpair.
        seed: of the solve's random vectors.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        The eigenvalue.

    An optimizer that is another, that maximizes, or that has not taken a step yet, raises
    ``ArgumentError``.

    Reference:
        Cohen et al. 2022, *Adaptive gradient methods at the edge of stability*.
    """
    optimizers = [each.optimizer for each in optimizers_of(optimizer, operator.parameters)]
    check_adam(optimizers)
    scale, decay = _inverse_root(operator, optimizers)

    def product(rows: Tensor) -> Tensor:
        scaled = rows * scale
        return operator.matmat(scaled).addcmul_(decay, scaled).mul_(scale)

    with multiplying(operator, progress):
        return float(solve(operator, product, 1, tol=tol, seed=seed).eigenvalues[0])


def check_adam(optimizers: Iterable[Optimizer]) -> None:
    """Checks that optimizers precondition as Adam does, and descend.

    Raises:
        ArgumentError: one of them does not.
    """
    for each in optimizers:
        if not isinstance(each, Adam | AdamW):
            raise ArgumentError("optimizer", type(each).__name__, "Adam or AdamW of torch.optim")
        if any(group.get("maximize") for group in each.param_groups):
            raise ArgumentError("maximize", True, "False: a maximum has no such threshold")


def has_moments(operator: CurvatureOperator, optimizers: Iterable[Optimizer]) -> bool:
    """Whether a parameter of the operator has a second moment yet."""
    return any(
        "exp_avg_sq" in each.state.get(p, {})
        for each in optimizers
        for p in operator.parameters.tensors
    )


def thresholds(optimizers: Iterable[Optimizer], gradient_norm: float) -> dict[str, float]:
    """Returns the thresholds of the optimizers' options: NaN where they have none, or several.

    Args:
        optimizers: of which the parameter groups tell what kind they are.
        gradient_norm: ``‖∇L(θ_t)‖``, for SAM.

    Returns:
        ``threshold`` of gradient descent, with SGD's options; ``sam_edge``; ``adam_threshold``.
    """
    found = [
        _of_group(each, group, gradient_norm)
        for each in optimizers
        for group in each.param_groups
        if group.get("lr") is None or float(group["lr"]) != 0  # else it does not move
    ]
    by_kind = {name: {values.get(name, math.nan) for values in found} for name in _KINDS}
    return {name: of.pop() if len(of) == 1 else math.nan for name, of in by_kind.items()}


def _of_group(
    optimizer: Optimizer, group: dict[str, Any], gradient_norm: float
) -> dict[str, float]:
    """Returns the thresholds that the options of a group have.

    An optimizer may allow options that have none: a rate of its own, a schedule that begins without
    momentum, an infinite rate.
    """
    if group.get("maximize") or group.get("lr") is None:
        return {}
    lr = float(group["lr"])
    with suppress(ArgumentError):
        if isinstance(optimizer, Adam | AdamW):
            return {"adam_threshold": adam_stability_threshold(lr, float(group["betas"][0]))}
        if all(name in group for name in _SGD_OPTIONS):
            options: dict[str, Any] = {name: float(group[name]) for name in _SGD_OPTIONS}
            options["nesterov"] = bool(options["nesterov"])
            values = {"threshold": stability_threshold(lr, **options)}
            if "rho" in group and not group.get("adaptive"):
                edge = sam_edge(gradient_norm, lr, float(group["rho"]), **options)
                values["sam_edge"] = float(edge)
            return values
    return {}


_KINDS = ("threshold", "sam_edge", "adam_threshold")
_SGD_OPTIONS = ("momentum", "nesterov", "dampening", "weight_decay")


def _inverse_root(
    operator: CurvatureOperator, optimizers: list[Optimizer]
) -> tuple[Tensor, Tensor]:
    """Returns the diagonal of ``D^(-1/2)``, ``(P,)``, and the decay that is part of the gradient.

    Raises:
        ArgumentError: there is no state yet.
    """
    pieces: dict[Tensor, Tensor] = {}
    decays: dict[Tensor, float] = {}
    for each in optimizers:
        for group in each.param_groups:
            beta1, beta2 = (float(beta) for beta in group["betas"])
            for p in group["params"]:
                state: dict[str, Any] = each.state.get(p, {})
                if "exp_avg_sq" not in state:
                    continue
                t = float(state["step"])
                second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
                second = second.to(torch.float64) / (1 - beta2**t)
                coupled = not (isinstance(each, AdamW) or group.get("decoupled_weight_decay"))
                decays[p] = float(group["weight_decay"]) if coupled else 0.0
                pieces[p] = ((1 - beta1**t) * (second.sqrt() + group["eps"])).rsqrt()
    space = operator.parameters
    if not has_moments(operator, optimizers):
        remedy = "Ask after the first step."
        raise ArgumentError("optimizer", "without second moments", "one that has stepped", remedy)
    roots = space.flatten([pieces.get(p) for p in space.tensors])
    added = [torch.full_like(p, decays.get(p, 0.0), dtype=torch.float64) for p in space.tensors]
    return roots, space.flatten(added)

"""Readings of the quasi-Newton method where `class_gradient_2020` leaves it open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import subspace_optim as so
from subspace_optim.curvature.logit_gradients import LogitGradients
from subspace_optim.curvature.parameters import ParameterSpace

MOMENTUM: Final = 0.9
DECAY: Final = 0.9
"""Both of appendix D."""


@dataclass(frozen=True)
class Reading:
    """One way to read the method; without arguments it is as its equations have it.

    Attributes:
        over_class: λ_k is a mean over the examples of class k, instead of their sum over the whole
            minibatch (eq. 12): at the start that is C times as much.
        from_one: the initial λ_k = 1 is a term of the moving average, which eq. 17 begins with the
            first minibatch.
        plain: Newton's step takes the gradient of the minibatch, instead of that with momentum.
        orthogonal: by the eigenpairs of eq. 11: its vectors are orthogonal, as eq. 14 takes for
            granted. No reading of the paper's, but what would make its projection one.
    """

    over_class: bool = False
    from_one: bool = False
    plain: bool = False
    orthogonal: bool = False

    @property
    def name(self) -> str:
        """What is other than in the equations."""
        told = {"class": self.over_class, "one": self.from_one, "plain": self.plain}
        told |= {"orthogonal": self.orthogonal}
        return "-".join(word for word, other in told.items() if other) or "printed"


READINGS: Final = {
    reading.name: reading
    for reading in (
        Reading(over_class, from_one, plain, orthogonal)
        for orthogonal in (False, True)
        for over_class in (False, True)
        for from_one in (False, True)
        for plain in (False, True)
    )
}


def optimizer_of(
    method: str, model: nn.Module, classes: int, lr: float, momentum: float = MOMENTUM
) -> tuple[Optimizer, Any]:
    """Returns an optimizer, and the subspace that is to observe its minibatches, if it has one.

    Args:
        method: ``sgd``, or a reading by its name.
        model: see there.
        classes: C.
        lr: η.
        momentum: see there.
    """
    parameters = list(model.parameters())
    if method == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum), None
    if method in ("printed", "orthogonal"):  # what the package has
        orthogonal = method == "orthogonal"
        own = so.ClassGradientSubspace(model, classes, decay=DECAY, orthogonal=orthogonal)
        return so.ClassGradientQuasiNewton(parameters, lr, 1.0, momentum, subspace=own), own
    reading = READINGS[method]
    subspace = ReadSubspace(model, classes, reading)
    kind = PlainNewton if reading.plain else so.ClassGradientQuasiNewton
    return kind(parameters, lr, 1.0, momentum, subspace=subspace), subspace


class ReadSubspace:
    """The curvature of rank C by a reading; the printed one is ``so.ClassGradientSubspace``.

    Args:
        model: see there.
        classes: C.
        reading: see there.
        decay: γ.
    """

    def __init__(
        self, model: nn.Module, classes: int, reading: Reading, decay: float = DECAY
    ) -> None:
        self.parameters = ParameterSpace(model)
        self.reading, self.decay = reading, decay
        self._sums = LogitGradients(model, self.parameters, classes, None)
        none = torch.zeros(classes, dtype=self.parameters.dtype, device=self.parameters.device)
        gradients = none.new_zeros(classes, self.parameters.size)
        self._state = {"gradients": gradients, "squares": none, "updates": none.clone()}

    def observe(self, x: Tensor, y: Tensor) -> None:
        """Adds a minibatch to the averages; a class that is absent keeps its own.

        Raises:
            NonFiniteError: a gradient is not finite.
        """
        state = self._state
        sums = state["gradients"].new_zeros(self._sums.size)
        self._sums.add_to(sums, x, y)
        gradients, spreads, counts = self._sums.split(sums)
        present = counts.clamp(min=1)
        gradients /= present[:, None]
        values = spreads / (present if self.reading.over_class else counts.sum())
        values *= gradients.square().sum(dim=1)
        if not bool(values.isfinite().all()):
            raise so.NonFiniteError("a gradient of a class is not finite")
        seen = counts > 0
        state["updates"] += seen
        share = seen * (1 - self.decay)
        for name, new in (("gradients", gradients), ("squares", values.square())):
            weight = share if new.dim() == 1 else share[:, None]
            state[name] += weight * (new - state[name])

    def update(self) -> so.LowRankCurvature | so.EigenBasis:
        """Returns ``Σ λ_k v_k v_kᵀ``: of a class that was never seen, v = 0 and λ = 1."""
        state, left = self._state, self.decay ** self._state["updates"]
        norms = state["gradients"].norm(dim=1, keepdim=True)
        vectors = torch.where(norms > 0, state["gradients"] / norms, 0.0)
        if self.reading.from_one:  # left is the share of what the average began with
            squares = state["squares"] + left
        else:
            squares = torch.where(left < 1, state["squares"] / (1 - left), 1.0)
        curvature = so.LowRankCurvature(squares.sqrt(), vectors)
        return curvature.orthogonalised() if self.reading.orthogonal else curvature

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the averages."""
        return {name: tensor.clone() for name, tensor in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes averages that ``state_dict()`` returned."""
        self._state = {name: state[name].clone() for name in self._state}


class PlainNewton(so.ClassGradientQuasiNewton):
    r"""Eq. 15 with momentum for what SGD does, and the plain gradient for what Newton does.

    .. math:: \theta_{t+1} = \theta_t - \eta \Big(d_t - \sum_k (v_k^\top d_t) v_k\Big)
              - \sum_k \frac{1}{\lambda_k} (v_k^\top g_t) v_k
    """

    def _update(self, basis: Any, gather: Any) -> None:
        update = gather(lambda _: 1.0)
        (group,) = self.param_groups
        gradient = _flat([p.grad for p in group["params"]])
        lr, values = float(group["lr"]), basis.eigenvalues
        # Along what has no curvature, to rounding, the whole step is SGD's.
        safe = values > torch.finfo(basis.dtype).eps * basis.largest
        kept = torch.where(safe, lr * basis.coefficients(update), 0.0)
        newton = torch.where(safe, basis.coefficients(gradient) / values, 0.0)
        basis.add_to(update.mul_(-lr), kept - newton)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])

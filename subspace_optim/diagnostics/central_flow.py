r"""The central flow of gradient descent: where it goes on average while it oscillates.

At its edge of stability gradient descent does not follow the gradient flow: along the eigenvectors
with eigenvalues of about 2/η it swings to and fro, and that keeps these eigenvalues from rising.
The mean of the swinging is smooth. It is a flow, in which the covariance of the oscillation is the
one that holds the sharpness at 2/η.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from subspace_optim._progress import Progress, ProgressOption, shown
from subspace_optim._validation import (
    ArgumentError,
    NonFiniteError,
    check_integer,
    check_number,
)
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import LOW_PRECISION, length
from subspace_optim.diagnostics.spectrum import multiplying
from subspace_optim.linalg.complementarity import solve_complementarity
from subspace_optim.linalg.refinement import refine
from subspace_optim.linalg.rows import gram, square
from subspace_optim.subspaces.eigenpairs import TopPairs, solve

_PAIRS: Final = 2
"""Pairs that are followed at first, and that are added where all are at the edge."""
_REFINEMENTS: Final = 4
"""Steps of subspace iteration at one place before the pairs are solved for anew."""


@dataclass(frozen=True, eq=False)
class CentralFlow:
    r"""A central flow, at the times 0, 1, …, T of as many steps of gradient descent.

    Attributes:
        lr: η.
        loss: ``(T + 1,)``, L(w). Gradient descent itself is above it, by what it oscillates.
        predicted_loss: ``(T + 1,)``, the mean loss of gradient descent: ``L(w) + tr(Σ)/η``.
        eigenvalues: ``(T + 1, k)``, the largest of H(w), descending, as many as were followed;
            NaN where fewer were.
        squared_gradient_norm: ``(T + 1,)``, ‖∇L(w)‖².
        predicted_squared_gradient_norm: ``(T + 1,)``, the mean of ‖∇L‖² along gradient descent:
            ``‖∇L(w)‖² + 4 tr(Σ)/η²``.
        variances: ``(T + 1, k)``, the eigenvalues of Σ, descending: how far gradient descent
            oscillates along its axes, which are eigenvectors of H(w). Zeros below the edge.
        parameters: ``(P,)``, w at the end.
    """

    lr: float
    loss: Tensor
    predicted_loss: Tensor
    eigenvalues: Tensor
    squared_gradient_norm: Tensor
    predicted_squared_gradient_norm: Tensor
    variances: Tensor
    parameters: Tensor

    @property
    def sharpness(self) -> Tensor:
        """``(T + 1,)``, the largest eigenvalue of H(w)."""
        return self.eigenvalues[:, 0]


def central_flow(
    operator: CurvatureOperator,
    lr: float,
    *,
    steps: int = 100,
    substeps: int = 4,
    margin: float = 0.025,
    max_critical: int = 10,
    tol: float = 1e-2,
    seed: int = 0,
    progress: ProgressOption = False,
) -> CentralFlow:
    r"""Follows the central flow of gradient descent, from the model's present parameters.

    .. math::
        \frac{dw}{dt} = -\eta \big[\nabla L(w)
            + \tfrac12 \nabla_w \langle \Sigma, H(w) \rangle\big], \qquad
        0 \preceq \Sigma \perp 2I - \eta H(w) \succeq 0

    One unit of time is one step of gradient descent. Σ is the covariance of its oscillation: it
    lives where H has the eigenvalue 2/η, and is the one that keeps all eigenvalues from rising
    above. Below the edge it is zero, and this is the gradient flow. With the eigenvectors V whose
    eigenvalues Λ are within ``margin`` of 2/η, and ``Σ = V X Vᵀ``, a substep of length h is
    Euler's, with the X for which the edge is not passed at its end:

    .. math::
        0 \preceq X \perp 2I - \eta\Lambda + \eta^2 h \big[\langle T_{ij}, \nabla L \rangle
            + \tfrac12 \textstyle\sum_{lm} \langle T_{ij}, T_{lm} \rangle X_{lm}\big]_{ij}
            \succeq 0, \qquad T_{ij} = \nabla_w\, v_i^\top H(w)\, v_j

    The third derivatives are central differences of products, ``T_ij ≈ (H(w + εv_i) − H(w − εv_i))
    v_j / 2ε``, with the ε of ``FiniteDifferenceHessian``. On small tanh networks they are exact to
    2e-9 in float64 and to 2e-3 in float32. Where activations have kinks, as ReLU has, they are what
    is seen at the length ε.

    Begin where gradient descent does not oscillate yet, below the edge: an iterate at the edge is
    not on the flow but beside it, by what it oscillates. A mean over steps is what is predicted: a
    single iterate may be far off, and where one eigenvalue alone is at the edge the oscillation can
    come in bursts, hundreds of steps apart. The model is not changed: other memory stands in for
    its parameters meanwhile.

    A substep costs a gradient and at least k + 1 products, for k eigenvalues that are followed;
    with c of them at the edge, 2c gradients and c(c + 1) products more.

    Args:
        operator: the Hessian of the loss that is trained on, over all of its data: a
            ``HessianOperator``, or a ``FiniteDifferenceHessian``.
        lr: η, without momentum and weight decay.
        steps: T, of gradient descent.
        substeps: Euler steps for each. Their error shrinks like 1/substeps; at least 2, since one
            alone would oscillate itself.
        margin: eigenvalues above ``(1 − margin) · 2/η`` are taken for those at the edge. It must be
            more than they rise by in a substep.
        max_critical: how many can be there at once, before it gives up.
        tol: relative residual of the eigenpairs at the edge.
        seed: of the random vectors that the first eigenvectors are found from.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        What it predicts at each step, and the last parameters.

    An ``ArgumentError`` is raised for an argument that is out of range, and where the rate is too
    large: no oscillation keeps the sharpness at the edge, so that gradient descent diverges, or
    more than ``max_critical`` eigenvalues are there. A loss that is NaN or infinite is a
    ``NonFiniteError``.

    Reference:
        Cohen, Damian, Talwalkar, Kolter & Lee 2024, *Understanding optimization in deep learning
        with central flows* (arXiv 2410.24206): the central flow of gradient descent, and its
        formulation by a complementarity problem, discretised as here in the appendix on
        implementation. The loss is predicted as there. Theirs has a third derivative by automatic
        differentiation where this one has differences.
    """
    _check(operator)
    check_number("lr", lr, exclusive=True)
    check_integer("steps", steps, minimum=1)
    check_integer("substeps", substeps, minimum=2)
    check_number("margin", margin, exclusive=True, maximum=0.5)
    check_integer("max_critical", max_critical, minimum=1)
    check_number("tol", tol, exclusive=True)
    flow = _Flow(operator, lr, 1 / substeps, margin, max_critical, tol, seed)
    space = operator.parameters
    theta, rows = space.flatten(space.tensors), []
    with (
        shown(progress, operator.ranks.rank),
        Progress("central flow", "steps", steps) as flowing,
        operator.frozen(),  # nothing but the parameters is another inside
    ):
        for number in range(steps * substeps + 1):
            row, after = flow.substep(theta)
            if number % substeps == 0:
                rows.append(row)
            if number < steps * substeps:
                theta = after
            flowing.tick(number // substeps)
    return _result(lr, rows, theta)


def _check(operator: CurvatureOperator) -> None:
    """Refuses models that the flow cannot move.

    Raises:
        ArgumentError: parameters are of low precision.
    """
    for p in operator.parameters.tensors:
        if p.dtype in LOW_PRECISION:
            remedy = "A substep would be rounded away. Measure a copy of the model: model.float()."
            raise ArgumentError(
                "the dtype of the parameters", p.dtype, "float32 or float64", remedy
            )


class _Row(NamedTuple):
    """What is recorded at one place."""

    loss: float
    squared_norm: float
    eigenvalues: list[float]
    variances: list[float]


@dataclass
class _Flow:
    """The flow, and the eigenpairs at the place that it was last at."""

    operator: CurvatureOperator
    lr: float
    h: float
    margin: float
    max_critical: int
    tol: float
    seed: int
    pairs: TopPairs | None = None

    @property
    def edge(self) -> float:
        """What is this large is taken for an eigenvalue at the edge."""
        return (1 - self.margin) * 2 / self.lr

    def substep(self, theta: Tensor) -> tuple[_Row, Tensor]:
        """Returns what is known at a place, and the place after a substep.

        Raises:
            NonFiniteError: the loss is not finite.
        """
        operator = self.operator
        with operator.at(theta), multiplying(operator):
            pairs = self._follow()
            loss, gradient = operator.loss(), operator.gradient()
        squared_norm = float(operator.inner.sum(square(gradient)))
        if not np.isfinite(loss + squared_norm):
            message = f"The loss is {loss:g} along the flow, and its gradient {squared_norm:g}²."
            raise NonFiniteError(message)
        values = pairs.basis.eigenvalues.double().cpu()
        critical = int((values >= self.edge).sum())
        variances = []
        if critical:
            derivatives = third_derivatives(operator, theta, pairs.basis.vectors[:critical])
            covariance = self._covariance(values[:critical].numpy(), derivatives, gradient)
            variances = np.linalg.eigvalsh(covariance)[::-1].tolist()
            i, j = np.triu_indices(critical)
            weights = torch.from_numpy(covariance[i, j] * np.where(i == j, 0.5, 1.0))
            gradient = gradient.addmv(derivatives.T, weights.to(gradient))
        row = _Row(loss, squared_norm, values.tolist(), variances)
        return row, theta.sub(gradient, alpha=self.lr * self.h)

    def _follow(self) -> TopPairs:
        """Returns the top pairs at the present parameters; the last of them is below the edge.

        Raises:
            ArgumentError: too many are not.
        """
        pairs = self._refined() if self.pairs is not None else None
        while pairs is None or self._at_the_edge(pairs) == pairs.basis.k < self.operator.size:
            known = 0 if pairs is None else pairs.basis.k
            if known > self.max_critical:
                remedy = "Take a smaller rate, or raise max_critical. Each pair costs more."
                allowed = f"so small that at most {self.max_critical} eigenvalues are above 2/lr"
                raise ArgumentError("lr", self.lr, allowed, remedy)
            pairs = self._solved(min(known + _PAIRS, self.operator.size))
        self.pairs = pairs
        return pairs

    def _at_the_edge(self, pairs: TopPairs) -> int:
        return int((pairs.basis.eigenvalues >= self.edge).sum())

    def _solved(self, k: int) -> TopPairs:
        return solve(self.operator, k, tol=min(self.tol, 1e-3), seed=self.seed)

    def _refined(self) -> TopPairs:
        """Returns the pairs of the place before, refined until they are those of this one."""
        pairs = self.pairs
        assert pairs is not None  # noqa: S101 (there was a place before)
        for _ in range(_REFINEMENTS):
            lowest, mean = pairs.lowest, pairs.mean
            with np.errstate(all="ignore"):  # of angles, which nobody asks for and no gap defines
                found = refine(
                    self.operator.matmat, pairs.basis, pairs.guard, lowest=lowest, mean=mean
                )
            pairs = TopPairs(found.basis, found.guard, lowest, mean)
            needed = max(1, self._at_the_edge(pairs))
            if pairs.basis.residuals[:needed].max() <= self.tol * pairs.basis.eigenvalues[0].abs():
                return pairs
        return self._solved(pairs.basis.k)

    def _covariance(
        self, eigenvalues: NDArray[np.float64], derivatives: Tensor, gradient: Tensor
    ) -> NDArray[np.float64]:
        """Returns X, the covariance of the oscillation in the basis of the critical eigenvectors.

        Raises:
            ArgumentError: there is none that keeps the sharpness at the edge.
        """
        k = len(eigenvalues)
        pair = np.zeros((k, k), dtype=int)
        i, j = np.triu_indices(k)
        pair[i, j] = pair[j, i] = np.arange(len(i))
        scale = self.lr**2 * self.h
        both = gram(derivatives, gradient[None]), gram(derivatives, derivatives)
        sums = self.operator.inner.sums(*both)
        rises, falls = sums[0].cpu().numpy()[:, 0], sums[1].cpu().numpy()
        slack = 2 * np.eye(k) - self.lr * np.diag(eigenvalues) + scale * rises[pair]
        found = solve_complementarity(slack, scale / 2 * falls[pair[:, :, None, None], pair])
        if found is None:
            sharpness = f"The sharpness is {eigenvalues[0]:.4g}, 2/lr is {2 / self.lr:.4g}"
            allowed = "a rate at which gradient descent stays bounded"
            remedy = f"{sharpness}, and no oscillation along its eigenvector lowers it."
            raise ArgumentError("lr", self.lr, allowed, remedy)
        return found


def third_derivatives(operator: CurvatureOperator, theta: Tensor, vectors: Tensor) -> Tensor:
    r"""Returns ``T_ij = ∇(v_iᵀ H v_j)`` for the pairs i ≤ j, by central differences.

    .. math:: T_{ij} \approx \frac{H(\theta + \varepsilon v_i) - H(\theta - \varepsilon v_i)}
              {2\varepsilon}\, v_j

    The step is that of ``FiniteDifferenceHessian``: as there, the error is least where that of the
    products, divided by ε, is like what the next derivatives add.

    Args:
        operator: whose products are differentiated.
        theta: ``(P,)``, where.
        vectors: ``(k, P)``, orthonormal.

    Returns:
        ``(k(k + 1)/2, P)``: (1, 1), (1, 2), …, (1, k), (2, 2), …; 2k gradients, k(k + 1) products.
    """
    step = float(length(operator.parameters.unflatten(theta)))
    step *= (3 * torch.finfo(operator.dtype).eps) ** (1 / 3)
    differences = []
    for i, v in enumerate(vectors):
        ahead, behind = (
            _products_at(operator, theta.add(v, alpha=e), vectors[i:]) for e in (step, -step)
        )
        differences.append((ahead - behind) / (2 * step))
    return torch.cat(differences)


def _products_at(operator: CurvatureOperator, theta: Tensor, vectors: Tensor) -> Tensor:
    with operator.at(theta), multiplying(operator):
        return operator.matmat(vectors)


def _result(lr: float, rows: list[_Row], theta: Tensor) -> CentralFlow:
    loss, squared_norm = (
        torch.tensor([row[column] for row in rows], dtype=torch.float64) for column in (0, 1)
    )
    k = max(len(row.eigenvalues) for row in rows)
    eigenvalues = torch.full((len(rows), k), torch.nan, dtype=torch.float64)
    variances = torch.zeros(len(rows), k, dtype=torch.float64)
    for number, row in enumerate(rows):
        eigenvalues[number, : len(row.eigenvalues)] = torch.tensor(row.eigenvalues).double()
        variances[number, : len(row.variances)] = torch.tensor(row.variances).double()
    trace = variances.sum(dim=1)
    return CentralFlow(
        lr=lr,
        loss=loss,
        predicted_loss=loss + trace / lr,
        eigenvalues=eigenvalues,
        squared_gradient_norm=squared_norm,
        predicted_squared_gradient_norm=squared_norm + 4 * trace / lr**2,
        variances=variances,
        parameters=theta,
    )

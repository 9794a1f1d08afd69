r"""Small semidefinite linear complementarity problems, by an interior-point method.

Given a symmetric ``A`` and a map ``B`` of symmetric matrices that is symmetric and positive
semidefinite, the problem is to find ``X`` with

.. math:: X \succeq 0, \qquad S = A + B[X] \succeq 0, \qquad \langle X, S \rangle = 0

It is the condition that ``X`` minimises ``½⟨X, B[X]⟩ + ⟨A, X⟩`` among the semidefinite matrices.
For matrices of one row: x is zero where A is not negative, else −A/B.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_ITERATIONS = 100
"""Steps after which there is no solution; those that there are take 10 to 30."""
_TOLERANCE = 1e-9
"""What ``‖S − A − B[X]‖`` may be, relative to the negative part of A, and ``⟨X, S⟩`` to tr X."""
_UNBOUNDED = 1e12
"""A trace of X above this, in units of ``‖A‖/‖B‖``, is of no solution."""
_CENTRING = 0.1
_SHORT_OF_THE_EDGE = 0.95


def solve_complementarity(A: Matrix, B: Matrix) -> Matrix | None:
    r"""Returns ``X``, or ``None`` where there is no solution.

    Steps are Newton's on the central path ``X S = μ I``, symmetrised by the scaling of Nesterov and
    Todd: with ``W S W = X`` and ``R = A + B[X] − S``, a step is

    .. math:: (W^{-1} \otimes W^{-1} + B)[\Delta X] = \mu X^{-1} - S - R

    whose matrix is positive definite, whatever B is. There is no solution where no ``X`` makes
    ``A + B[X]`` semidefinite; then X grows without bound.

    Args:
        A: ``(k, k)``, symmetric, for k of a few.
        B: ``(k, k, k, k)``, with ``B[X]_ij = Σ B_ijlm X_lm``.

    Returns:
        ``(k, k)``, symmetric and semidefinite.

    Reference:
        Kojima, Shindoh & Hara 1997, *Interior-point methods for the monotone semidefinite linear
        complementarity problem*; Todd, Toh & Tütüncü 1998 for the scaling.
    """
    k = len(A)
    values, vectors = np.linalg.eigh(A)
    if k == 0 or values[0] >= 0:
        return np.zeros_like(A)
    # A congruence keeps what is semidefinite. This one makes what has to be lifted, the negative
    # part, no smaller than what has not, and so the accuracy relative to it.
    frame = vectors / np.sqrt(np.maximum(np.abs(values), -values[0]))
    A = frame.T @ A @ frame
    linear = np.einsum("ia,jb,ijlm,lc,md->abcd", frame, frame, B, frame, frame).reshape(
        k * k, k * k
    )
    strength = float(np.linalg.norm(linear))
    if not strength > 0 or not np.isfinite(1 / strength):
        return None
    linear = linear / strength
    X, S = np.eye(k), np.eye(k)
    for _ in range(_ITERATIONS):
        off = A + (linear @ X.ravel()).reshape(k, k) - S
        gap = float(np.vdot(X, S))
        if np.linalg.norm(off) <= _TOLERANCE and gap <= _TOLERANCE * np.trace(X):
            solution: Matrix = frame @ (X / strength) @ frame.T
            return _symmetric(solution)
        try:
            with np.errstate(all="ignore"):
                X, S = _step(X, S, off, _CENTRING * gap / k, linear)
        except np.linalg.LinAlgError:  # X grows without bound, and S with an edge that stays
            return None
        if not np.trace(X) < _UNBOUNDED:
            return None
    return None


def _step(X: Matrix, S: Matrix, off: Matrix, mu: float, linear: Matrix) -> tuple[Matrix, Matrix]:
    """Returns ``X`` and ``S`` after a step towards ``X S = μ I``."""
    k = len(X)
    scaling = np.linalg.inv(_scaling(X, S))
    right = mu * np.linalg.inv(X) - S - off
    newton = np.kron(scaling, scaling) + linear
    step = _symmetric(np.linalg.solve(newton, right.ravel()).reshape(k, k))
    change = _symmetric(off + (linear @ step.ravel()).reshape(k, k))
    length = min(_longest(X, step), _longest(S, change))
    return X + length * step, S + length * change


def _symmetric(matrix: NDArray[np.floating[Any]]) -> Matrix:
    half: Matrix = (matrix + matrix.T) / 2
    return half


def _scaling(X: Matrix, S: Matrix) -> Matrix:
    """Returns the ``W`` with ``W S W = X``: ``S^{-1/2} (S^{1/2} X S^{1/2})^{1/2} S^{-1/2}``."""
    values, vectors = np.linalg.eigh(S)
    root = (vectors * np.sqrt(values)) @ vectors.T
    inverse = (vectors / np.sqrt(values)) @ vectors.T
    values, vectors = np.linalg.eigh(_symmetric(root @ X @ root))
    middle = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    return _symmetric(inverse @ middle @ inverse)


def _longest(matrix: Matrix, step: Matrix) -> float:
    """Returns the longest step, at most 1, that stays inside of the definite matrices."""
    factor = np.linalg.inv(np.linalg.cholesky(matrix))
    lowest = float(np.linalg.eigvalsh(_symmetric(factor @ step @ factor.T))[0])
    return 1.0 if lowest >= -_SHORT_OF_THE_EDGE else -_SHORT_OF_THE_EDGE / lowest

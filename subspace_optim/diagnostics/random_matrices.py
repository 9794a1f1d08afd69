"""The spectra of random matrices: the law of Marchenko and Pastur, and spikes beside it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_optim._validation import check_number


def marchenko_pastur_edges(ratio: float, variance: float = 1.0) -> tuple[float, float]:
    r"""Returns where the bulk of a sample covariance matrix begins and ends.

    .. math:: \lambda_\pm = \sigma^2 (1 \pm \sqrt{\gamma})^2

    Args:
        ratio: γ, dimensions over samples (P/N, where gradients of N examples are the samples).
        variance: σ² of each entry.

    Returns:
        ``(λ_−, λ_+)``.

    Reference:
        Marchenko & Pastur 1967; `sagun_2017`, appendix B.
    """
    _check_law(ratio, variance)
    root = math.sqrt(ratio)
    return variance * (1 - root) ** 2, variance * (1 + root) ** 2


def marchenko_pastur_density(x: Tensor, ratio: float, variance: float = 1.0) -> Tensor:
    r"""Returns the limiting density of the eigenvalues of a sample covariance matrix.

    .. math::
        f(x) = \frac{\sqrt{(\lambda_+ - x)(x - \lambda_-)}}{2 \pi \sigma^2 \gamma x}
        \quad\text{for}\quad \lambda_- < x < \lambda_+, \quad\text{else}\; 0

    of ``XXᵀ/N`` with independent entries of ``X: (P, N)`` of mean 0 and variance σ², as P and N
    grow at the fixed ratio γ = P/N. It integrates to 1 less the atom at zero,
    ``marchenko_pastur_atom(ratio)``. (At γ = 1 it grows like ``x^{-1/2}`` towards 0.)

    Args:
        x: where, of any shape.
        ratio: γ, dimensions over samples.
        variance: σ² of each entry.

    Returns:
        The density, float64, of the shape of ``x``.

    Reference:
        Marchenko & Pastur 1967; `sagun_2017`, appendix B.
    """
    lower, upper = marchenko_pastur_edges(ratio, variance)
    x = x.double()
    inside = (x > lower) & (x < upper)
    x = torch.where(inside, x, (lower + upper) / 2)
    roots = torch.sqrt(upper - x) * torch.sqrt(x - lower)
    return torch.where(inside, roots / (2 * math.pi * variance * ratio * x), 0.0)


def marchenko_pastur_atom(ratio: float) -> float:
    r"""Returns the share of eigenvalues that are zero, since there are fewer samples.

    .. math:: \max(0,\; 1 - 1/\gamma)

    Args:
        ratio: γ, dimensions over samples.

    Returns:
        From 0 to below 1; for P parameters and N samples, P times it is P − N.

    Reference:
        `sagun_2017`, appendix B.
    """
    _check_law(ratio, 1.0)
    return max(0.0, 1 - 1 / ratio)


def outlier_threshold(ratio: float, variance: float = 1.0) -> float:
    r"""Returns how large an eigenvalue of the population must be to leave the bulk of the sample.

    .. math:: \sigma^2 (1 + \sqrt{\gamma})

    Below it the sample shows nothing: its largest eigenvalue is that of pure noise.

    Args:
        ratio: γ, dimensions over samples.
        variance: σ², the other eigenvalues of the population.

    Returns:
        The threshold.

    Reference:
        Baik, Ben Arous & Péché 2005; Baik & Silverstein 2006 for real entries; `sagun_2017`,
        appendix B.
    """
    _check_law(ratio, variance)
    return variance * (1 + math.sqrt(ratio))


def spiked_eigenvalue(spike: float, ratio: float, variance: float = 1.0) -> float:
    r"""Returns the largest eigenvalue of the sample, for one such eigenvalue of the population.

    .. math:: \ell \left(1 + \frac{\gamma \sigma^2}{\ell - \sigma^2}\right)
              \quad\text{for}\quad \ell > \sigma^2 (1 + \sqrt{\gamma}), \quad\text{else}\; \lambda_+

    Args:
        spike: ℓ, the eigenvalue of the population.
        ratio: γ, dimensions over samples.
        variance: σ², the other eigenvalues of the population.

    Returns:
        Its limit as P and N grow.

    Reference:
        Baik & Silverstein 2006, Theorem 1.1; `sagun_2017`, appendix B.
    """
    check_number("spike", spike)
    if spike <= outlier_threshold(ratio, variance):
        return marchenko_pastur_edges(ratio, variance)[1]
    return spike * (1 + ratio * variance / (spike - variance))


def _check_law(ratio: float, variance: float) -> None:
    check_number("ratio", ratio, exclusive=True)
    check_number("variance", variance, exclusive=True)

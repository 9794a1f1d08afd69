"""Random covariances against the law of Marchenko and Pastur, and the law against itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim import ArgumentError
from subspace_optim.diagnostics import (
    marchenko_pastur_atom,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    outlier_threshold,
    spiked_eigenvalue,
)


def values_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


RATIOS = [0.1, 0.5, 1.0, 2.5]
ratios = pytest.mark.parametrize("ratio", RATIOS)
variances = pytest.mark.parametrize("variance", [1.0, 0.3, 1e-20, 1e20])


@ratios
@variances
def test_the_law_integrates_to_what_is_no_atom_and_has_its_moments(ratio, variance):
    """The mean of the eigenvalues is σ², and that of their squares σ⁴(1 + γ).

    Along ``x = λ_− + (λ_+ − λ_−) sin²(t)``, which takes the roots off both ends.
    """
    low, high = marchenko_pastur_edges(ratio, variance)
    t = torch.linspace(0, math.pi / 2, 4001, dtype=torch.float64)[1:-1]
    x = low + (high - low) * torch.sin(t) ** 2
    mass = marchenko_pastur_density(x, ratio, variance) * (high - low) * torch.sin(2 * t)
    moments = [float((mass * (x / variance) ** p).sum() * math.pi / 8000) for p in range(3)]
    expected = [1 - marchenko_pastur_atom(ratio), 1, 1 + ratio]
    # At γ = 1 the integrand does not vanish at t = 0, where half of a term is missing.
    assert moments == pytest.approx(expected, rel=1e-3 if ratio == 1 else 1e-6)


@ratios
def test_the_law_ends_at_its_edges(ratio):
    low, high = marchenko_pastur_edges(ratio, 2.0)
    assert (low, high) == pytest.approx((2 * (1 - ratio**0.5) ** 2, 2 * (1 + ratio**0.5) ** 2))
    x = values_of(-1, low - 1e-9, high, high + 1e-9, 2 * high)
    assert (marchenko_pastur_density(x, ratio, 2.0) == 0).all()
    inside = torch.linspace(low, high, 12, dtype=torch.float64)[1:-1].view(2, 5)
    density = marchenko_pastur_density(inside, ratio, 2.0)
    assert density.shape == (2, 5)
    assert (density > 0).all()
    assert marchenko_pastur_density(inside.float(), ratio).dtype == torch.float64


def covariance(P: int, N: int, spike: float = 1.0, seed: int = 0) -> Tensor:
    """Eigenvalues, ascending, of ``XXᵀ/N``; one row of X has another variance than 1."""
    X = torch.randn(P, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    X[0] *= math.sqrt(spike)
    return torch.linalg.eigvalsh(X @ X.T / N)


@ratios
def test_random_covariances_come_near_the_law(ratio):
    """Kolmogorov's distance falls with the size, about in proportion."""
    low, high = marchenko_pastur_edges(ratio)
    distances = []
    for P in (40, 160, 640):
        values = covariance(P, round(P / ratio))
        grid = torch.linspace(0, 1, 200001, dtype=torch.float64)
        x = low + (high - low) * torch.sin(grid * math.pi / 2) ** 2  # many points at the ends
        mass = torch.cumulative_trapezoid(marchenko_pastur_density(x, ratio), x)
        share = marchenko_pastur_atom(ratio) + np.interp(values, x[1:], mass)
        share[values < 1e-10] = marchenko_pastur_atom(ratio)
        steps = np.arange(1, P + 1) / P
        distances.append(float(np.abs(steps - share)[values >= 1e-10].max()))
    assert distances[0] > 2 * distances[1] > 4 * distances[2]
    assert distances[2] < 0.01
    zeros = int((values < 1e-10).sum())
    assert zeros == round(640 * marchenko_pastur_atom(ratio))


@pytest.mark.parametrize("ratio", [0.25, 1.0, 2.0])
def test_a_spike_leaves_the_bulk_beyond_the_threshold_alone(ratio):
    threshold, edge = outlier_threshold(ratio), marchenko_pastur_edges(ratio)[1]

    def largest(spike: float) -> float:
        N = round(300 / ratio)
        return float(torch.stack([covariance(300, N, spike, s)[-1] for s in range(8)]).mean())

    below, above = 0.6 * threshold, 2.5 * threshold
    assert largest(below) == pytest.approx(edge, rel=0.04)
    assert spiked_eigenvalue(below, ratio) == edge
    expected = spiked_eigenvalue(above, ratio)
    assert expected > 1.2 * edge
    assert largest(above) == pytest.approx(expected, rel=0.06)


@given(ratio=st.floats(1e-3, 1e3), variance=st.floats(1e-20, 1e20), factor=st.floats(1.0001, 100.0))
def test_the_place_of_a_spike_grows_from_the_edge(ratio, variance, factor):
    edge = marchenko_pastur_edges(ratio, variance)[1]
    threshold = outlier_threshold(ratio, variance)
    spike = factor * threshold
    place = spiked_eigenvalue(spike, ratio, variance)
    assert place > edge
    assert place == pytest.approx(variance * spiked_eigenvalue(spike / variance, ratio))
    # At the threshold the formula meets the edge, where it is flat and bends by 2/(σ²√γ).
    bend = (spike - threshold) ** 2 / (variance * math.sqrt(ratio))
    assert place - edge <= bend + 1e-9 * edge
    assert spiked_eigenvalue(threshold, ratio, variance) == edge
    assert spiked_eigenvalue(0.0, ratio, variance) == edge


def test_the_closed_forms():
    assert marchenko_pastur_edges(4.0, 2.0) == (2.0, 18.0)
    assert marchenko_pastur_atom(4.0) == 0.75
    assert marchenko_pastur_atom(0.5) == marchenko_pastur_atom(1.0) == 0.0
    assert outlier_threshold(4.0, 2.0) == 6.0
    assert spiked_eigenvalue(10.0, 4.0, 2.0) == 20.0
    at = marchenko_pastur_density(values_of(10), 4.0, 2.0)
    assert float(at) == pytest.approx(8 / (2 * math.pi * 2 * 4 * 10))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_a_law_that_is_none_is_refused(bad):
    x = torch.ones(2)
    for call in (
        marchenko_pastur_edges,
        outlier_threshold,
        lambda ratio, variance=1.0: marchenko_pastur_density(x, ratio, variance),
        lambda ratio, variance=1.0: spiked_eigenvalue(1.0, ratio, variance),
    ):
        with pytest.raises(ArgumentError, match=r"^ratio is"):
            call(bad)
        with pytest.raises(ArgumentError, match=r"^variance is"):
            call(0.5, bad)
    with pytest.raises(ArgumentError, match=r"^ratio is"):
        marchenko_pastur_atom(bad)
    with pytest.raises(ArgumentError, match=r"^spike is -1"):
        spiked_eigenvalue(-1.0, 0.5)

"""What is measured for appendix B of `sagun_2017`: a linear model beside random-matrix laws."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import subspace_optim as so
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.sagun_2017.runs import near_zero
from benchmarks.papers.training import top_of


def white(job: Job, *, parameters: int, ratios: Sequence[float]) -> Raw:
    """Compares the Gauss-Newton matrix of a linear model on white data with its law.

    ``f = θᵀx`` and half the squared error: ``G = XᵀX / N``, a sample covariance matrix.

    Returns:
        A row for each ratio.
    """
    generator = job.generator()
    rows = []
    for ratio in ratios:
        examples = round(parameters / ratio)
        x = torch.randn(examples, parameters, generator=generator).to(job.device)
        spectrum = so.diagnostics.exact_spectrum(linear(x))
        rows.append(
            {
                "ratio": ratio,
                "zeros": near_zero(spectrum, 1e-6),
                "trivial": so.diagnostics.trivial_eigenvalues(parameters, examples, 1),
                "distance": kolmogorov_distance(spectrum, ratio),
                "eigenvalues": spectrum.tolist(),
            }
        )
    return {"rows": rows}


def spiked(
    job: Job, *, parameters: int, ratios: Sequence[float], spikes: Sequence[float], draws: int
) -> Raw:
    """Compares the largest eigenvalue with the theory, where one variance of the data is large.

    That variance is ``1 + s √γ``: the threshold is at s = 1.

    Returns:
        A row for each ratio and spike.
    """
    generator = job.generator()
    rows = []
    for ratio, spike in itertools.product(ratios, spikes):
        variance = 1 + spike * math.sqrt(ratio)
        largest = []
        for _ in range(draws):
            x = torch.randn(round(parameters / ratio), parameters, generator=generator)
            x[:, 0] *= math.sqrt(variance)
            largest.append(top_of(linear(x.to(job.device)), 1, 1e-2, job.seed).largest)
        expected = so.diagnostics.spiked_eigenvalue(variance, ratio)
        row = {"ratio": ratio, "spike": spike, "population": variance}
        rows.append(row | {"largest": largest, "expected": expected})
    return {"rows": rows}


def linear(x: Tensor) -> so.GaussNewtonOperator:
    """Returns the Gauss-Newton matrix of ``θᵀx`` and half the squared error."""
    model = nn.Linear(x.shape[1], 1, bias=False, device=x.device)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().mean()

    return so.GaussNewtonOperator(model, loss, (x, torch.zeros(len(x), 1, device=x.device)))


def kolmogorov_distance(spectrum: Tensor, ratio: float) -> float:
    """Returns the largest difference of the cumulative distribution from Marchenko and Pastur's.

    Args:
        spectrum: eigenvalues, in any order, of unit variance.
        ratio: γ.
    """
    lower, upper = so.diagnostics.marchenko_pastur_edges(ratio)
    # x = middle + half · sin t: the density has square roots at its edges, and this has none.
    t = torch.linspace(-math.pi / 2, math.pi / 2, 4001, dtype=torch.float64)
    x = (lower + upper) / 2 + (upper - lower) / 2 * torch.sin(t)
    slope = (upper - lower) / 2 * torch.cos(t)
    mass = torch.cumulative_trapezoid(so.diagnostics.marchenko_pastur_density(x, ratio) * slope, t)
    law = so.diagnostics.marchenko_pastur_atom(ratio) + mass
    values = spectrum.double().sort().values
    found = torch.searchsorted(values, x[1:], right=True) / len(values)
    return float((found - law).abs().max())

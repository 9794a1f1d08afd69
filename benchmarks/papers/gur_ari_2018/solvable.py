"""What is measured for section 3 of `gur_ari_2018`: the solvable model, and the same with noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

import subspace_optim as so
from benchmarks.losses import cross_entropy
from benchmarks.papers.networks import made
from benchmarks.papers.reproduction import Job, Raw
from benchmarks.papers.training import Problem, Row, column, top_of, train
from subspace_optim.diagnostics import (
    eigenvector_fractions,
    exact_spectrum,
    gradient_fraction,
    subspace_overlap,
)

_FINE: Final = 1e-6  # of the eigenpairs, in float64


def two_samples(job: Job, *, dimension: int, lr: float, steps: int) -> Raw:
    """Holds gradient descent on two orthonormal samples against the closed forms.

    With u_c the lead of the right logit for sample c: the flow is u + e^u = ηt + c exactly, and
    u = log(ηt + c) at late times (eqs. 7 and 15-16); the gradient is (μ_2 − μ_1)/(2ηt), a quarter
    of what eqs. 8 and 17 print; the Hessian has the eigenvalue 1/(ηt) twice (eqs. 9, 18, 19).

    Returns:
        At steps of equal ratios: relative errors of all of these.
    """
    random = job.generator()
    means = torch.linalg.qr(torch.randn(dimension, 2, generator=random, dtype=torch.float64)).Q.T
    means = means.to(job.device)
    labels = torch.arange(2, device=job.device)
    model = made(job, lambda: nn.Linear(dimension, 2, bias=False).double())
    weight = next(model.parameters())
    problem = Problem(model, cross_entropy, means, labels)
    hessian = problem.hessian()
    spans = torch.stack([torch.cat([m, -m]) for m in means]) / math.sqrt(2)
    start = weight.detach().clone()
    constants = _leads(start, means) + _leads(start, means).exp()
    at = sorted({round(steps ** (i / 24)) for i in range(25)})

    def record(step: int) -> Row:
        time, now = lr * step, weight.detach()
        lead = _leads(now, means)
        flow = _flow(time + constants)
        late = (time + constants).log() - _leads(start, means)
        expected = start + 0.5 * torch.stack([late[0] * means[0] - late[1] * means[1]] * 2) * (
            torch.tensor([[1.0], [-1.0]], device=now.device)
        )
        gradient = hessian.gradient()
        corrected = math.sqrt(2) * (spans[1] - spans[0]) / (2 * time)
        basis = top_of(hessian, 4, 1e-10)
        top = basis.first(2)
        return {
            "time": time,
            "lead": lead.tolist(),
            "flow": flow.tolist(),
            "trajectory": float((now - expected).norm() / (now - start).norm()),
            "gradient": float((gradient - corrected).norm() / gradient.norm()),
            "gradient_printed": float((gradient - 4 * corrected).norm() / gradient.norm()),
            "norm": float(gradient.norm()),
            "eigenvalues": basis.eigenvalues.tolist(),
            "f_top": float(gradient_fraction(gradient, top)),
            "span": float(subspace_overlap(top, spans)),
        }

    due = set(at).__contains__
    rows = train(job, "flow", problem, problem.sgd(lr), steps=steps, record=record, every=due)
    return {name: column(rows, name) for name in rows[0]}


def _leads(weight: Tensor, means: Tensor) -> Tensor:
    """u_c, by which the right logit leads for sample c."""
    logits = weight @ means.T
    return torch.stack([logits[0, 0] - logits[1, 0], logits[1, 1] - logits[0, 1]])


def _flow(reached: Tensor) -> Tensor:
    """The u with u + e^u = ``reached``, by Newton's method from above, where it cannot miss."""
    root = torch.where(reached > 1, reached.clamp(min=1).log(), reached)
    for _ in range(20):
        root = root - (root + root.exp() - reached) / (1 + root.exp())
    return root


def rank_without_noise(job: Job, k: int) -> int:
    """Returns the rank of the Hessian for k orthonormal samples at random parameters.

    It does not depend on the dimension, as long as that is at least k: here it is 2k.
    """
    random = job.generator()
    means = torch.linalg.qr(torch.randn(2 * k, k, generator=random, dtype=torch.float64)).Q.T
    model = made(
        replace(job, device=means.device), lambda: nn.Linear(2 * k, k, bias=False).double()
    )
    hessian = so.HessianOperator(model, cross_entropy, (means, torch.arange(k)))
    eigenvalues = exact_spectrum(hessian)
    return int((eigenvalues > 1e-9 * eigenvalues[0]).sum())


def mixture(
    job: Job,
    *,
    classes: Sequence[int],
    noises: Sequence[float],
    dimension: int,
    per_class: int,
    lr: float,
    steps: int,
    records: int,
) -> Raw:
    """Trains softmax regression on Gaussian mixtures by gradient descent.

    Returns:
        For each of them, with biases and without: f_top, the fractions c_i² of the top k, and
        2k + 2 eigenvalues along training. For each number of classes the rank without noise.
    """
    at = {0} | {round(steps ** (i / (records - 2))) for i in range(records - 1)}

    def case(k: int, noise: float, bias: bool) -> Raw:
        draw = partial(torch.randn, generator=job.generator(), dtype=torch.float64)
        means = functional.normalize(draw(k, dimension))
        y = torch.arange(k).repeat_interleave(per_class if noise else 1)
        x = means[y] + noise * draw(len(y), dimension)
        model = made(job, lambda: nn.Linear(dimension, k, bias=bias).double())
        problem = Problem(model, cross_entropy, x.to(job.device), y.to(job.device))
        hessian = problem.hessian()

        def record(_: int) -> Row:
            basis = top_of(hessian, 2 * k + 2, _FINE)
            fractions = eigenvector_fractions(hessian.gradient(), basis)
            return {
                "eigenvalues": basis.eigenvalues.tolist(),
                "fractions": fractions[:k].tolist(),
                "f_top": float(fractions[:k].sum()),
            }

        name, sgd = f"k{k}-noise{noise:g}-bias{bias:d}", problem.sgd(lr)
        rows = train(job, name, problem, sgd, steps=steps, record=record, every=at.__contains__)
        found: Raw = {"k": k, "noise": noise, "bias": bias}
        return found | {name: column(rows, name) for name in rows[0]}

    kinds = itertools.product(classes, noises, (False, True))
    cases = [case(*kind) for kind in kinds]
    return {"cases": cases, "ranks": [[k, rank_without_noise(job, k)] for k in classes]}

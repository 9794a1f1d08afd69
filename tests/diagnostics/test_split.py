"""What is measured of vectors that are split over ranks is what is measured of whole ones.

The truth is the same function on one process; ``tests.split`` has the ranks, as threads, and all of
them have to come to the same numbers, bit for bit.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import subspace_optim as so
from subspace_optim import diagnostics
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.diagnostics import given_gradient
from subspace_optim.diagnostics.alignment import hessian_gradient_overlap
from subspace_optim.diagnostics.gradient_noise import _noise
from subspace_optim.diagnostics.measures.base import Training
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.diagnostics.sampled import SampledGradient
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.rows import singular_values
from subspace_optim.step_hooks import optimizers_of
from tests.split import Either, SplitInnerProduct, Unsplit, alike, on_ranks, splits, unlocked
from tests.split_model import P, SplitModel, SplitOperator

unlocked(Step)
central_flow: Any = importlib.import_module("subspace_optim.diagnostics.central_flow")

SIZE = 50


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthonormal(k: int, size: int, seed: int) -> Tensor:
    return torch.linalg.qr(random(size, k, seed=seed)).Q.T.contiguous()


def compare(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """All ranks have found the same, and that is what was expected."""
    for name, truth in expected.items():
        value = alike([torch.as_tensor(theirs[name], dtype=torch.float64) for theirs in found])
        whole = torch.as_tensor(truth, dtype=torch.float64)
        torch.testing.assert_close(value, whole, rtol=1e-6, atol=1e-9, equal_nan=True, msg=name)


def of_vectors(inner: Either, seed: int) -> dict[str, Any]:
    """What is measured of updates, gradients and bases alone."""
    rows, others = orthonormal(4, SIZE, seed), orthonormal(3, SIZE, seed + 1)
    nearby = torch.linalg.qr((rows[:3] + 1e-7 * others).T).Q.T
    values = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    basis = EigenBasis(values, inner.mine(rows), torch.zeros(4).double(), inner)
    update, gradient, start = (inner.mine(v) for v in random(3, SIZE, seed=seed + 2))
    rows, others, nearby = map(inner.mine, (rows, others, nearby))
    classes = inner.mine(torch.cat([1e30 * random(2, SIZE, seed=seed), torch.zeros(1, SIZE)]))
    groups, weights = inner.mine(random(5, SIZE, seed=seed)), torch.arange(1.0, 6.0).double()
    sampled = SampledGradient(groups.clone(), weights, 0.3, basis)
    noise = _noise(inner.mine(random(5, SIZE, seed=seed)), basis)
    cosines = diagnostics.class_gradient_cosines(classes, basis)
    curvature = LowRankCurvature(values[:3], classes, inner)
    overlap = diagnostics.subspace_overlap
    return {
        "chi": diagnostics.alignment(update, basis),
        "fraction": diagnostics.gradient_fraction(gradient, basis),
        "fractions": diagnostics.eigenvector_fractions(gradient, basis),
        "cosine": hessian_gradient_overlap(gradient, update, inner=inner),
        "dom": diagnostics.dom_lr(update, gradient, basis),
        "bulk": diagnostics.bulk_lr(update, gradient, basis),
        "no bulk": diagnostics.bulk_lr(update, basis.project(gradient), basis),
        "distance": diagnostics.distance(update, start, inner=inner),
        "localization": diagnostics.localization(basis),
        "of rows": diagnostics.localization(others, inner=inner),
        "of zeros": diagnostics.localization(0 * others, inner=inner),
        "displacement": diagnostics.displacement(basis.first(3), others),
        "of others": diagnostics.displacement(others, nearby, inner=inner),
        "overlap": torch.stack([overlap(basis, others), overlap(others, nearby, inner=inner)]),
        "overlaps": diagnostics.overlap_matrix([others, basis, nearby]),
        "angles": diagnostics.principal_angles(others, basis),
        "small angles": diagnostics.principal_angles(basis.first(3), nearby),
        "cosines": cosines.cosines,
        "assignment": cosines.assignment,
        "ranks": [diagnostics.intersection_rank(c, basis) for c in (classes, curvature, rows[:2])],
        "singular values": singular_values(torch.cat([rows, 1e-5 * others, rows[:1]]), inner),
        "sampled": torch.stack(
            [
                *sampled.norm(),
                *sampled.alignment(),
                *sampled.dom_lr(update),
                *sampled.bulk_lr(update),
            ]
        ),
        "noise": noise.noise,
        "scatter": [noise.total, noise.covariance_overlap, noise.rank],
    }


@settings(max_examples=12)
@given(sizes=splits(SIZE), seed=st.integers(0, 99))
def test_of_vectors(sizes, seed):
    compare(on_ranks(sizes, lambda inner: of_vectors(inner, seed)), of_vectors(Unsplit(), seed))


def of_an_operator(inner: Either, seed: int) -> dict[str, Any]:
    """What takes products, gradients and losses at the parameters of a model."""
    model = SplitModel(inner, seed)
    operator = SplitOperator(model, inner)
    upper, lower = diagnostics.spectrum_edges(operator, 2)
    trace, exact = (diagnostics.trace(operator, products=n, seed=seed) for n in (12, P))
    density = diagnostics.spectral_density(operator, probes=2, steps=6, seed=seed)
    sharp = diagnostics.batch_sharpness(operator)
    noise = diagnostics.gradient_noise(operator, upper)
    valley = diagnostics.valley(operator, upper)
    update = -0.05 * operator.gradient()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    model.backward()
    adam.step()
    by_name = {"first": "sign", "*": "euclidean"}
    return {
        "all": diagnostics.exact_spectrum(operator),
        "edges": torch.cat([upper.eigenvalues, lower.eigenvalues]),
        "sizes": [upper.size, lower.size],
        "traces": [trace.value, trace.standard_error, exact.value],
        "density": torch.stack([density.nodes, density.weights]),
        "batches": [sharp.value, sharp.standard_error, sharp.products],
        "noise": torch.cat([noise.noise, torch.tensor([noise.total, noise.covariance_overlap])]),
        "valley": list(valley),
        "critical": diagnostics.critical_sharpness(operator, update, 0.05),
        "directional": diagnostics.directional_sharpness(operator, update),
        "blocks": list(diagnostics.block_sharpness(operator, "*", tol=1e-9).values()),
        "adam": diagnostics.preconditioned_sharpness(operator, adam),
        "lowest": diagnostics.lowest_eigenvalue(operator),
        "sign": diagnostics.norm_sharpness(operator, norm="sign", basis=upper, seed=seed),
        "both": diagnostics.norm_sharpness(operator, norm=by_name, seed=seed),
        "euclidean": diagnostics.norm_sharpness(operator, norm="euclidean"),
        "dual": [diagnostics.dual_norm(operator, norm=n) for n in ("sign", "euclidean", by_name)],
    }


@settings(max_examples=6)
@given(sizes=splits(P), seed=st.integers(0, 99))
def test_of_an_operator(sizes, seed):
    expected = of_an_operator(Unsplit(), seed)
    compare(on_ranks(sizes, lambda inner: of_an_operator(inner, seed)), expected)


def test_a_spectral_norm_of_what_lies_on_several_ranks_is_refused():
    def each(inner: SplitInnerProduct) -> None:
        operator = SplitOperator(SplitModel(inner), inner)
        with pytest.raises(so.ArgumentError, match="whole on a rank"):
            diagnostics.norm_sharpness(operator, norm="spectral")

    on_ranks([P, 0], each)


def rows_of(inner: Either) -> dict[str, Any]:
    """The rows of a monitor, of a training by SGD with momentum."""
    model = SplitModel(inner)
    operator = SplitOperator(model, inner)
    subspace = so.DominantSubspace(operator, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)
    measures = [
        *so.measures.dominant(),
        so.measures.directional_sharpness(),
        so.measures.critical_sharpness(),
        so.measures.eigenvectors(),
    ]
    monitor = so.Monitor(optimizer, subspace, measures=measures)
    for _ in range(6):
        model.backward()
        optimizer.step()
    return {name: column for name, column in monitor.history.items() if "seconds" not in name}


def test_of_the_steps_of_a_training():
    expected = rows_of(Unsplit())
    assert math.isfinite(expected["bulk_lr"][-1])
    assert expected["displacement"][-1]
    compare(on_ranks([25, 0, 15], rows_of), expected)


def test_the_central_flow(monkeypatch):
    """At the edge, where third derivatives and the complementarity problem decide."""
    monkeypatch.setattr(ParameterSpace, "length", lambda *_: torch.tensor(1.0))

    def flow(inner: Either) -> dict[str, Any]:
        operator = SplitOperator(SplitModel(inner, seed=5), inner)
        sharpness = float(diagnostics.exact_spectrum(operator)[0])
        found = central_flow.central_flow(operator, 2.04 / sharpness, steps=3, tol=1e-6)
        return {
            "loss": found.loss,
            "norm": found.squared_gradient_norm,
            "eigenvalues": found.eigenvalues,
            "variances": found.variances,
            "end": inner.whole(found.parameters),
        }

    expected = flow(Unsplit())
    assert (expected["variances"][:, 0] > 0).all()
    compare(on_ranks([25, 0, 15], flow), expected)


def test_a_gradient_of_another_loss_is_told_of_on_all_ranks(monkeypatch):
    """Also on a rank whose own part of it is right."""
    told: list[str] = []
    monkeypatch.setattr(
        given_gradient.warnings, "warn", lambda message, *_, **__: told.append(message)
    )

    def each(inner: SplitInnerProduct) -> None:
        model = SplitModel(inner)
        operator = SplitOperator(model, inner)
        operator.current = True
        space, optimizer = operator.parameters, torch.optim.SGD(model.parameters(), lr=0.01)
        start = space.flatten(space.tensors)
        training = Training(space, optimizers_of(optimizer, space), None, operator, start)
        given, step = given_gradient.GivenGradient(training), Step(training, 0)
        model.backward()
        if inner.rank == 1:
            model.second.grad.neg_()
        given.note(closure=False)
        _ = step.gradient
        optimizer.step()
        step.end()
        given.compare(step)

    on_ranks([20, 20], each)
    assert len(told) == 2
    assert len(set(told)) == 1


def test_steps_are_counted_alike_on_all_ranks():
    """Where a digest tells whether SAM has moved; one of the ranks has nothing to digest."""

    def each(inner: SplitInnerProduct) -> int:
        model = SplitModel(inner)
        operator = SplitOperator(model, inner)
        own, watched = (so.DominantSubspace(operator, 2, refresh=100) for _ in range(2))
        optimizer = so.BulkSAM(model.parameters(), lr=0.01, subspace=own)
        so.Monitor(optimizer, watched, every=3)
        for _ in range(5):
            optimizer.step(model.backward)
        return watched.clock

    assert alike(on_ranks([20, 0, 20], each)) == 5

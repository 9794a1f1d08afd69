"""Spectra against ``eigvalsh`` in float64, and random matrices against their limits."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import ArgumentError, ConvergenceWarning, NonFiniteError
from subspace_optim.curvature import OperatorStats
from subspace_optim.diagnostics import (
    SpectralDensity,
    exact_spectrum,
    spectral_density,
    spectrum_edges,
    trace,
)
from subspace_optim.linalg import top_eigenpairs
from subspace_optim.linalg.spectral_density import lanczos_quadrature
from subspace_optim.linalg.trace import hutch_plus_plus
from tests.curvature.test_gauss_newton import of_problem
from tests.dense import DTYPES, Problem, make_problem, problems, projector, spectra, symmetric

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
scales = pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])


def values_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class DenseOperator(so.CurvatureOperator):
    """A matrix as an operator. It insists on ``frozen``, and knows whether it was released."""

    def __init__(self, entries: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.entries = entries.to(dtype)
        self.parameters = so.ParameterSpace(
            nn.ParameterList([torch.zeros(len(entries), dtype=dtype)])
        )
        self.stats = OperatorStats()
        self.is_frozen = self.keeps = False
        self.broken_from = math.inf

    def matvec(self, v: Tensor) -> Tensor:
        return self.matmat(v[None])[0]

    def matmat(self, vectors: Tensor) -> Tensor:
        assert self.is_frozen
        self.keeps = True
        self.stats.products += len(vectors)
        products = vectors @ self.entries
        return products * torch.nan if self.stats.products >= self.broken_from else products

    def gradient(self) -> Tensor:
        raise NotImplementedError

    def loss(self) -> float:
        raise NotImplementedError

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.is_frozen = True
        try:
            yield
        finally:
            self.is_frozen = False

    def release(self) -> None:
        self.keeps = False


def of(problem: Problem, kind: Callable[..., Any] = so.HessianOperator) -> Any:
    """Its operator, without the proof that it makes of itself: here it meets the dense matrix."""
    return kind(problem.model, problem.loss_fn, problem.batches, verify=False)


OF_AN_OPERATOR: dict[str, Callable[[so.CurvatureOperator], Any]] = {
    "exact_spectrum": exact_spectrum,
    "spectral_density": lambda operator: spectral_density(operator, probes=2, steps=5),
    "trace": lambda operator: trace(operator, products=12),
    "spectrum_edges": lambda operator: spectrum_edges(operator, 2),
}
of_an_operator = pytest.mark.parametrize("measure", OF_AN_OPERATOR.values(), ids=OF_AN_OPERATOR)


@of_an_operator
def test_products_are_taken_at_one_parameter_state_and_nothing_is_kept(measure):
    operator = DenseOperator(symmetric(torch.arange(30).double()))
    measure(operator)  # the products look whether they are inside of `frozen`
    assert operator.stats.products
    assert not operator.is_frozen
    assert not operator.keeps
    operator.broken_from = operator.stats.products + 2
    with pytest.raises(NonFiniteError, match="not finite"):
        measure(operator)
    assert not operator.is_frozen
    assert not operator.keeps


@of_an_operator
def test_the_model_is_left_as_it_was(measure):
    problem = make_problem("mlp")
    model = nn.Sequential(problem.model, nn.Dropout(0.5), nn.BatchNorm1d(2)).double()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    operator = so.HessianOperator(model, problem.loss_fn, problem.batches[2], verify=False)
    measure(operator)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all((p.grad == 1).all() for p in model.parameters())
    assert operator._point.kept is None


# --- the whole spectrum, its density, its trace ---------------------------------------------------


@settings(max_examples=3)
@given(problem=problems())
def test_exact_spectra_are_those_of_the_dense_matrices(problem):
    """Of the Hessian, of its Gauss-Newton part, and of the residual."""
    hessian, gauss_newton = of(problem), of(problem, so.GaussNewtonOperator)
    H, G = problem.dense().hessian, of_problem(problem)
    for operator, dense in (
        (hessian, H),
        (gauss_newton, G),
        (so.ResidualOperator(hessian, gauss_newton), H - G),
    ):
        values = exact_spectrum(operator)
        assert (values.dtype, values.shape) == (torch.float64, (len(dense),))
        assert (values.diff() <= 0).all()
        expected = torch.linalg.eigvalsh(dense).flip(0)
        tolerance = 1e-11 * max(1.0, float(H.abs().max()))
        torch.testing.assert_close(values, expected, rtol=0, atol=tolerance)


@dtypes
@scales
def test_exact_spectra_of_any_scale(dtype, scale):
    spectrum = torch.linspace(1, -0.5, 70).double()
    operator = DenseOperator(scale * symmetric(spectrum), dtype)
    values = exact_spectrum(operator)
    assert operator.stats.products == 70
    close = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(values / scale, spectrum, rtol=0, atol=close)


def test_rounding_of_products_is_averaged_out():
    """Of an unsymmetric matrix the symmetric part is taken, not one of its triangles."""
    entries = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    torch.testing.assert_close(
        exact_spectrum(DenseOperator(entries)), torch.tensor([2.0, 0.0]).double()
    )


def test_a_matrix_that_is_too_large_is_refused_before_any_product():
    operator = DenseOperator(torch.eye(50))
    message = (
        r"^the size of the operator is 50, but must be at most max_size=49\. The dense matrix "
        r"would take 6e-05 GB and 50 products: raise max_size .* or use spectral_density, trace"
    )
    with pytest.raises(ArgumentError, match=message):
        exact_spectrum(operator, max_size=49)
    assert operator.stats.products == 0
    assert len(exact_spectrum(operator, max_size=50)) == 50
    with pytest.raises(ArgumentError, match=r"^max_size is 0"):
        exact_spectrum(operator, max_size=0)


@settings(max_examples=5)
@given(problem=problems(), seed=st.integers(0, 99))
def test_density_and_trace_of_a_model_are_those_of_its_dense_hessian(problem, seed):
    """From the same random vectors. What these are good for is the business of other tests."""
    operator = of(problem)
    H = problem.dense().hessian
    P, options = len(H), {"seed": seed, "dtype": torch.float64}
    density = spectral_density(operator, probes=3, steps=4, seed=seed)
    expected = lanczos_quadrature(lambda v: H @ v, P, probes=3, steps=4, **options)
    assert (density.size, density.products) == (P, 12)
    scale = float(torch.linalg.matrix_norm(H, 2))
    assume(scale > 1e-6)
    for p in (1, 2, 3):
        found, truth = density.moment(p), expected.moment(p)
        close = {"rel": 1e-8, "abs": 1e-10 * scale**p}
        assert found.value == pytest.approx(truth.value, **close)
        assert found.standard_error == pytest.approx(truth.standard_error, **close)
    for products in (12, 2 * P):
        found = trace(operator, products=products, seed=seed)
        truth = hutch_plus_plus(lambda rows: rows @ H, P, products, **options)
        assert found.products == truth.products == min(products, P)
        assert found.value == pytest.approx(truth.value, rel=1e-6, abs=1e-6 * scale)
        assert found.standard_error == pytest.approx(truth.standard_error, abs=1e-6 * scale)
    assert found.value == pytest.approx(float(H.trace()), abs=1e-10 * scale * P)


@scales
def test_options_of_density_and_trace_reach_the_numerics(scale):
    matrix = scale * symmetric(torch.cat([torch.tensor([9.0, 4.0]), torch.linspace(-1, 1, 78)]))
    operator = DenseOperator(matrix, torch.float32)
    density = spectral_density(operator, probes=3, steps=7, seed=1)
    assert isinstance(density, SpectralDensity)
    assert density.nodes.shape == (3, 7)
    assert operator.stats.products == density.products == 21
    assert spectral_density(operator).nodes.shape == (10, 80)
    other = spectral_density(operator, probes=3, steps=7, seed=2)
    assert not torch.equal(density.nodes, other.nodes)
    assert abs(density.moment(1).value - 13 / 80 * scale) <= 6 * density.moment(1).standard_error
    first, second = (trace(operator, products=20, seed=seed) for seed in (1, 2))
    assert first.products == second.products == 20
    assert first.value != second.value
    assert trace(operator).products == 60
    for estimate in (first, second):
        assert abs(estimate.value - 13 * scale) <= 6 * estimate.standard_error
        assert estimate.standard_error < 13 * scale


# --- the edges ------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(spectrum=spectra(20), data=st.data(), dtype=st.sampled_from(list(DTYPES.values())))
def test_edges_are_both_ends_of_the_spectrum(spectrum, data, dtype):
    k = data.draw(st.integers(1, len(spectrum)))
    matrix = symmetric(spectrum, data.draw(st.integers(0, 99))).to(dtype)
    operator = DenseOperator(matrix, dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-9
    largest, smallest = spectrum_edges(operator, k, tol=tol)
    values = torch.linalg.eigvalsh(matrix.double()).flip(0)
    scale = float(values.abs().max())
    for basis, expected in ((largest, values[:k]), (smallest, values[-k:])):
        assert (basis.k, basis.size, basis.dtype) == (k, len(values), dtype)
        assert (basis.eigenvalues.diff() <= 0).all()
        V, found = basis.vectors.double(), basis.eigenvalues.double()
        torch.testing.assert_close(found, expected, rtol=0, atol=3 * tol * scale)
        true = (V @ matrix.double() - found[:, None] * V).norm(dim=1)
        assert true.max() <= 2 * tol * scale
        assert (true - basis.residuals.double()).abs().max() <= tol * scale
        identity = torch.eye(k, dtype=torch.float64)
        torch.testing.assert_close(V @ V.T, identity, rtol=0, atol=1e-5)


@settings(max_examples=5)
@given(problem=problems())
def test_edges_of_a_hessian(problem):
    operator = of(problem)
    values, vectors = torch.linalg.eigh(problem.dense().hessian)
    values, vectors = values.flip(0), vectors.T.flip(0)
    scale = float(values.abs().max())
    assume(scale > 1e-6)
    largest, smallest = spectrum_edges(operator, 2, tol=1e-8)
    torch.testing.assert_close(largest.eigenvalues, values[:2], rtol=0, atol=1e-7 * scale)
    torch.testing.assert_close(smallest.eigenvalues, values[-2:], rtol=0, atol=1e-7 * scale)
    if values[-3] - values[-2] > 1e-3 * scale:
        difference = projector(smallest.vectors) - projector(vectors[-2:])
        assert difference.abs().max() <= 1e-4


@dtypes
@scales
def test_edges_of_any_scale_and_size(dtype, scale):
    """The negative edge is a hundredth of the positive one, and an eigenvalue of the bulk near."""
    spectrum = torch.cat(
        [torch.tensor([9.0, 7.0]), torch.linspace(0.05, -0.05, 396), torch.tensor([-0.08, -0.1])]
    )
    operator = DenseOperator(scale * torch.diag(spectrum).double(), dtype)
    largest, smallest = spectrum_edges(operator, 2, tol=1e-4)
    close = {"rtol": 0, "atol": 1e-3}
    torch.testing.assert_close(largest.eigenvalues.double() / scale, spectrum[:2].double(), **close)
    torch.testing.assert_close(
        smallest.eigenvalues.double() / scale, spectrum[-2:].double(), **close
    )


def test_options_of_the_edges_reach_the_solver():
    decaying = 0.9 ** torch.arange(200).double()
    operator = DenseOperator(symmetric(torch.cat([decaying, -decaying])))
    costs = []
    for tol in (1e-1, 1e-3, 1e-5):
        before = operator.stats.products
        spectrum_edges(operator, 3, tol=tol)
        costs.append(operator.stats.products - before)
    assert costs[0] < costs[1] < costs[2]
    default, first, other = (
        spectrum_edges(operator, 3, **options)[1].vectors
        for options in ({}, {"tol": 1e-3, "seed": 0}, {"seed": 1})
    )
    assert torch.equal(default, first)
    assert not torch.equal(default, other)
    for k in (0, 401, 1.5):
        with pytest.raises(ArgumentError, match=f"^k is {k}, but must be an integer from 1 to 400"):
            spectrum_edges(operator, k)


class Diagonal(DenseOperator):
    """A large diagonal matrix, by its entries."""

    def matmat(self, vectors: Tensor) -> Tensor:
        return vectors * self.entries


def test_a_crowded_lower_edge_is_found_beside_large_outliers():
    """The shape of a trained network's spectrum, on which a solve for so few pairs gives up."""
    bulk = 0.05 * torch.sin(torch.linspace(-math.pi / 2, math.pi / 2, 1500).double())
    operator = Diagonal(torch.cat([values_of(1.0, 0.8, 0.5), bulk]))
    with operator.frozen(), pytest.warns(ConvergenceWarning, match="max_products"):
        top_eigenpairs(lambda rows: -operator.matmat(rows), 1503, 1, dtype=torch.float64, tol=1e-4)
    for k in (1, 3):
        _, smallest = spectrum_edges(operator, k, tol=1e-4)
        torch.testing.assert_close(smallest.eigenvalues, bulk[:k].flip(0), rtol=0, atol=1e-4)
        assert (smallest.k, smallest.residuals.shape) == (k, (k,))


def test_a_lower_edge_that_is_not_reached_warns():
    spectrum = torch.cat([torch.linspace(-1, 1, 3000).double(), values_of(9, 8, 7)])
    operator = Diagonal(spectrum)
    with pytest.warns(ConvergenceWarning, match=r"^The lower edge: the relative res.*tol=1e-09"):
        _, smallest = spectrum_edges(operator, 3, tol=1e-9)
    differences = smallest.vectors * (spectrum - smallest.eigenvalues[:, None])
    true = differences.norm(dim=1)
    assert true.max() > 9e-9
    torch.testing.assert_close(smallest.residuals, true, rtol=1e-3, atol=1e-12)


def test_edges_below_the_accuracy_of_the_products_warn():
    class Rough(DenseOperator):
        @property
        def accuracy(self) -> float:
            return 1e-2

    operator = Rough(symmetric(torch.linspace(-1, 1, 40)))
    with pytest.warns(ConvergenceWarning, match=r"tol=0\.001 is below the floor 1\.0e-02"):
        spectrum_edges(operator, 2)

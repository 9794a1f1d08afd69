"""Spectra against ``eigvalsh`` in float64, and random matrices against their limits."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import ArgumentError, ConvergenceWarning, NonFiniteError
from subspace_optim.curvature import OperatorStats
from subspace_optim.diagnostics import (
    OutlierCount,
    SpectralDensity,
    count_outliers,
    exact_spectrum,
    marchenko_pastur_atom,
    marchenko_pastur_density,
    marchenko_pastur_edges,
    outlier_threshold,
    spectral_density,
    spectrum_edges,
    spiked_eigenvalue,
    trace,
    trivial_eigenvalues,
)
from subspace_optim.linalg import top_eigenpairs
from subspace_optim.linalg.spectral_density import hutch_plus_plus, lanczos_quadrature
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


# --- trivial eigenvalues --------------------------------------------------------------------------


@settings(max_examples=8)
@given(problem=problems())
def test_a_gauss_newton_matrix_has_its_trivial_eigenvalues(problem):
    operator = of(problem, so.GaussNewtonOperator)
    P, N = operator.size, sum(len(y) for _, y in problem.batches)
    values = exact_spectrum(operator)
    zeros = int((values.abs() <= 1e-12 * values.abs().max()).sum())
    assert zeros >= trivial_eigenvalues(P, N, 2)


def test_least_squares_in_general_position_has_no_more_trivial_eigenvalues_than_that():
    """3 examples of 2 outputs in 4 + 4 dimensions."""
    model = nn.Linear(4, 2, bias=False).double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    operator = so.GaussNewtonOperator(model, nn.MSELoss(), (x, torch.zeros(3, 2).double()))
    values = exact_spectrum(operator)
    assert int((values.abs() <= 1e-12).sum()) == trivial_eigenvalues(8, 3, 2) == 2


def test_the_number_of_trivial_eigenvalues():
    assert trivial_eigenvalues(5510, 100, 50) == 510
    assert trivial_eigenvalues(5510, 1000, 50) == 0
    assert trivial_eigenvalues(10, 1, 1) == 9
    for name in ("num_parameters", "num_examples", "num_outputs"):
        arguments = {"num_parameters": 9, "num_examples": 2, "num_outputs": 2} | {name: 0}
        with pytest.raises(
            ArgumentError, match=f"^{name} is 0, but must be an integer of at least"
        ):
            trivial_eigenvalues(**arguments)


# --- outliers -------------------------------------------------------------------------------------

METHODS = ["gap", "ratio", "elbow"]
methods = pytest.mark.parametrize("method", METHODS)


@methods
@scales
@given(
    outliers=st.lists(st.floats(5.0, 6.0), min_size=1, max_size=12),
    bulk=st.lists(st.floats(0.5, 0.6), min_size=30, max_size=60),
    seed=st.integers(0, 99),
)
def test_outliers_that_all_methods_see(method, scale, outliers, bulk, seed):
    """A bulk within a tenth, and outliers ten times as large: in any order, at any scale."""
    spectrum = values_of(*outliers, *bulk)
    order = torch.randperm(len(spectrum), generator=torch.Generator().manual_seed(seed))
    found = count_outliers(scale * spectrum[order], method)
    assert found.count == len(outliers)
    assert 0.6 * scale < found.cutoff < 5 * scale


@methods
@given(spectrum=spectra(30))
def test_outliers_are_the_eigenvalues_above_the_cutoff(method, spectrum):
    found = count_outliers(spectrum, method)
    assert found.count == int((spectrum > found.cutoff).sum())
    assert found.count < max(2, len(spectrum))
    positive = int((spectrum > 0).sum())
    assert found.count <= positive
    if not found.count:
        assert found.cutoff == float(spectrum.max())


def test_the_methods_are_three():
    """Largest gap after 20, largest ratio after 0.01, elbow where the scree plot bends."""
    spectrum = values_of(20, 9, 8, 7, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0.01, 1e-5, 9e-6, 8e-6)
    for method, count, cutoff in (
        ("gap", 1, (20 + 9) / 2),
        ("ratio", 11, math.sqrt(0.01 * 1e-5)),
        ("elbow", 4, (7 + 0.9) / 2),
    ):
        found = count_outliers(spectrum, method, floor=1e-9)
        assert (found.count, found.cutoff) == (count, pytest.approx(cutoff))
    assert count_outliers(spectrum) == count_outliers(spectrum, "gap")


def test_the_elbow_is_the_point_farthest_from_the_chord():
    """By the perpendicular distance in the unit square, to which the vertical one is in scale.

    15 of 40 are above a tenth of the largest, so that the plot has 31 points.
    """
    spectrum = torch.exp(-torch.linspace(0, 6, 40).double())
    assert int((spectrum > 0.1).sum()) == 15
    plot = spectrum[:31]
    x = torch.linspace(0, 1, 31).double()
    y = (plot - plot[-1]) / (plot[0] - plot[-1])
    distance = (1 - x - y) / math.sqrt(2)  # from the chord from (0, 1) to (1, 0)
    found = count_outliers(spectrum, "elbow")
    assert found.count == int(distance.argmax())
    assert count_outliers(plot, "elbow") == found
    more = torch.cat([spectrum, torch.linspace(spectrum[-1], -1e-3, 1000)])
    assert count_outliers(more, "elbow") == found
    assert count_outliers(spectrum[:12], "elbow").count < found.count  # not enough of the bulk


@methods
@pytest.mark.parametrize(
    "spectrum",
    [
        [3.0],
        [0.0],
        [-2.0],
        [2.0, 2.0, 2.0],
        [0.0, 0.0],
        [-1.0, -5.0, -5.0, -7.0],
        [1.0, 1.0 - 1e-9],
    ],
    ids=str,
)
def test_without_outliers_the_count_is_0(method, spectrum):
    assert count_outliers(values_of(*spectrum), method) == OutlierCount(0, max(spectrum))


def test_a_scree_plot_without_a_bend_downward_has_no_elbow():
    for spectrum in (torch.linspace(5, 1, 30), torch.tensor([9.0, 8.9, 8.7, 8.0, 5.0, 1.0])):
        assert count_outliers(spectrum, "elbow").count == 0
    assert count_outliers(torch.tensor([9.0, 8.9, 8.7, 8.0, 5.0, 1.0]), "gap").count == 5


@methods
def test_what_may_be_rounding_is_bulk(method):
    """Zeros that products left, some in float32 and some exact, have large ratios."""
    spectrum = values_of(5, 4, 3, 1e-7, 9e-8, 1e-16, 0, 0, -3e-16, -1e-7, -2)
    assert count_outliers(spectrum, method).count == 3
    assert count_outliers(spectrum, method, floor=1e-20).count == (5 if method == "ratio" else 3)


@methods
def test_float32_eigenvalues_count_too(method):
    found = count_outliers(torch.tensor([5.0, 4.0, 0.2, 0.1, 0.1]), method)
    assert found.count == 2
    assert isinstance(found.cutoff, float)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(0),), r"^the shape of eigenvalues is \(0,\), but must be \(n,\)"),
        ((torch.zeros(2, 2),), r"^the shape of eigenvalues is \(2, 2\)"),
        ((torch.tensor([1.0, torch.nan]),), r"^eigenvalues is \[1\.0, nan\], but must be finite"),
        ((torch.ones(3), "kink"), r"^method is 'kink', but must be 'gap', 'ratio' or 'elbow'"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        count_outliers(*arguments)


def test_a_floor_that_is_none_is_refused():
    with pytest.raises(ArgumentError, match=r"^floor is 0\.0, but must be a finite number abo"):
        count_outliers(torch.ones(3), floor=0.0)


@pytest.mark.parametrize("clusters", [2, 5, 10])
@methods
def test_clusters_of_gradients_make_as_many_outliers(method, clusters):
    """The paper's reason for outliers: gradients are those of a class, and noise around them."""
    P, N = 300, 600
    generator = torch.Generator().manual_seed(clusters)
    means = torch.linalg.qr(torch.randn(P, clusters, dtype=torch.float64, generator=generator)).Q
    noise = torch.randn(P, N, dtype=torch.float64, generator=generator) / math.sqrt(P)
    gradients = 8 * means[:, torch.arange(N) % clusters] + noise
    spectrum = torch.linalg.eigvalsh(gradients @ gradients.T / N)
    assert count_outliers(spectrum, method).count == clusters


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_network_that_has_learned_clusters_has_about_as_many_outliers(classes):
    """The setting of the paper in small: Gaussian blobs, two hidden layers of ReLU, softmax."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, 20, generator=generator)
    y = torch.arange(40 * classes) % classes
    x = centres[y] + 0.3 * torch.randn(len(y), 20, generator=generator)
    x = (x - x.mean()) / x.std()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, classes))
        )
    loss_fn = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    spectrum = exact_spectrum(so.HessianOperator(model, loss_fn, (x, y), verify=False))
    assert abs(count_outliers(spectrum, "elbow").count - classes) <= 1


# --- Marchenko and Pastur -------------------------------------------------------------------------

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

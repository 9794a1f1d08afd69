"""Densities and traces against dense matrices, closed forms, and their own error bars.

What a probe should see is known without any Lanczos: the weight of an eigenvalue in it is the
squared coefficient of its start vector, which is the argument of its first product.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_optim._validation import ArgumentError, NonFiniteError
from subspace_optim.linalg.spectral_density import SpectralDensity, lanczos_quadrature
from subspace_optim.linalg.trace import Estimate, hutch_plus_plus
from tests.dense import DTYPES, spectra, symmetric
from tests.linalg.test_lanczos import _Watch

ROUNDING = {torch.float32: 2e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def uniform(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


@dataclass
class Matrix:
    """A symmetric matrix, or the diagonal of one, that keeps a copy of all that it multiplied."""

    entries: Tensor
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, v: Tensor) -> Tensor:
        self.seen += v.clone().view(-1, v.shape[-1])
        entries = self.entries.to(v)
        return v * entries if entries.dim() == 1 else v @ entries

    def __len__(self) -> int:
        return len(self.entries)

    def eigh(self) -> tuple[Tensor, Tensor]:
        exact = self.entries.double()
        if exact.dim() == 1:
            return exact, torch.eye(len(exact), dtype=torch.float64)
        return torch.linalg.eigh(exact)

    def quadrature(self, **options: Any) -> SpectralDensity:
        return lanczos_quadrature(self, len(self), **options)

    def trace(self, products: int, **options: Any) -> Estimate:
        return hutch_plus_plus(self, len(self), products, **options)


def seen_by_probes(
    matrix: Matrix, found: SpectralDensity, f: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the probes of ``qᵀ f(H) q``, by the eigenvectors of ``H``."""
    values, vectors = matrix.eigh()
    probes, steps = found.nodes.shape
    starts = torch.stack(matrix.seen[:: found.products // probes]).double()
    assert len(matrix.seen) == found.products == probes * steps
    assert len(starts) == probes
    samples = (starts @ vectors).square() @ f(values)
    centred = samples - samples.mean(dim=0)
    variance = centred.square().sum(dim=0) / (probes - 1)
    return samples.mean(dim=0), (variance / probes).sqrt()


def gaussian(grid: Tensor, width: float) -> Callable[[Tensor], Tensor]:
    def f(values: Tensor) -> Tensor:
        z = (grid - values[:, None]) / width
        return torch.exp(-(z**2) / 2) / (width * math.sqrt(2 * math.pi))

    return f


def assert_calibrated(
    estimates: list[tuple[float, float]], truth: float, *, covered: float = 0.87
) -> None:
    """Unbiased; the errors scatter as the standard errors say; and two of these cover most.

    For normal samples 95 %, fewer where there are few of them, and fewer still for skewed ones.
    """
    values, errors = torch.tensor(estimates, dtype=torch.float64).T
    scatter = values.std()
    assert abs(values.mean() - truth) <= 4 * scatter / math.sqrt(len(values))
    assert 0.85 <= errors.square().mean().sqrt() / scatter <= 1.15
    assert covered <= ((values - truth).abs() <= 2 * errors).double().mean() <= 0.98


# --- the quadrature, probe by probe ---------------------------------------------------------------


@settings(max_examples=50)
@given(spectrum=spectra(12), seed=st.integers(0, 99), dtype=st.sampled_from(list(DTYPES.values())))
def test_with_steps_enough_the_density_is_that_of_the_start_vectors(spectrum, seed, dtype):
    matrix = Matrix(symmetric(spectrum, seed).to(dtype))
    found = matrix.quadrature(probes=3, steps=2 * len(spectrum) + 3, dtype=dtype, seed=seed)
    scale = max(float(spectrum.abs().max()), 1e-30)
    width, grid = 0.1 * scale, uniform(-1.3 * scale, 1.3 * scale, 60)
    mean, error = found.density(grid, width)
    expected, expected_error = seen_by_probes(matrix, found, gaussian(grid, width))
    assert (mean.dtype, mean.shape, error.shape) == (torch.float64, (60,), (60,))
    tolerance = {"rtol": 0, "atol": 100 * ROUNDING[dtype] / width}
    torch.testing.assert_close(mean, expected, **tolerance)
    torch.testing.assert_close(error, expected_error, **tolerance)


@settings(max_examples=60)
@given(spectrum=spectra(30), seed=st.integers(0, 99), steps=st.integers(1, 6))
def test_moments_are_exact_up_to_degree_2m_minus_1(spectrum, seed, steps):
    matrix = Matrix(symmetric(spectrum, seed))
    found = matrix.quadrature(probes=4, steps=steps, dtype=torch.float64, seed=seed)
    scale = float(spectrum.abs().max())
    for p in range(2 * steps):
        mean, error = seen_by_probes(matrix, found, lambda values, p=p: values**p)
        estimate = found.moment(p)
        assert estimate.products == 4 * steps
        close = {"rel": 1e-10, "abs": 1e-10 * scale**p}
        assert estimate.value == pytest.approx(float(mean), **close)
        assert estimate.standard_error == pytest.approx(float(error), **close)
    with pytest.raises(ArgumentError, match=f"^p is {2 * steps}, but must be an integer from 0 to"):
        found.moment(2 * steps)
    with pytest.raises(ArgumentError, match=r"^p is -1"):
        found.moment(-1)


@given(spectrum=spectra(30), seed=st.integers(0, 99), steps=st.integers(1, 40))
def test_weights_add_up_to_1_and_nodes_lie_within_the_spectrum(spectrum, seed, steps):
    found = Matrix(symmetric(spectrum, seed)).quadrature(
        probes=2, steps=steps, dtype=torch.float64, seed=seed
    )
    assert (found.nodes.shape, found.weights.shape, found.size) == ((2, steps),) * 2 + (
        len(spectrum),
    )
    assert (found.nodes.dtype, found.weights.dtype) == (torch.float64, torch.float64)
    assert (found.weights >= 0).all()
    torch.testing.assert_close(found.weights.sum(dim=1), torch.ones(2).double())
    assert (found.nodes.diff(dim=1) >= 0).all()
    rounding = 1e-12 * float(spectrum.abs().max())
    assert found.nodes.min() >= spectrum.min() - rounding
    assert found.nodes.max() <= spectrum.max() + rounding


@dtypes
def test_the_loss_of_orthogonality_does_no_harm(dtype):
    """Outliers converge within a few steps, and come back as copies that share their weight."""
    spectrum = torch.cat([torch.tensor([90.0, 50.0, 20.0, -30.0]), uniform(-1, 1, 196)])
    matrix = Matrix(spectrum)
    found = matrix.quadrature(probes=3, steps=160, dtype=dtype)
    copies = ((found.nodes - 90).abs() < 1e-3).sum(dim=1)
    assert copies.min() >= 2, "no probe has lost its orthogonality"
    points = torch.tensor([-31.0, -2.0, 2.0, 30.0, 60.0, 91.0]).double()
    steps = lambda values: (values[:, None] <= points).double()  # noqa: E731
    mean, error = found.cumulative(points)
    expected, expected_error = seen_by_probes(matrix, found, steps)
    tolerance = {"rtol": 0, "atol": 10 * ROUNDING[dtype]}
    torch.testing.assert_close(mean, expected, **tolerance)
    torch.testing.assert_close(error, expected_error, **tolerance)
    for p in (1, 2, 5):
        truth, _ = seen_by_probes(matrix, found, lambda values, p=p: (values / 90) ** p)
        value = found.moment(p).value / 90**p
        assert value == pytest.approx(float(truth), abs=10 * ROUNDING[dtype])
    grid = uniform(-1.5, 1.5, 50)
    expected, _ = seen_by_probes(matrix, found, gaussian(grid, 0.05))
    mean, _ = found.density(grid, 0.05)
    torch.testing.assert_close(mean, expected, rtol=0, atol=0.02 * float(expected.max()))


@dtypes
@pytest.mark.parametrize(
    "spectrum",
    [[0.0] * 30, [2.5] * 30, [-1.0, 0.0, 3.0] * 10, [7.0], [0.0], [2.0, -1.0], [1e-3, 1.0] * 15],
    ids=str,
)
def test_nodes_with_weight_are_eigenvalues_once_a_krylov_space_is_complete(spectrum, dtype):
    truth = torch.tensor(spectrum, dtype=torch.float64)
    matrix = Matrix(symmetric(truth).to(dtype) if len(set(spectrum)) > 1 else truth)
    found = matrix.quadrature(probes=3, steps=40, dtype=dtype)
    scale = float(truth.abs().max()) or 1.0
    distance = (found.nodes[..., None] - truth).abs().amin(dim=2)
    # What follows from rounding alone has at most the weight of rounding.
    assert (distance[found.weights > 1e-9] <= ROUNDING[dtype] * scale).all()
    assert (found.weights * distance).sum() <= ROUNDING[dtype] * scale
    for value in set(spectrum):
        mean, _ = found.cumulative(torch.tensor([value + 1e-4, value - 1e-4]).double())
        expected, _ = seen_by_probes(
            matrix, found, lambda v, x=value: ((v - x).abs() < 1e-5).double()
        )
        assert float(mean[0] - mean[1]) == pytest.approx(float(expected), abs=1e-4)


@dtypes
def test_a_complete_space_is_cut_off(dtype):
    """Three eigenvalues, exact in binary: three nodes, and copies of the last without weight."""
    found = Matrix(torch.tensor([-1.0, 0.0, 4.0] * 8)).quadrature(probes=4, steps=50, dtype=dtype)
    zero = Matrix(torch.zeros(9)).quadrature(probes=2, steps=5, dtype=dtype)
    assert (zero.nodes == 0).all()
    assert (zero.weights == torch.tensor([1.0, 0, 0, 0, 0])).all()
    alone = Matrix(torch.tensor([2.0])).quadrature(probes=2, steps=5, dtype=dtype)
    assert (alone.nodes == 2).all()
    assert (found.weights.sum(dim=1) - 1).abs().max() < 1e-12
    assert (found.nodes.diff(dim=1) >= 0).all()


# --- the density as a whole -----------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 0.05, 3.0])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_density_integrates_to_1(scale, width):
    spectrum = torch.cat([torch.tensor([9.0, 6.0, -4.0]), uniform(-1, 1, 200)])
    found = Matrix(scale * spectrum).quadrature(probes=4, steps=30)
    width = found.width if width is None else width * scale
    grid = uniform(-5 * scale - 8 * width, 10 * scale + 8 * width, 20000)
    mean, error = found.density(grid, width)
    assert float(torch.trapezoid(mean, grid)) == pytest.approx(1, abs=1e-6)
    assert (error >= 0).all()
    if width == found.width:
        assert torch.equal(found.density(grid)[0], mean)


def test_the_default_width_shows_no_single_nodes_and_blurs_no_more_than_that():
    """Of evenly spread eigenvalues, whose density is flat, 20 steps could show 20 peaks."""
    found = Matrix(uniform(0, 1, 4000)).quadrature(probes=10, steps=20)
    grid = uniform(0.15, 0.85, 200)
    flat = (found.density(grid)[0] - 1).abs().max()
    peaks = (found.density(grid, found.width / 4)[0] - 1).abs().max()
    assert flat < 0.1
    assert peaks > 0.3
    assert 0.5 / 20 <= found.width <= 1.0 / 20


def test_the_default_width_is_that_of_the_bulk_down_to_what_can_be_seen():
    def width(*outliers: float, bulk: float) -> float:
        spectrum = torch.cat([torch.tensor(outliers).double(), uniform(-bulk, bulk, 2000)])
        return Matrix(spectrum).quadrature(probes=4, steps=30).width

    without, beside = width(bulk=1.0), width(30.0, 20.0, bulk=1.0)
    assert without <= beside <= 1.6 * without  # the outliers took some of the steps
    # By hand: half of the weight is on nodes at most 1 apart, where those at the end count half.
    nodes, weights = torch.tensor([0.0, 1, 2, 3, 100]), torch.tensor([0.2, 0.2, 0.2, 0.1, 0.3])
    assert SpectralDensity(nodes.expand(2, 5), weights.expand(2, 5), 9, 10).width == 0.5
    assert width(30.0, 20.0, bulk=1e-4) == pytest.approx(1e-3 * 30, rel=1e-5)
    assert Matrix(torch.full((9,), 5.0)).quadrature().width == pytest.approx(5e-3)
    assert Matrix(torch.zeros(9)).quadrature().width == 1.0


MOMENTS = Matrix(symmetric(torch.cat([torch.tensor([9.0, 6.0, -3.0]), uniform(-1, 1, 37)])))


@pytest.fixture(scope="module")
def runs() -> list[SpectralDensity]:
    """The same matrix, seen with 250 seeds."""
    entries = MOMENTS.entries
    options: dict[str, Any] = {"probes": 12, "steps": 6, "dtype": torch.float64}
    return [lanczos_quadrature(entries.mv, len(entries), seed=s, **options) for s in range(250)]


def test_error_bars_are_calibrated(runs):
    """Of moments, density and cumulative."""
    truth = MOMENTS.eigh()[0]
    grid, points = torch.tensor([-0.5, 0.3]).double(), torch.tensor([-2.0, 7.0]).double()
    for p in (1, 2, 3):
        moments = [run.moment(p) for run in runs]
        estimates = [(moment.value, moment.standard_error) for moment in moments]
        assert_calibrated(estimates, float((truth**p).mean()))
    smooth = gaussian(grid, 1.0)(truth).mean(dim=0)
    below = (truth[:, None] <= points).double().mean(dim=0)
    densities = [run.density(grid, 1.0) for run in runs]
    shares = [run.cumulative(points) for run in runs]  # of one eigenvalue: a χ² of one
    for i in range(2):
        assert_calibrated([(float(m[i]), float(e[i])) for m, e in densities], float(smooth[i]))
        pairs = [(float(m[i]), float(e[i])) for m, e in shares]
        assert_calibrated(pairs, float(below[i]), covered=0.75)


def test_the_standard_error_of_the_mean_is_the_closed_one(runs):
    """For q uniform on the sphere, ``Var qᵀHq = 2/(P(P + 2)) (tr H² − (tr H)²/P)``."""
    values = MOMENTS.eigh()[0]
    P = len(values)
    variance = 2 / (P * (P + 2)) * (values.square().sum() - values.sum() ** 2 / P)
    mean_square = torch.tensor([run.moment(1).standard_error for run in runs]).square().mean()
    assert float(mean_square) == pytest.approx(float(variance) / 12, rel=0.1)


def test_more_probes_and_more_steps_do_what_they_are_for():
    matrix = Matrix(torch.cat([torch.tensor([3.0]), uniform(-1, 1, 600)]))
    errors = [matrix.quadrature(probes=n, steps=3).moment(2).standard_error for n in (4, 64)]
    assert 2 <= errors[0] / errors[1] <= 8  # 4, but for what errors of errors are
    widths = [matrix.quadrature(probes=2, steps=m).width for m in (10, 40)]
    assert 3 <= widths[0] / widths[1] <= 5


# --- what every argument and product may be -------------------------------------------------------


@dtypes
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_neither_huge_nor_tiny_eigenvalues_lose_anything(scale, dtype):
    entries = symmetric(torch.cat([torch.tensor([1.0, 0.6]), uniform(-0.1, 0.1, 48)]))
    options = {"probes": 3, "steps": 20, "dtype": dtype}
    found = Matrix(scale * entries).quadrature(**options)
    expected = Matrix(entries).quadrature(**options)
    for p in (1, 2, 3):
        reference = expected.moment(p)
        assert found.moment(p).value / scale**p == pytest.approx(reference.value, rel=1e-4)
    grid = uniform(-0.2, 1.1, 40)
    for at_scale, plain in zip(
        found.density(scale * grid, 0.05 * scale), expected.density(grid, 0.05), strict=True
    ):
        torch.testing.assert_close(at_scale * scale, plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", [0, 7])
def test_a_product_that_is_not_finite_is_an_error(bad, call):
    calls = iter(range(100))

    def matvec(v: Tensor) -> Tensor:
        product = v.clone()
        if next(calls) == call:
            product[3] = bad
        return product

    with pytest.raises(NonFiniteError, match="not finite"):
        lanczos_quadrature(matvec, 20, probes=2, steps=5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("probes", 1), ("probes", 2.5), ("steps", 0), ("steps", True), ("size", 0), ("size", None)],
)
def test_counts_that_cannot_be_are_refused_before_any_product(name, value):
    matrix = Matrix(torch.ones(20))
    options: dict[str, Any] = {"size": 20, "probes": 2, "steps": 5} | {name: value}
    with pytest.raises(ArgumentError, match=f"^{name} is {value!r}, but must be an integer of at"):
        lanczos_quadrature(matrix, options.pop("size"), **options)
    assert not matrix.seen


def test_a_density_of_shapes_that_do_not_belong_together_is_refused():
    nodes = torch.zeros(2, 3)
    for wrong in (torch.zeros(3), torch.zeros(1, 3), torch.zeros(2, 0)):
        with pytest.raises(ArgumentError, match=r"^the shape of nodes is \("):
            SpectralDensity(wrong, wrong, 5, 6)
    with pytest.raises(ArgumentError, match=r"^the shape of weights is \(2, 4\)"):
        SpectralDensity(nodes, torch.zeros(2, 4), 5, 6)
    density = SpectralDensity(nodes, torch.full((2, 3), 1 / 3), 5, 6)
    for width in (0.0, -1.0, torch.nan):
        with pytest.raises(ArgumentError, match=r"^width is"):
            density.density(torch.zeros(4), width)
    with pytest.raises(ArgumentError, match=r"^the shape of the points is \(\)"):
        density.cumulative(torch.tensor(1.0))


def test_the_seed_alone_decides_the_random_vectors():
    matrix = Matrix(uniform(0, 1, 50))
    state = torch.get_rng_state()
    first = matrix.quadrature(probes=3, steps=5)
    trace = matrix.trace(12)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = (
        matrix.quadrature(probes=3, steps=5),
        matrix.quadrature(probes=3, steps=5, seed=1),
    )
    assert torch.equal(again.nodes, first.nodes)
    assert not torch.isclose(other.nodes, first.nodes).any()
    assert not torch.isclose(first.nodes[0], first.nodes[1]).any()
    # A diagonal of signs is seen exactly: zᵀDz = tr D. Another matrix is needed to see the seed.
    dense = Matrix(symmetric(uniform(0, 1, 50)))
    assert matrix.trace(12) == trace
    assert dense.trace(12) == dense.trace(12) != dense.trace(12, seed=1)


@dtypes
@pytest.mark.parametrize(
    ("matvec", "plain"),
    [
        pytest.param(lambda v: v, lambda v: v.clone(), id="its_argument"),
        pytest.param(lambda v: v.view(2, -1).view(v.shape), lambda v: v.clone(), id="a_view_of_it"),
        pytest.param(
            lambda v: torch.stack([v * 2, v], dim=-1)[..., 0], lambda v: v * 2, id="strided"
        ),
        pytest.param(
            lambda v: v.sum(dim=-1, keepdim=True).expand(v.shape),
            lambda v: v.sum(dim=-1, keepdim=True).repeat(*[1] * (v.dim() - 1), v.shape[-1]),
            id="expanded",
        ),
    ],
)
def test_what_the_product_shares_its_memory_with_makes_no_difference(matvec, plain, dtype):
    found, expected = (
        lanczos_quadrature(f, 30, probes=2, steps=4, dtype=dtype) for f in (matvec, plain)
    )
    assert torch.equal(found.nodes, expected.nodes)
    assert torch.equal(found.weights, expected.weights)
    for products in (12, 30):
        value, reference = (hutch_plus_plus(f, 30, products, dtype=dtype) for f in (matvec, plain))
        assert value == reference


def test_the_dtype_is_that_of_the_vectors():
    for dtype in DTYPES.values():
        matrix = Matrix(symmetric(uniform(0, 1, 40)).to(dtype))
        matrix.quadrature(probes=2, steps=3, dtype=dtype)
        matrix.trace(10, dtype=dtype)
        matrix.trace(40, dtype=dtype)
        assert {v.dtype for v in matrix.seen} == {dtype}


# --- what it costs --------------------------------------------------------------------------------


def test_the_memory_of_the_quadrature_is_a_few_vectors_however_many_steps():
    diagonal = torch.linspace(-1, 1, 1 << 16)
    peaks = []
    for steps in (5, 60):
        with _Watch() as watch:
            lanczos_quadrature(lambda v: diagonal * v, len(diagonal), probes=2, steps=steps)
        peaks.append(watch.peak)
    assert max(peaks) <= 4.1 * 4 * len(diagonal)
    assert peaks[1] - peaks[0] < 4 * len(diagonal)


def test_the_host_is_visited_once_a_probe_and_never_in_a_product():
    visits = []
    for steps in (5, 60):
        matrix = Matrix(symmetric(uniform(-1, 1, 100)).float())
        with _Watch() as watch:
            matrix.quadrature(probes=2, steps=steps)
        visits.append(watch.to_host)
    assert visits[0] == visits[1]


@pytest.mark.gpu
def test_the_device_that_is_named_holds_the_vectors(device):
    entries = symmetric(uniform(-1, 1, 60))
    matrix = Matrix(entries.to(device))
    found = matrix.quadrature(probes=2, steps=10, device=device)
    assert found.nodes.device.type == found.weights.device.type == "cpu"
    assert abs(found.moment(1).value) <= 6 * found.moment(1).standard_error
    estimate = matrix.trace(30, device=device)
    assert abs(estimate.value) <= 6 * estimate.standard_error
    assert {v.device.type for v in matrix.seen} == {device.type}

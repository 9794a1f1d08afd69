"""Outliers of spectra that have them, or have not; and eigenvalues that must be 0."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import ArgumentError
from subspace_optim.diagnostics import (
    OutlierCount,
    count_outliers,
    exact_spectrum,
    trivial_eigenvalues,
)
from tests.dense import problems, spectra

scales = pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])


def values_of(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- trivial eigenvalues --------------------------------------------------------------------------


@settings(max_examples=8)
@given(problem=problems())
def test_a_gauss_newton_matrix_has_its_trivial_eigenvalues(problem):
    operator = so.GaussNewtonOperator(problem.model, problem.loss_fn, problem.batches, verify=False)
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

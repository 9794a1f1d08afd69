"""The search for the multiple of a step at which the loss rises: closed forms, and fine grids."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.diagnostics.critical_sharpness import (
    CriticalMultiple,
    critical_multiple,
)
from tests.dense import spectra, symmetric
from tests.optim.naive import DenseOperator, Quartic, flat

critical_sharpness = so.diagnostics.critical_sharpness
WIDTH = 1 / 16
Rise = Callable[[float], float]


def searched(rise: Rise, **options: object) -> CriticalMultiple:
    """Searches, and holds what is true of every search to what was asked."""
    asked: dict[float, float] = {}

    def counted(c: float) -> float:
        assert c > 0
        assert c not in asked
        asked[c] = rise(c)
        return asked[c]

    found = critical_multiple(counted, **options)  # type: ignore[arg-type]
    assert found.forwards == len(asked) <= 8
    every = {**dict(options.get("known", {})), **asked}  # type: ignore[call-overload]
    if found.lower:
        assert every[found.lower] <= 0
    if found.upper < math.inf:
        assert not every[found.upper] <= 0
    if found.multiple > 0:
        assert found.lower <= found.multiple <= found.upper
    return found


def assert_near(found: CriticalMultiple, truth: float) -> None:
    assert found.multiple == pytest.approx(truth, rel=WIDTH)
    assert found.lower * (1 - 1e-9) <= truth <= found.upper * (1 + 1e-9)
    narrow = found.upper <= found.lower * (1 + WIDTH) * (1 + 1e-9)
    assert narrow or found.forwards == 8


# Quadratics, where it is known.

decades = st.floats(-3, 3).map(lambda x: 10.0**x)


@given(spectra(), st.integers(0, 2**16), decades, decades, st.booleans(), st.booleans())
def test_on_quadratics_it_is_the_closed_form(
    spectrum: Tensor, seed: int, scale: float, guess: float, slope_known: bool, one_known: bool
) -> None:
    """For any matrix, definite or not, any gradient, and any direction downhill: -2 g'u / u'Hu."""
    H = symmetric(spectrum, seed)
    random = torch.Generator().manual_seed(seed)
    g, u = torch.randn(2, len(spectrum), generator=random, dtype=torch.float64)
    u *= -torch.sign(g @ u)
    slope, curvature = float(g @ u), float(u @ H @ u)
    if curvature:  # the length that puts the crossing where the guess is, up to `scale`
        u *= abs(2 * slope / curvature) * scale / guess
        slope, curvature = float(g @ u), float(u @ H @ u)

    def rise(c: float) -> float:
        return c * slope + c * c * curvature / 2

    options: dict[str, object] = {"slope": slope} if slope_known else {}
    if one_known:
        options["known"] = {1.0: rise(1.0)}
    found = searched(rise, guess=guess, **options)
    if curvature <= 0:
        assert math.isnan(found.multiple)
        return
    truth = -2 * slope / curvature
    if guess / 1024 <= truth <= guess * 1024:
        assert_near(found, truth)
        assert found.multiple == pytest.approx(truth, rel=1e-6)  # the last line is the quadratic's


@given(st.floats(0.5, 2), decades)
def test_with_all_that_is_known_three_passes_are_enough(factor: float, scale: float) -> None:
    def rise(c: float) -> float:
        return scale * (c * c - 2 * c)

    found = searched(rise, slope=-2 * scale, known={1.0: -scale}, guess=2 * factor)
    assert_near(found, 2.0)
    assert found.forwards <= 3


@given(st.floats(0.25, 4))
def test_without_anything_known_five_passes_are_enough_near_the_guess(truth: float) -> None:
    found = searched(lambda c: c * (c - truth))
    assert_near(found, truth)
    assert found.forwards <= 5


# Other functions: the first crossing of a fine grid.


def first_crossing(rise: Rise, reach: float) -> float:
    """The first point of a grid of 1e-4, relative, at which the rise is above 0."""
    c = 1e-3
    while rise(c) <= 0:
        c *= 1 + 1e-4
        assert c < reach
    return c


FUNCTIONS: dict[str, Rise] = {
    "quartic": lambda c: c**4 - 2 * c,
    "cubic, concave first": lambda c: c**3 / 4 - c**2 - c,
    "exponential": lambda c: math.expm1(c) - 3 * c,
    "valley of straight walls": lambda c: abs(c - 1) - 1,
    "a kink and a wall": lambda c: -c if c < 3 else 40 * (c - 3.075),
    "hyperbola": lambda c: math.sqrt(1 + 25 * (c - 0.4) ** 2) - math.sqrt(5),
    "saturating": lambda c: 1 - math.exp(-((c - 1) ** 2)) - (1 - math.exp(-1)),
    "overflows": lambda c: c * c - 3 * c if c < 3.5 else math.inf,
    "not a number": lambda c: c * c - 3 * c if c < 3.5 else math.nan,
    "ends at a cliff": lambda c: -c if c < 1.7 else math.inf,
}


@pytest.mark.parametrize("guess", [0.3, 1.0, 2.8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_on_other_functions_it_is_the_first_crossing_of_a_fine_grid(
    name: str, guess: float
) -> None:
    rise = FUNCTIONS[name]
    assert_near(searched(rise, guess=guess), first_crossing(rise, 100))


def test_a_bracket_that_stays_wide_is_true_all_the_same() -> None:
    """Of what explodes beyond the crossing eight passes do not make a narrow bracket."""

    def rise(c: float) -> float:
        return math.expm1(20 * c) - 400 * c

    truth = first_crossing(rise, 10)
    found = searched(rise, guess=20.0)
    assert found.lower <= truth <= found.upper
    assert found.upper < 20


@pytest.mark.parametrize("sizes", [(3, 4, 2), (784, 50, 10)])
def test_of_a_network_it_is_the_crossing_of_a_fine_grid(sizes: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    inputs, hidden, classes = sizes
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    x, y = torch.randn(60, inputs), torch.randint(classes, (60,))
    hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), (x, y), verify=False)
    theta = hessian.parameters.flatten(hessian.parameters.tensors)
    lr = 0.5
    oracle, start = copy.deepcopy(model).double(), theta.double()

    def loss(position: Tensor) -> float:
        nn.utils.vector_to_parameters(position, oracle.parameters())
        with torch.no_grad():
            return float(nn.functional.cross_entropy(oracle(x.double()), y))

    gradient = hessian.gradient()
    for u in (-lr * gradient, -lr * gradient.sign()):
        c, zero = 0.02, loss(start)
        while loss(start + c * u.double()) <= zero:  # a grid of 1 %
            c *= 1.01
            assert c < 1e4
        assert critical_sharpness(hessian, u, lr) == pytest.approx(2 / (c * lr), rel=WIDTH + 0.01)
    assert torch.equal(hessian.parameters.flatten(hessian.parameters.tensors), theta)


# Where there is no crossing, or none to be seen.


@pytest.mark.parametrize("slope", [None, 1.0])
def test_uphill_from_the_beginning_it_is_zero(slope: float | None) -> None:
    found = searched(lambda c: c + c * c, slope=slope)
    assert found.multiple == 0
    assert slope is None or found.forwards == 0


def test_where_the_slope_is_zero_nothing_is_asked() -> None:
    found = searched(lambda c: c * c, slope=0.0)
    assert math.isnan(found.multiple)
    assert found.forwards == 0


@pytest.mark.parametrize(
    "rise",
    [lambda c: -c, lambda c: -c - c * c, lambda c: 0.0, lambda c: math.inf, lambda c: math.nan],
    ids=["line", "concave", "nothing moves", "infinite everywhere", "NaN everywhere"],
)
def test_without_a_crossing_within_reach_it_is_nan(rise: Rise) -> None:
    assert math.isnan(searched(rise).multiple)


@given(st.integers(0, 2**16), st.sampled_from([-1.0, 1.0]), st.floats(0, 0.2))
def test_rounding_makes_no_crossing(seed: int, direction: float, size: float) -> None:
    """Rises within the noise, whatever their signs, tell nothing; uphill is not downhill."""
    random = torch.Generator().manual_seed(seed)

    def rise(c: float) -> float:
        noise = float(torch.rand((), generator=random)) - 0.5
        return direction * size * min(c, 1.0) + noise

    found = searched(rise, noise=1.0)
    assert math.isnan(found.multiple)


@pytest.mark.parametrize("length", [-1e-10, 0.0, 1e-10])
def test_a_float32_step_of_nothing_but_rounding_tells_nothing(length: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    hessian = so.HessianOperator(model, nn.CrossEntropyLoss(), (x, y), verify=False)
    assert math.isnan(critical_sharpness(hessian, length * hessian.gradient(), 1e-10))


# The function of an operator.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@example(seed=0)
@given(seed=st.integers(0, 2**16))
def test_along_the_gradient_of_a_quadratic_it_is_the_curvature(
    dtype: torch.dtype, seed: int
) -> None:
    model = Quartic(dtype=dtype, seed=seed)
    model.c.zero_()
    model.A = model.A @ model.A  # no direction of negative curvature
    operator = DenseOperator(model)
    theta = flat(model.parameters())
    g, H = model.gradient(theta), model.hessian(theta)
    found = critical_sharpness(operator, (-0.1 * g).to(dtype), 0.1)
    assert found == pytest.approx(float(g @ H @ g / (g @ g)), rel=WIDTH)
    assert torch.equal(flat(model.parameters()), theta)


def test_uphill_it_is_infinite() -> None:
    operator = DenseOperator(Quartic())
    assert critical_sharpness(operator, operator.gradient(), 0.1) == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "^lr is 0.0, but must be"),
        ({"lr": math.nan}, "^lr is nan, but must be"),
        ({"update": torch.zeros(3)}, r"^the shape of update is \(3,\), but must be \(9,\)"),
        ({"width": 0.0}, "^width is 0.0, but must be"),
        ({"forwards": 0}, "^forwards is 0, but must be"),
    ],
)
def test_a_bad_argument_is_named(options: dict[str, object], message: str) -> None:
    arguments = {"update": torch.ones(9, dtype=torch.float64), "lr": 0.1} | options
    with pytest.raises(so.ArgumentError, match=message):
        critical_sharpness(DenseOperator(Quartic()), **arguments)  # type: ignore[arg-type]

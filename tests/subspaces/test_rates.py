"""``Rates`` on movements whose rates are known."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_optim.subspaces.staleness import Drift, Rates

LENGTHS = st.floats(1e-3, 1.0)


def staleness(a: float, b: float, inside: float, outside: float) -> float:
    return math.hypot(a * inside, b * outside)


def learned(a: float, b: float, moves: list[tuple[float, float]], noise: float = 0.0) -> Rates:
    random, rates = np.random.default_rng(0), Rates()
    for move in moves:
        rates = rates.observe(
            Drift(*move), staleness(a, b, *move) * (1 + noise * random.standard_normal())
        )
    return rates


def test_before_any_observation_every_movement_may_be_too_much():
    assert Rates().growth(Drift(1e-9, 0.0)) == math.inf
    assert Rates(start=0.3).growth(Drift(0.0, 0.0)) == 0


@given(a=st.floats(1e-2, 1e2), b=st.floats(1e-2, 1e2), inside=LENGTHS, outside=LENGTHS)
def test_one_observation_is_repeated_and_scales_with_the_movement(a, b, inside, outside):
    rates = learned(a, b, [(inside, outside)])
    for scale in (0.5, 1.0, 3.0):
        expected = scale * staleness(a, b, inside, outside)
        assert rates.growth(Drift(scale * inside, scale * outside)) == pytest.approx(
            expected, rel=0.1
        )


@pytest.mark.parametrize(("a", "b"), [(10.0, 1.5), (12.0, 1.0), (1.0, 1.0)])
def test_both_rates_are_learned_from_movements_of_two_kinds(a, b):
    moves = [(0.01, 0.001), (0.004, 0.006), (0.012, 0.008), (0.006, 0.03), (0.006, 0.06)]
    rates = learned(a, b, moves, noise=0.05)
    for move in [(0.02, 0.0), (0.0, 0.2), (0.01, 0.1)]:
        ratio = rates.growth(Drift(*move)) / staleness(a, b, *move)
        assert 0.8 < ratio < 1.6  # on the safe side of what the noise leaves open


def test_a_kind_of_movement_that_was_not_seen_is_expected_to_age_the_basis_as_much_as_it_may():
    """All in the bulk until now, but for a hundredth of the last length."""
    rates = learned(5.0, 1.0, [(1e-6, 0.01), (1e-5, 0.1), (1e-3, 0.1)])
    assert rates.growth(Drift(0.1, 0.1)) >= staleness(5.0, 1.0, 0.1, 0.1)
    assert learned(5.0, 1.0, [(0.0, 0.1)]).growth(Drift(1e-3, 0.1)) > 1e6


def test_a_refresh_keeps_the_rates_and_begins_with_its_own_staleness():
    rates = learned(2.0, 2.0, [(0.1, 0.1), (0.2, 0.1)])
    rates = rates.refreshed(0.05)
    assert rates.start == 0.05
    assert rates.growth(Drift(0.0, 0.0)) == 0
    assert rates.growth(Drift(0.1, 0.2)) == pytest.approx(staleness(2.0, 2.0, 0.1, 0.2), rel=0.1)


def test_a_surprise_makes_what_was_learned_before_worthless():
    slow = [(0.01 * i, 0.02 * i) for i in range(1, 8)]
    rates = learned(1.0, 1.0, slow)
    fast = staleness(9.0, 9.0, 0.1, 0.1)
    rates = rates.observe(Drift(0.1, 0.1), fast)
    assert rates.growth(Drift(0.1, 0.1)) == pytest.approx(fast, rel=0.1)
    assert len(rates.observed) == 1


def test_a_slower_rates_is_taken_up_in_a_few_probes():
    rates = learned(5.0, 5.0, [(0.01 * i, 0.02 * i) for i in range(1, 9)])
    for i in range(1, 9):
        rates = rates.observe(Drift(0.01 * i, 0.02 * i), staleness(1.0, 1.0, 0.01 * i, 0.02 * i))
    assert rates.growth(Drift(0.1, 0.2)) == pytest.approx(staleness(1.0, 1.0, 0.1, 0.2), rel=0.1)


def test_a_basis_that_does_not_age_is_expected_not_to():
    rates = learned(0.0, 0.0, [(0.1, 0.2), (0.3, 0.1)])
    assert rates.growth(Drift(1e3, 1e3)) < 1e-6


def test_a_movement_to_nowhere_is_no_reason_to_trust():
    rates = learned(1.0, 1.0, [(0.1, 0.2)])
    assert not rates.growth(Drift(math.nan, math.nan)) <= 1.0
    assert not rates.growth(Drift(math.inf, 0.1)) <= 1.0


def test_its_state_is_plain_numbers():
    rates = learned(1.0, 2.0, [(0.1, 0.2), (0.2, 0.1)])
    again = Rates(**asdict(rates))
    assert again.growth(Drift(0.3, 0.4)) == rates.growth(Drift(0.3, 0.4))

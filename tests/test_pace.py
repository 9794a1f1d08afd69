"""``Pace`` on movements whose rates are known."""

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from subspace_optim.pace import Pace

LENGTHS = st.floats(1e-3, 1.0)


def ageing(a: float, b: float, inside: float, outside: float) -> float:
    return math.hypot(a * inside, b * outside)


def learned(a: float, b: float, moves: list[tuple[float, float]], noise: float = 0.0) -> Pace:
    random, pace = np.random.default_rng(0), Pace()
    for move in moves:
        pace = pace.observe(*move, ageing(a, b, *move) * (1 + noise * random.standard_normal()))
    return pace


def test_before_any_observation_every_movement_may_be_too_much():
    assert Pace().growth(1e-9, 0.0) == math.inf
    assert Pace(start=0.3).growth(0.0, 0.0) == 0


@given(a=st.floats(1e-2, 1e2), b=st.floats(1e-2, 1e2), inside=LENGTHS, outside=LENGTHS)
def test_one_observation_is_repeated_and_scales_with_the_movement(a, b, inside, outside):
    pace = learned(a, b, [(inside, outside)])
    for scale in (0.5, 1.0, 3.0):
        expected = scale * ageing(a, b, inside, outside)
        assert pace.growth(scale * inside, scale * outside) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("a", "b"), [(10.0, 1.5), (12.0, 1.0), (1.0, 1.0)])
def test_both_rates_are_learned_from_movements_of_two_kinds(a, b):
    moves = [(0.01, 0.001), (0.004, 0.006), (0.012, 0.008), (0.006, 0.03), (0.006, 0.06)]
    pace = learned(a, b, moves, noise=0.05)
    for move in [(0.02, 0.0), (0.0, 0.2), (0.01, 0.1)]:
        ratio = pace.growth(*move) / ageing(a, b, *move)
        assert 0.8 < ratio < 1.6  # on the safe side of what the noise leaves open


def test_a_kind_of_movement_that_was_not_seen_is_expected_to_age_the_basis_as_much_as_it_may():
    """All in the bulk until now, but for a hundredth of the last length."""
    pace = learned(5.0, 1.0, [(1e-6, 0.01), (1e-5, 0.1), (1e-3, 0.1)])
    assert pace.growth(0.1, 0.1) >= ageing(5.0, 1.0, 0.1, 0.1)
    assert learned(5.0, 1.0, [(0.0, 0.1)]).growth(1e-3, 0.1) > 1e6


def test_a_refresh_keeps_the_rates_and_begins_with_its_own_ageing():
    pace = learned(2.0, 2.0, [(0.1, 0.1), (0.2, 0.1)])
    pace = pace.refreshed(0.05)
    assert pace.start == 0.05
    assert pace.growth(0.0, 0.0) == 0
    assert pace.growth(0.1, 0.2) == pytest.approx(ageing(2.0, 2.0, 0.1, 0.2), rel=0.1)


def test_a_surprise_makes_what_was_learned_before_worthless():
    slow = [(0.01 * i, 0.02 * i) for i in range(1, 8)]
    pace = learned(1.0, 1.0, slow)
    fast = ageing(9.0, 9.0, 0.1, 0.1)
    pace = pace.observe(0.1, 0.1, fast)
    assert pace.growth(0.1, 0.1) == pytest.approx(fast, rel=0.1)
    assert len(pace.observed) == 1


def test_a_slower_pace_is_taken_up_in_a_few_probes():
    pace = learned(5.0, 5.0, [(0.01 * i, 0.02 * i) for i in range(1, 9)])
    for i in range(1, 9):
        pace = pace.observe(0.01 * i, 0.02 * i, ageing(1.0, 1.0, 0.01 * i, 0.02 * i))
    assert pace.growth(0.1, 0.2) == pytest.approx(ageing(1.0, 1.0, 0.1, 0.2), rel=0.1)


def test_a_basis_that_does_not_age_is_expected_not_to():
    pace = learned(0.0, 0.0, [(0.1, 0.2), (0.3, 0.1)])
    assert pace.growth(1e3, 1e3) < 1e-6


def test_a_movement_to_nowhere_is_no_reason_to_trust():
    pace = learned(1.0, 1.0, [(0.1, 0.2)])
    assert not pace.growth(math.nan, math.nan) <= 1.0
    assert not pace.growth(math.inf, 0.1) <= 1.0


def test_its_state_is_plain_numbers():
    pace = learned(1.0, 2.0, [(0.1, 0.2), (0.2, 0.1)])
    again = Pace(**asdict(pace))
    assert again.growth(0.3, 0.4) == pace.growth(0.3, 0.4)

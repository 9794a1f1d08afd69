"""Long work says how far it is, in the log, and short work says nothing."""

import logging
from itertools import pairwise

import pytest

from subspace_optim._progress import Progress


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def lines_of(durations, caplog, level=logging.INFO):
    """The lines of work whose ticks come after these seconds, and how often it was described."""
    clock, described = Clock(), []
    with caplog.at_level(level, logger="subspace_optim"):
        progress = Progress("top 3 eigenpairs", clock)
        for count, seconds in enumerate(durations, 1):
            clock.now += seconds

            def describe(count=count):
                described.append(count)
                return f"{count} products"

            progress.tick(describe)
    return caplog.messages, described


def test_work_of_less_than_ten_seconds_is_silent(caplog):
    assert lines_of([1.0] * 9, caplog) == ([], [])


def test_the_first_line_comes_after_ten_seconds_and_says_how_far_and_how_long(caplog):
    messages, _ = lines_of([2.5] * 4, caplog)
    assert messages == ["top 3 eigenpairs: 4 products, 10 s"]


@pytest.mark.parametrize("tick", [0.01, 0.7, 3.0, 9.9])
def test_no_gap_is_longer_than_half_a_minute(caplog, tick):
    """Where ticks come at least every 10 seconds."""
    messages, described = lines_of([tick] * int(300 / tick), caplog)
    times = [0.0, *(count * tick for count in described)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(messages) == len(described) >= 10
    assert max(gaps) <= 30.0
    assert min(gaps) >= 10.0
    assert 300.0 - times[-1] <= 30.0


def test_ticks_that_are_further_apart_all_tell(caplog):
    messages, _ = lines_of([45.0] * 3, caplog)
    assert [message.split(", ")[1] for message in messages] == ["45 s", "90 s", "135 s"]


def test_nothing_is_described_where_nobody_listens(caplog):
    assert lines_of([60.0] * 3, caplog, level=logging.WARNING) == ([], [])


def test_the_package_configures_no_handler():
    assert logging.getLogger("subspace_optim").handlers == []
    assert logging.getLogger("subspace_optim").level == logging.NOTSET

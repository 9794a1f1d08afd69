"""Rows for a share of the time: on a clock that stands still but for what a test lets pass."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import subspace_optim as so
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.process_group import Ranks
from subspace_optim.diagnostics.schedules import EveryShare
from tests.processes import together

Seconds = Callable[[int], float]


class Training:
    """Steps and rows of known durations; half of a row comes before the step, half after.

    Attributes:
        rows: the steps that were recorded.
        trained: seconds without rows.
        spent: seconds of rows, as they went on.
    """

    def __init__(
        self, share: float, *, step: Seconds, row: Seconds, ranks: Ranks | None = None
    ) -> None:
        self.schedule = so.every_share(share)
        self.now = 100.0
        self.schedule._clock = lambda: self.now
        self.schedule.attach(ranks or Ranks(None), torch.device("cpu"))
        self._step, self._row = step, row
        self.rows: list[int] = []
        self.trained = self.spent = 0.0
        self.steps = 0

    def run(self, steps: int) -> Training:
        for _ in range(steps):
            number, self.steps = self.steps, self.steps + 1
            duration = self._step(number)
            self._pass(0.9 * duration)  # forward and backward come before the step begins
            recorded = self.schedule(number)
            self._record(recorded)
            self._pass(0.1 * duration)
            self._record(recorded)
            self.trained += duration
            if recorded:
                self.rows.append(number)
        return self

    def _pass(self, seconds: float) -> None:
        self.now += seconds

    def _record(self, recorded: bool) -> None:
        if recorded:
            half = self._row(len(self.rows)) / 2
            with self.schedule.spending():
                self._pass(half)
            self.spent += half

    @property
    def overhead(self) -> float:
        return self.spent / self.trained


@given(
    share=st.floats(0.01, 0.5),
    step=st.floats(1e-4, 10.0),
    cost=st.floats(0.05, 30.0),
)
def test_constant_steps_and_rows_take_their_share(share, step, cost):
    """One row more would be above the share, and the last was not; at most a row a step."""
    training = Training(share, step=lambda _: step, row=lambda _: cost * step)
    apart = cost / share  # steps from row to row, if they cost all that they may
    training.run(int(20 * apart) + 50)
    gaps = [b - a for a, b in itertools.pairwise(training.rows[3:])]
    assert training.rows[0] == 0
    assert len(gaps) >= 10
    assert max(gaps) <= max(1, apart) + 2
    assert training.overhead <= share + 1e-9
    # A row is late by the step in which it became due, and none is planned before step 5.
    late = max(cost + 3 * share, 6 * cost) / training.steps
    assert training.overhead >= min(share, cost) - late - 1e-9


def test_the_first_step_is_recorded_and_each_costs_one_look_at_the_clock():
    training = Training(0.05, step=lambda _: 1.0, row=lambda _: 10.0)
    training.run(1)
    assert training.rows == [0]
    looks = 0

    def clock() -> float:
        nonlocal looks
        looks += 1
        return training.now

    training.schedule._clock = clock
    training.run(40)
    assert training.rows == [0]
    assert looks == 40


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_the_share_is_kept_where_steps_become_slower_or_faster(factor):
    """Longer sequences, a larger batch: rows stay as long as they were."""
    training = Training(0.05, step=lambda i: 1.0 if i < 4000 else factor, row=lambda _: 5.0).run(
        12_000
    )
    assert 0.045 <= training.overhead <= 0.0505
    late = [b - a for a, b in itertools.pairwise(training.rows[-20:])]
    assert max(late) - min(late) <= 2
    assert sum(late) / len(late) == pytest.approx(100 / factor, rel=0.03)


def test_rows_that_become_dearer_come_more_rarely():
    training = Training(0.05, step=lambda _: 1.0, row=lambda i: 2.0 if i < 50 else 20.0)
    training.run(20_000)
    assert 0.04 <= training.overhead <= 0.0525
    assert training.rows[-1] - training.rows[-2] == pytest.approx(400, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_share_is_kept_by_noisy_steps_and_rows(seed):
    draw = random.Random(seed)
    training = Training(
        0.05,
        step=lambda _: draw.lognormvariate(0, 0.5),
        row=lambda _: 8 * draw.lognormvariate(0, 0.5),
    ).run(20_000)
    # Steps of a log-normal law of this width are cut off at 4 medians in 0.3 % of all cases.
    assert 0.044 <= training.overhead <= 0.0525


def test_what_the_first_row_takes_is_paid_back_and_expected_of_no_other():
    """Proofs make it thirty times as long; the second comes once it is paid back, and no later."""
    training = Training(0.05, step=lambda _: 1.0, row=lambda i: 150.0 if i == 0 else 5.0)
    training.run(20_000)
    # R / share = 3000 steps, and a quarter more, of which it is expected of the second row.
    assert training.rows[1] == pytest.approx(3000 + 750, abs=3)
    gaps = [b - a for a, b in itertools.pairwise(training.rows[2:])]
    assert max(gaps) <= 102
    assert 0.0495 <= training.overhead <= 0.0501


@pytest.mark.parametrize("at", [1, 3, 500, 1001])
def test_a_pause_allows_no_burst_of_rows(at):
    """A validation epoch, a notebook left alone: an hour between two steps of a second."""
    plain = Training(0.05, step=lambda _: 1.0, row=lambda _: 5.0).run(3000)
    paused = Training(0.05, step=lambda i: 3600.0 if i == at else 1.0, row=lambda _: 5.0)
    paused.run(3000)
    assert abs(len(paused.rows) - len(plain.rows)) <= 1
    gaps = [b - a for a, b in itertools.pairwise(paused.rows)]
    assert min(gaps) >= 90


def test_epochs_with_validation_between_them_keep_the_share_of_training():
    training = Training(0.05, step=lambda i: 300.0 if i % 200 == 199 else 1.0, row=lambda _: 5.0)
    training.run(10_000)
    of_steps = training.spent / 10_000
    assert 0.045 <= of_steps <= 0.052  # at most a pause an epoch counts as four steps


def test_a_row_that_fails_half_way_is_time_that_was_spent():
    training = Training(0.05, step=lambda _: 1.0, row=lambda _: 5.0).run(1)

    def fail() -> None:
        with training.schedule.spending():
            training.now += 50.0
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        fail()
    training.run(3000)
    assert training.rows[1] == pytest.approx((55 + 55 / 4) / 0.05, abs=3)


def test_looks_are_few():
    """Ranks meet at looks: the first five steps, and then at twice the distance each time."""
    training = Training(0.05, step=lambda _: 1.0, row=lambda _: 500.0)
    looks = 0
    missing = training.schedule._missing

    def counted() -> int:
        nonlocal looks
        looks += 1
        return missing()

    training.schedule._missing = counted
    training.run(12_000)
    assert training.rows == [0]
    assert looks == 5 + 11  # 5, 10, 20, ... 10240


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_starts_anew(copied):
    training = Training(0.05, step=lambda _: 1.0, row=lambda _: 5.0).run(150)
    twin = copied(training.schedule)
    twin.attach(Ranks(None), torch.device("cpu"))
    assert twin == training.schedule
    assert twin(150)
    assert not twin(151)


def test_schedules_of_one_share_are_equal():
    """So a monitor that is made again, as in a notebook, finds the one before it."""
    assert so.every_share(0.05) == so.every_share(0.05)
    assert hash(so.every_share(0.05)) == hash(so.every_share(0.05))
    assert so.every_share(0.05) != so.every_share(0.1)
    assert so.every_share(0.05) != 0.05
    assert repr(so.every_share(0.05)) == "every_share(0.05)"
    assert isinstance(so.every_share(0.05), EveryShare)


def work(rank: int, folder: str) -> None:
    """A rank whose clock runs at its own pace, and whose rows take their own time."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    paces = [(1.0, 5.0), (0.7, 6.0)]
    step, row = paces[rank]
    training = Training(0.05, step=lambda _: step, row=lambda _: row, ranks=Ranks(dist.group.WORLD))
    training.run(2000)
    torch.save((training.rows, training.overhead), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_of_different_clocks_agree(tmp_path):
    """The rows are those of the rank on which they are due last: 6 s of 0.7 s a step."""
    together(work, (str(tmp_path),), 2)
    (rows, least), (others, most) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert rows == others
    gaps = [b - a for a, b in itertools.pairwise(rows[2:])]
    assert sum(gaps) / len(gaps) == pytest.approx(6.0 / 0.05 / 0.7, abs=1)
    assert least < most <= 0.05


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0, 5, -0.1, float("nan"), "0.05", None, True])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ArgumentError, match="share is"):
        so.every_share(share)


def test_it_serves_one_monitor():
    schedule = so.every_share(0.05)
    schedule.attach(Ranks(None), torch.device("cpu"))
    with pytest.raises(ArgumentError, match="the schedule of another monitor"):
        schedule.attach(Ranks(None), torch.device("cpu"))

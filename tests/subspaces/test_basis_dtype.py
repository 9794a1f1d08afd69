"""``basis_dtype=torch.bfloat16``: the error it makes is in the estimate, and nothing else changes.

The truth is ``torch.linalg.eigh`` of dense Hessians in float64.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.curvature.memory import AllocationMeter
from subspace_optim.linalg.rounded import RoundedBasis
from tests.checkpoints import through_a_file
from tests.dense import symmetric
from tests.linalg.test_rounded import Peak
from tests.optim.naive import DenseOperator, Quartic, flat
from tests.subspaces.test_dominant import same
from tests.subspaces.test_on_sample import Training
from tests.subspaces.test_put_aside import Jumping
from tests.subspaces.test_refresh import Matrix, Problem, adam, bulk, jump, sgd, true_sine

BF16 = torch.bfloat16
K = 3


def quartic(seed: int = 0, dtype: torch.dtype = torch.float64) -> Quartic:
    """300 parameters, a gap below λ_3, and eigenvectors that hold many of them each."""
    model = Quartic(((120,), (12, 15)), seed=seed, dtype=dtype)
    spectrum = torch.cat([torch.linspace(-0.5, 1, 297), torch.tensor([2.0, 2.5, 3.0])])
    model.A = symmetric(spectrum, seed)
    model.c *= 0.05
    return model


def made(
    model: Quartic, *, basis_dtype: torch.dtype | None = BF16, **options: Any
) -> so.DominantSubspace:
    options = {"tol": 1e-9, "refresh": "auto"} | options
    return so.DominantSubspace(DenseOperator(model), K, basis_dtype=basis_dtype, **options)


def sine_of(model: Quartic, subspace: so.DominantSubspace) -> float:
    return true_sine(model.hessian(flat(model.parameters())), subspace.update().vectors)


# The estimate.


@pytest.mark.parametrize("seed", range(6))
def test_rounding_is_all_that_an_exact_basis_is_off_by_and_is_told(seed: int) -> None:
    model = quartic(seed)
    exact, held = made(model, basis_dtype=None), made(model)
    assert sine_of(model, exact) <= exact.stats.estimate < 1e-5
    true, stats, basis = sine_of(model, held), held.stats, held.basis
    assert 1e-3 < true <= stats.bound <= 1.001 * true
    assert true <= (1 + 1e-6) * stats.estimate <= 1.001 * true
    assert isinstance(basis, RoundedBasis)
    assert basis.rounding == pytest.approx(stats.bound, rel=1e-2)
    assert torch.equal(basis.eigenvalues, exact.basis.eigenvalues), "they were found before"


@pytest.mark.parametrize("seed", range(3))
def test_a_float32_model_holds_half(seed: int) -> None:
    model = quartic(seed, dtype=torch.float32)
    true, stats = sine_of(model, held := made(model, tol=1e-5)), held.stats
    assert (held.basis.dtype, held.basis.rows.dtype) == (torch.float32, BF16)
    assert 1e-3 < true <= stats.estimate <= 1.01 * true


@pytest.mark.slow
@pytest.mark.parametrize("max_angle", [0.05, 0.01])
def test_the_estimate_is_above_the_true_sine_along_trainings(max_angle: float) -> None:
    """As of a basis that is not rounded, and for as many products within a few per cent."""
    true, estimated, limit = [], [], []
    products = dict.fromkeys((None, BF16), 0)
    for kind in ("mlp", "cnn"):
        for make in (sgd, adam, bulk):
            for dtype in products:
                problem = Problem(kind, 0)
                subspace = so.DominantSubspace(
                    problem.hessian, 2, max_angle=max_angle, basis_dtype=dtype
                )
                optimizer = make(problem, subspace)
                for step in range(30):
                    if make is sgd:
                        jump(optimizer, step)
                    basis = subspace.update()
                    if dtype is BF16:
                        true.append(true_sine(problem.matrix(), basis.vectors))
                        estimated.append(subspace.stats.estimate)
                        limit.append(subspace.basis.rounding)
                    problem.step(optimizer)
                products[dtype] += subspace.stats.products
    true, estimated, limit = np.array(true), np.array(estimated), np.array(limit)
    assert np.mean(true <= estimated) >= 0.97
    assert np.mean(true <= max_angle) >= 0.99
    assert np.all(estimated >= limit)
    assert np.median(estimated / true) <= 5
    assert products[BF16] <= 1.05 * products[None]


def test_a_refresh_that_starts_from_rounded_vectors_is_as_good_and_as_cheap() -> None:
    found = {}
    for dtype in (None, BF16):
        model = quartic(1)
        subspace = made(model, basis_dtype=dtype, max_angle=0.02)
        for _ in range(12):
            subspace.update()
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.98)
        assert subspace.stats.refreshes > subspace.stats.cold, "there were refinements"
        assert sine_of(model, subspace) <= subspace.stats.estimate <= 0.02
        found[dtype] = subspace.stats.products
    assert found[BF16] <= 1.1 * found[None]


def test_a_rule_that_tells_no_angle_holds_it_too() -> None:
    class Told(so.EveryNSteps):
        """Tells what it is certain of."""

        def solve(self) -> None:
            super().solve()
            self.stats.bound, self.stats.estimate = 0.003, 0.004

    for rule in (1, Told(1)):
        model = quartic()
        subspace = made(model, refresh=rule)
        true, rounding = sine_of(model, subspace), subspace.basis.rounding
        assert rounding == pytest.approx(true, rel=1e-3)
        if rule == 1:
            assert subspace.stats.bound is subspace.stats.estimate is None
        else:
            assert subspace.stats.bound == pytest.approx(0.003 + rounding)
            assert subspace.stats.estimate == pytest.approx(np.hypot(0.004, rounding))


@pytest.mark.parametrize("seed", range(2))
def test_a_basis_that_is_put_aside_is_held_so_too(seed: int) -> None:
    problem = Jumping(seed, basis_dtype=BF16)
    taken = problem.follow(range(30))  # which compares estimates with the truth
    rule = problem.subspace.rule
    assert rule.holds_two
    assert sum(taken[3:]) <= 15
    for pairs in (rule.pairs, rule._aside.pairs):
        assert pairs.basis.rows.dtype == pairs.guard.rows.dtype == BF16
        assert pairs.basis.rounding > 5e-4


def test_a_basis_of_a_sample_is_held_so_too() -> None:
    training = Training(sample=1024, seed=2, basis_dtype=BF16)
    training.train(torch.optim.SGD, 0.1)
    training.step(20)
    for _ in range(3):
        training.step(5)
        true, stats = training.true_sine(), training.subspace.stats
        basis = training.subspace.basis
        assert isinstance(basis, RoundedBasis)
        assert true <= stats.estimate
        assert stats.estimate >= np.hypot(stats.sampling_error, basis.rounding)
    assert stats.examples < 4000


# What is kept, and what is made in passing.


def test_what_is_kept_is_half() -> None:
    size = 40_000
    kept = {}

    class Diagonal(Matrix):
        def __init__(self, model: nn.Module) -> None:
            DenseOperator.__init__(self, model)

        def matmat(self, vectors: Tensor) -> Tensor:
            return vectors * torch.arange(size, 0, -1).sub(size - K).clamp(min=0)

        def loss(self) -> float:
            return 0.0

    for dtype in (None, BF16):
        model = nn.ParameterList([nn.Parameter(torch.zeros(size))])
        subspace = so.DominantSubspace(Diagonal(model), K, refresh=1, basis_dtype=dtype)
        with AllocationMeter() as meter:
            subspace.update()
        kept[dtype] = meter.alive()
        file = io.BytesIO()
        torch.save(subspace.state_dict(), file)
        kept[dtype, "file"] = file.tell()
    saved = 2 * (K + 1) * size
    assert kept[None] == pytest.approx(2 * saved, rel=0.02)
    assert kept[BF16] == pytest.approx(saved, rel=0.02)
    assert kept[BF16, "file"] == pytest.approx(kept[None, "file"] / 2, rel=0.1)

    optimizer = so.BulkSGD(model.parameters(), lr=0.1, subspace=subspace)
    newton = so.LowRankNewton(model.parameters(), lr=0.1, damping=1.0, subspace=subspace)
    for each in (optimizer, newton):
        model[0].grad = torch.zeros(size)
        subspace.load_state_dict(subspace.state_dict())
        subspace.update()
        with Peak() as meter:
            each.step()
        assert meter.most <= 3 * 4 * size + saved, "no step makes the rows in float32"


# Trainings.


def stepped(
    make: Callable[..., Any], dtype: torch.dtype | None, steps: int = 20
) -> tuple[Tensor, float, Any]:
    """The parameters after a training, the sum of angle times move, and the last row."""
    model = quartic(2)
    subspace = made(model, basis_dtype=dtype, refresh="auto")
    optimizer = make(model, subspace)
    predicted = 0.0
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        predicted += subspace.stats.estimate * 0.05 * float(gradient.norm())
    rows = {name: monitor.history[name] for name in ("chi_gradient", "angle_estimate")}
    return flat(model.parameters()), predicted, rows


def bulk_sgd(model: Quartic, subspace: so.DominantSubspace) -> Any:
    return so.BulkSGD(model.parameters(), lr=0.05, subspace=subspace)


def dom_sgd(model: Quartic, subspace: so.DominantSubspace) -> Any:
    return so.DomSGD(model.parameters(), lr=0.05, subspace=subspace)


def newton(model: Quartic, subspace: so.DominantSubspace) -> Any:
    """Two groups, so that the basis is asked for in two runs of columns."""
    first, second = model.weights
    groups = [{"params": [first], "lr": 0.05}, {"params": [second], "lr": 0.04, "damping": 0.3}]
    return so.LowRankNewton(groups, subspace=subspace)


def projected(model: Quartic, subspace: so.DominantSubspace) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    so.project_updates(optimizer, subspace, onto="bulk")
    return optimizer


@pytest.mark.parametrize("make", [bulk_sgd, dom_sgd, newton, projected])
def test_a_training_goes_where_it_goes_with_all_bits_as_near_as_the_estimates_say(
    make: Callable[..., Any],
) -> None:
    """Two projectors within the sines s and s' of the true one move an update by s + s' of it.

    These steps bring points no further apart, but for LowRankNewton's in a nonconvex bulk.
    """
    exact, of_exact, rows = stepped(make, None)
    held, of_held, their_rows = stepped(make, BF16)
    difference = float((held - exact).norm())
    assert 0 < difference <= 3 * (of_exact + of_held)
    assert difference > 1e-3 * of_held, "all bits were used"
    chi, theirs = rows["chi_gradient"], their_rows["chi_gradient"]
    assert theirs == pytest.approx(chi, abs=0.02)
    assert min(their_rows["angle_estimate"]) > 1e-3


@pytest.mark.parametrize("make", [bulk_sgd, dom_sgd])
def test_of_exact_bases_rounding_is_all_that_two_trainings_differ_by(
    make: Callable[..., Any],
) -> None:
    """A new basis at each of 20 steps: updates differ by the sine, of each of them, at most."""
    found, predicted = {}, 0.0
    for dtype in (None, BF16):
        model = quartic(2)
        subspace = made(model, basis_dtype=dtype, refresh=1)
        optimizer = make(model, subspace)
        for _ in range(20):
            optimizer.zero_grad()
            model().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
            optimizer.step()
            predicted += subspace.basis.rounding * 0.05 * float(gradient.norm())
        found[dtype] = flat(model.parameters())
    difference = float((found[BF16] - found[None]).norm())
    assert 0.02 * predicted <= difference <= predicted


def test_dominant_and_bulk_add_up_to_the_plain_step() -> None:
    moves = []
    for make in (bulk_sgd, dom_sgd):
        model = quartic(3)
        before = flat(model.parameters())
        optimizer = make(model, made(model))
        model().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        optimizer.step()
        moves.append(flat(model.parameters()) - before)
    torch.testing.assert_close(sum(moves), -0.05 * gradient, rtol=0, atol=1e-13)
    assert abs(float(moves[0] @ moves[1])) <= 1e-12 * float(gradient.square().sum())


# Checkpoints.


def trained(dtype: torch.dtype | None, steps: int, model: Quartic | None = None) -> Any:
    model = model or quartic(4)
    subspace = made(model, basis_dtype=dtype)
    optimizer = bulk_sgd(model, subspace)
    return go_on(model, subspace, optimizer, steps)


def go_on(model: Quartic, subspace: Any, optimizer: Any, steps: int) -> Any:
    for _ in range(steps):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    return model, subspace, optimizer


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit() -> None:
    whole = trained(BF16, 8)
    first = trained(BF16, 4)
    states = [through_a_file(each.state_dict()) for each in first]
    assert states[1]["vectors"].dtype == states[1]["guard_vectors"].dtype == BF16
    resumed = trained(BF16, 1)
    for each, state in zip(resumed, states, strict=True):
        each.load_state_dict(state)
    assert same(resumed[1].state_dict(), states[1])
    assert torch.equal(resumed[1].basis.mixing, first[1].basis.mixing)
    assert resumed[1].basis.rounding == first[1].basis.rounding
    go_on(*resumed, 4)
    assert torch.equal(flat(resumed[0].parameters()), flat(whole[0].parameters()))
    told = [vars(each[1].stats) | {"seconds": 0} for each in (resumed, whole)]
    assert told[0] == told[1]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("own", "theirs"), [(None, BF16), (BF16, None)], ids=str)
def test_a_state_of_the_other_kind_is_converted_and_the_estimate_tells_of_both(
    own: Any, theirs: Any, asked: bool
) -> None:
    model, saved, _ = trained(theirs, 4)
    state = through_a_file(saved.state_dict())
    _, subspace, _ = trained(own, int(asked), model)
    saved.load_state_dict(state)  # of the present parameters, which have moved for both
    subspace.load_state_dict(state)
    vectors, before = subspace.basis.vectors, saved.basis
    assert subspace.state_dict()["vectors"].dtype == (own or torch.float64)
    assert subspace.basis.rounding > 1e-3, "the bits are gone, once they are"
    if own is None:
        assert torch.equal(vectors, before.vectors)
        assert subspace.stats.estimate == saved.stats.estimate
        assert subspace.rule.numbers() == saved.rule.numbers()
    else:
        sine = subspace.basis.rounding
        assert torch.equal(subspace.basis.rows, before.vectors.bfloat16())
        assert subspace.stats.estimate == pytest.approx(np.hypot(saved.stats.estimate, sine))
        starts = [each.rule._staleness.rates.start for each in (subspace, saved)]
        assert starts[0] == pytest.approx(np.hypot(starts[1], sine))
    again = through_a_file(subspace.state_dict())
    subspace.load_state_dict(again)
    assert same(subspace.state_dict(), again)
    refreshed = subspace.refresh()
    assert (refreshed.rounding > 0) == (own is BF16)
    assert sine_of(model, subspace) <= subspace.stats.estimate


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_distributed_checkpoint_is_read_into_a_subspace_without_a_basis(tmp_path: Any) -> None:
    model, saved, _ = trained(BF16, 3)
    dcp.save({"subspace": saved}, checkpoint_id=tmp_path)
    other = made(model)
    dcp.load({"subspace": other}, checkpoint_id=tmp_path)
    assert same(other.state_dict(), saved.state_dict())
    fresh = made(model, basis_dtype=None)
    dcp.load({"subspace": fresh}, checkpoint_id=tmp_path)
    assert torch.equal(fresh.basis.vectors, saved.basis.vectors)
    assert type(fresh.basis) is so.EigenBasis
    dcp.save({"subspace": fresh}, checkpoint_id=tmp_path / "whole")
    before = other.state_dict()
    message = "the loaded vectors is torch.bfloat16, but must be in the dtype .* basis_dtype=None"
    with pytest.raises(so.ArgumentError, match=message):  # torch rounds what it reads
        dcp.load({"subspace": other}, checkpoint_id=tmp_path / "whole")
    assert same(other.state_dict(), before)


def test_copies_go_on_by_themselves() -> None:
    model, subspace, optimizer = trained(BF16, 3)
    theirs = copy.deepcopy((model, subspace, optimizer))
    go_on(model, subspace, optimizer, 3)
    go_on(*theirs, 3)
    assert torch.equal(flat(model.parameters()), flat(theirs[0].parameters()))
    assert same(subspace.state_dict()["vectors"], theirs[1].state_dict()["vectors"])


# Arguments.


@pytest.mark.parametrize("value", [torch.float16, torch.float32, torch.int8, "bfloat16", 16, True])
def test_another_dtype_is_refused(value: Any) -> None:
    message = f"basis_dtype is {value!r}, but must be None or torch.bfloat16. None holds"
    with pytest.raises(so.ArgumentError, match=f"^{re.escape(message)}"):
        made(quartic(), basis_dtype=value)


@pytest.mark.parametrize("sample", [None, "auto"])
def test_an_angle_that_rounding_leaves_no_room_for_is_refused(sample: Any) -> None:
    message = "max_angle is 0.0078, but must be at least 0.0078125 with basis_dtype=torch.bfloat16"
    with pytest.raises(so.ArgumentError, match=re.escape(message)):
        made(quartic(), max_angle=0.0078, sample=sample)
    made(quartic(), max_angle=0.0078, sample=sample, basis_dtype=None)
    model = quartic()
    subspace = made(model, max_angle=2.0**-7)
    true = sine_of(model, subspace)
    assert true <= (1 + 1e-6) * subspace.stats.estimate <= 1.001 * true


def test_it_is_shown() -> None:
    subspace = made(quartic())
    assert "basis_dtype=torch.bfloat16" in repr(subspace)
    assert subspace.basis_dtype is BF16
    assert "held in torch.bfloat16" in repr(subspace.update())
    assert "basis_dtype" not in repr(made(quartic(), basis_dtype=None))

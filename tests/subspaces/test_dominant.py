"""`DominantSubspace`: when it refreshes, what it holds then, and what it does when that fails.

Most tests use the closed forms of `tests.optim.naive`, so that the dense oracle is a formula; those
of the basis itself and of what a refresh leaves behind also differentiate a network.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import random
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import subspace_optim as so
from subspace_optim.linalg import EigenBasis
from tests.checkpoints import through_a_file
from tests.dense import LOSSES, MODELS, make_problem
from tests.failing import Fails
from tests.optim.naive import DenseOperator, Quartic, assert_near, flat, landscape, projector

K = 2


def make(
    *, k: int = K, refresh: int = 1, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Quartic, DenseOperator, so.DominantSubspace]:
    model = Quartic(seed=seed, dtype=dtype)
    operator = DenseOperator(model)
    tol = 1e-12 if dtype == torch.float64 else 2e-5
    return model, operator, so.DominantSubspace(operator, k, refresh=refresh, tol=tol)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


def assert_fits(model: Quartic, basis: EigenBasis, relative: float = 1e-9) -> None:
    """The basis spans the top eigenvectors of the dense Hessian at the present parameters."""
    dense = model.hessian(flat(model.parameters()))
    vectors = basis.vectors.double()
    assert_near(vectors.T @ vectors, projector(dense, basis.k), relative)
    values = torch.linalg.eigvalsh(dense).flip(0)[: basis.k]
    assert_near(basis.eigenvalues, values, relative)


# The basis.


class Skewed(DenseOperator):
    """The Hessian and an antisymmetric part, ``share`` of its length."""

    share = 0.05

    def matmat(self, vectors: Tensor) -> Tensor:
        n = self.size
        skew = torch.ones(n, n, dtype=vectors.dtype).triu(1)
        skew = skew - skew.T
        products = super().matmat(vectors)
        return products + self.share * products.norm() / (vectors @ skew).norm() * vectors @ skew


def test_products_that_are_not_symmetric_have_no_basis() -> None:
    subspace = so.DominantSubspace(Skewed(Quartic(seed=0)), K, refresh=1)
    with pytest.raises(so.InconsistentDerivativeError, match=r"not symmetric.*differ by 0\.0"):
        subspace.update()
    assert subspace.stats.refreshes == 0


def fitted(scale: float, dtype: torch.dtype) -> so.HessianOperator:
    """A network that fits its data the better the larger its last weights are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 20), nn.Tanh(), nn.Linear(20, 3)).to(dtype)
    x = torch.randn(40, 5, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        y = net(x).argmax(1)
        near = net(x).topk(2).values
        x = x[near[:, 0] - near[:, 1] > 0.2]
        y = net(x).argmax(1)
        for p in net[2].parameters():
            p.mul_(scale)
    return so.HessianOperator(net, nn.functional.cross_entropy, (x, y))


def test_a_loss_that_rounding_leaves_nothing_of_is_told() -> None:
    """In float64 it is -log(1 - 5e-10) and has a curvature; in float32 a difference of ones."""
    exact = fitted(100.0, torch.float64)
    assert 1e-12 < exact.loss() < 1e-8
    basis = so.DominantSubspace(exact, K, refresh=1).update()
    assert bool((basis.eigenvalues > 0).all())
    with pytest.warns(so.ConvergenceWarning, match=r"rounding makes .* model\.double"):
        so.DominantSubspace(fitted(100.0, torch.float32), K, refresh=1).update()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_basis_is_that_of_dense_eigh_along_a_trajectory(model: str, loss: str) -> None:
    """refresh=1 is the papers' protocol: at each step the eigenvectors of that very step."""
    problem = make_problem(model, loss, seed=1)
    hessian = so.HessianOperator(problem.model, problem.loss_fn, problem.batches)
    subspaces = [so.DominantSubspace(hessian, k, refresh=1, tol=1e-12) for k in (1, 3)]
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.05)
    for step in range(1, 3):
        matrix = problem.dense().hessian
        for subspace in subspaces:
            vectors = subspace.update().vectors
            assert_near(vectors.T @ vectors, projector(matrix, subspace.k), 1e-7)
            assert subspace.stats.refreshes == step
        for x, y in problem.batches:
            optimizer.zero_grad()
            problem.loss_fn(problem.model(x), y).backward()
            optimizer.step()


@pytest.mark.parametrize("tol", [1e-1, 1e-5, 1e-11])
def test_tol_is_the_relative_residual_that_is_reached(tol: float) -> None:
    """Of 300 rows, so that the eigensolver does not just take all of the space."""
    model = Quartic(((300,),), seed=1)
    basis = so.DominantSubspace(DenseOperator(model), 4, refresh=1, tol=tol).update()
    matrix = model.hessian(flat(model.parameters()))
    values = torch.linalg.eigvalsh(matrix)
    residuals = basis.vectors @ matrix - basis.eigenvalues[:, None] * basis.vectors
    reached = float(residuals.norm(dim=1).max() / values.abs().max())
    assert reached <= tol
    if tol == 1e-1:
        assert reached > 1e-5, "tol=0.1 is no looser than the others: it was ignored"


def test_the_basis_is_a_function_of_parameters_and_seed() -> None:
    """Another seed gives another rounding, the same one the same bits."""

    def vectors(seed: int) -> Tensor:
        model = Quartic(((300,),), seed=1)
        torch.manual_seed(seed + 77)  # the global state has no part in it
        return so.DominantSubspace(DenseOperator(model), 3, seed=seed).update().vectors

    assert torch.equal(vectors(0), vectors(0))
    assert not torch.equal(vectors(0), vectors(1))


# A parameter state, however it came about.


def fresh(p: Tensor) -> Tensor:
    return torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape)


def one_ulp(p: Tensor) -> None:
    first = p.detach().view(-1)[:1]
    first.copy_(torch.nextafter(first, torch.full_like(first, math.inf)))


def exchanged(p: Tensor) -> None:
    p.data.copy_(p.data.flip(0))


def through_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] += 0.5


def rebound(p: Tensor) -> None:
    p.data = fresh(p)


def two_signs(p: Tensor) -> None:
    p.data.view(-1)[:2].neg_()


WRITERS: dict[str, Callable[[Tensor], Any]] = {
    "data": lambda p: p.data.mul_(0.5),
    "data negated": lambda p: p.data.neg_(),
    "two signs": two_signs,
    "copy_": lambda p: p.detach().copy_(fresh(p)),
    "a new tensor for data": rebound,
    "numpy": through_numpy,
    "one ulp of one element": one_ulp,
    "elements exchanged": exchanged,
}
STEPPERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD fused": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, fused=True),
    "SGD foreach": lambda ps: torch.optim.SGD(ps, lr=0.01, momentum=0.9, foreach=True),
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.01, foreach=False),
    "Adam fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "Adam foreach": lambda ps: torch.optim.Adam(ps, lr=0.01, foreach=True),
}


def assert_renewed_once(model: Quartic, subspace: so.DominantSubspace, dtype: torch.dtype) -> None:
    """One refresh for the new state, whoever asks; the same basis for all that ask again."""
    refreshes, products = subspace.stats.refreshes, subspace.stats.products
    basis = subspace.update()
    assert subspace.stats.refreshes == refreshes + 1
    assert subspace.stats.products > products
    assert_fits(model, basis, 1e-9 if dtype == torch.float64 else 1e-3)
    products = subspace.operator.stats.products
    assert subspace.update() is basis
    assert subspace.operator.stats.products == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("writer", WRITERS)
def test_any_write_is_a_new_state_with_one_refresh(writer: str, dtype: torch.dtype) -> None:
    model, _, subspace = make(dtype=dtype)
    subspace.update()
    WRITERS[writer](model.weights[0])
    assert_renewed_once(model, subspace, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stepper", STEPPERS)
def test_any_optimizer_makes_a_new_state_with_one_refresh(stepper: str, dtype: torch.dtype) -> None:
    """Fused kernels do not raise the version counters of the parameters."""
    model, _, subspace = make(dtype=dtype)
    optimizer = STEPPERS[stepper](model.parameters())
    subspace.update()
    for _ in range(3):
        train(model, optimizer)
        assert_renewed_once(model, subspace, dtype)


def test_what_is_no_new_state_costs_nothing() -> None:
    """The same values written again, gradients, momentum buffers, modes, another tensor."""
    model, operator, subspace = make()
    basis, products = subspace.update(), operator.stats.products
    model().backward()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.eval()
    for p in model.parameters():
        p.data = p.data.clone()
    assert subspace.update() is basis
    assert (operator.stats.products, subspace.clock) == (products, 1)


def test_a_state_that_comes_back_is_a_new_one() -> None:
    model, _, subspace = make()
    saved = copy.deepcopy(model.state_dict())
    subspace.update()
    model.weights[0].data.mul_(2)
    assert_fits(model, subspace.update())
    model.load_state_dict(saved)
    assert_renewed_once(model, subspace, torch.float64)


# Who asks, and how often.


@pytest.mark.parametrize("attached", ["before", "after"])
@pytest.mark.parametrize("cls", [so.DomSGD, so.BulkSGD])
def test_a_monitor_beside_the_optimizer_costs_no_refresh(cls: Any, attached: str) -> None:
    products = []
    for monitored in (False, True):
        model, operator, subspace = make()
        optimizer = cls(model.parameters(), lr=0.02, momentum=0.9, subspace=subspace)
        for step in range(6):
            if monitored and step == (0 if attached == "before" else 3):
                so.Monitor(optimizer, subspace)
                so.Monitor(optimizer, subspace, every=2)
            train(model, optimizer)
            assert subspace.stats.refreshes == step + 1
        products.append(operator.stats.products)
    assert products[0] == products[1]


def test_optimizers_and_monitors_that_share_a_subspace_pay_once_a_state() -> None:
    """Two optimizers in turn make two states a round; both are monitored, one of them twice."""
    model, _, subspace = make()
    dominant = so.DomSGD(model.parameters(), lr=0.02, subspace=subspace)
    bulk = so.BulkSGD(model.parameters(), lr=0.02, subspace=subspace)
    monitors = [so.Monitor(o, subspace) for o in (dominant, bulk)]
    monitors.append(so.Monitor(dominant, subspace, every=lambda step: True))
    for state in range(1, 9):
        train(model, dominant if state % 2 else bulk)
        assert subspace.stats.refreshes == state
    assert [len(m.history["step"]) for m in monitors] == [4, 4, 4]


def due(asked: Sequence[int], refresh: int) -> list[int]:
    """At the first question, then at every one that comes `refresh` steps after the last."""
    steps: list[int] = []
    for step in asked:
        if not steps or step - steps[-1] >= refresh:
            steps.append(step)
    return steps


@settings(max_examples=25)
@given(
    refresh=st.integers(1, 7),
    monitors=st.lists(st.integers(1, 8), max_size=3),
    projected=st.booleans(),
    extra=st.integers(0, 2),
    seed=st.integers(0, 5),
)
def test_refresh_counts_training_steps_whoever_asks_and_however_often(
    refresh: int, monitors: list[int], projected: bool, extra: int, seed: int
) -> None:
    """The steps of the refreshes depend on the steps at which somebody asked, and on no more."""
    model, _, subspace = make(refresh=refresh, seed=seed)
    parameters = model.parameters()
    optimizer: torch.optim.Optimizer = (
        so.DomSGD(parameters, lr=1e-3, subspace=subspace)
        if projected
        else torch.optim.SGD(parameters, lr=1e-3)
    )
    for every in monitors:  # each with a schedule of its own: none takes the place of another
        so.Monitor(optimizer, subspace, every=lambda step, n=every: step % n == 0)
    asked = [
        t for t in range(20) if (projected or extra) or any(t % every == 0 for every in monitors)
    ]
    seen: list[int] = []
    for t in range(20):
        before = subspace.stats.refreshes
        for _ in range(extra):
            subspace.update()
        train(model, optimizer)
        assert subspace.stats.refreshes <= before + 1
        seen += [t] * (subspace.stats.refreshes - before)
    assert seen == due(asked, refresh)


@pytest.mark.parametrize(
    ("every", "refresh", "expected"),
    [
        (1, 3, [0, 3, 6, 9, 12]),
        (2, 3, [0, 4, 8, 12]),
        (3, 3, [0, 3, 6, 9, 12]),
        (5, 3, [0, 5, 10]),
        (5, 1, [0, 5, 10]),
        (2, 6, [0, 6, 12]),
        (4, 6, [0, 8]),
    ],
)
def test_a_monitor_alone_refreshes_at(every: int, refresh: int, expected: list[int]) -> None:
    """The same by hand, since `due` could share a mistake with the code."""
    model, _, subspace = make(refresh=refresh)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    so.Monitor(optimizer, subspace, every=every)
    seen = []
    for t in range(13):
        before = subspace.stats.refreshes
        train(model, optimizer)
        seen += [t] * (subspace.stats.refreshes - before)
    assert seen == expected


def test_a_monitor_counts_on_from_what_others_have_counted() -> None:
    """A plain step, projected ones, plain ones again: due at 12, three steps after the last."""
    model, _, subspace = make(refresh=3)
    plain = torch.optim.SGD(model.parameters(), lr=1e-3)
    projected = so.DomSGD(model.parameters(), lr=1e-3, subspace=subspace)
    so.Monitor(plain, subspace, every=3)
    seen = []
    for t, optimizer in enumerate([plain] + [projected] * 9 + [plain] * 6):
        before = subspace.stats.refreshes
        train(model, optimizer)
        seen += [t] * (subspace.stats.refreshes - before)
    assert seen == [0, 3, 6, 9, 12, 15]


def test_refresh_counts_steps_for_a_monitor_that_came_later() -> None:
    """At step 5 the basis of step 0 has served for five steps: it is due, whoever knows of them."""
    model, _, subspace = make(refresh=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    so.Monitor(optimizer, subspace, every=10)
    seen = []
    for t in range(12):
        if t == 5:
            so.Monitor(optimizer, subspace)
        before = subspace.stats.refreshes
        train(model, optimizer)
        seen += [t] * (subspace.stats.refreshes - before)
    assert seen == [0, 5, 8, 11]


def test_refresh_forces_a_new_basis_and_starts_a_new_cycle() -> None:
    model, _, subspace = make(refresh=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    first = subspace.update()
    assert subspace.refresh() is not first  # even at the same parameters
    assert subspace.stats.refreshes == 2
    train(model, optimizer)
    subspace.update()
    train(model, optimizer)
    forced = subspace.refresh()
    assert_fits(model, forced)
    assert (subspace.stats.refreshes, subspace.clock) == (3, 3)
    for _ in range(3):
        train(model, optimizer)
        assert subspace.update() is forced
    train(model, optimizer)
    assert_fits(model, subspace.update())
    assert subspace.stats.refreshes == 4


def test_stats_add_up() -> None:
    """The subspace counts what its own eigensolves cost, others' products not among them."""
    model, operator, subspace = make()
    assert subspace.basis is None
    unknown = {"bound": None, "estimate": None, "examples": None}  # refresh=1 follows no angle
    assert vars(subspace.stats) == dict.fromkeys(vars(subspace.stats), 0) | unknown
    total = 0
    for turn in range(1, 4):
        operator.matvec(torch.ones(operator.size, dtype=torch.float64))
        operator.gradient()
        model.weights[0].data.mul_(1.1)
        before = operator.stats.products
        assert subspace.update() is subspace.basis
        total += operator.stats.products - before
        assert (subspace.stats.refreshes, subspace.stats.products) == (turn, total)
        assert operator.stats.products == total + turn
        assert subspace.stats.gradients == 0
    assert 0 < subspace.stats.seconds < 60
    assert subspace.stats.failures == 0


def test_stats_count_the_gradients_that_kept_graphs_begin_with() -> None:
    model = nn.Linear(3, 2)
    hessian = so.HessianOperator(
        model, nn.functional.mse_loss, (torch.randn(4, 3), torch.zeros(4, 2))
    )
    subspace = so.DominantSubspace(hessian, 2, refresh=1)
    subspace.update()
    subspace.refresh()
    assert subspace.stats.gradients == hessian.stats.gradients == 2
    assert subspace.stats.products == hessian.stats.products > 0


# When a refresh fails.

FAILURES = {
    "NaN": (math.nan, "not finite"),
    "infinite": (math.inf, "not finite"),
    "RuntimeError": (RuntimeError("no second derivative"), "no second derivative"),
    "out of memory": (torch.OutOfMemoryError("out of memory"), "out of memory"),
    "NonFiniteError": (so.NonFiniteError("the loss is nan"), "the loss is nan"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_first_failure_raises(name: str) -> None:
    failure, cause = FAILURES[name]
    model, operator, subspace = make()
    operator.failure = failure
    for attempt in (1, 2, 3, 4):
        with pytest.raises(RuntimeError, match=cause):
            subspace.update()
        assert subspace.stats.failures == attempt
    operator.failure = None
    assert_fits(model, subspace.update())
    assert (subspace.stats.refreshes, subspace.basis is not None) == (1, True)


@pytest.mark.parametrize("name", FAILURES)
def test_a_later_failure_keeps_the_basis_and_the_third_in_a_row_raises(name: str) -> None:
    failure, cause = FAILURES[name]
    model, operator, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for _ in range(2):
        good = subspace.update()
        train(model, optimizer)
    operator.failure = failure
    for count, step in ((1, 3), (2, 4)):
        message = rf"refresh at step {step} failed .*{cause}.*basis of step 2 .*failure {count} of"
        with pytest.warns(so.StaleBasisWarning, match=message):
            assert subspace.update() is good
        products = operator.stats.products
        assert subspace.update() is good, "asked again at the same state"
        assert operator.stats.products == products, "tried again at the same state"
        train(model, optimizer)
    with pytest.raises(RuntimeError, match=cause):
        subspace.update()
    assert (subspace.stats.failures, subspace.stats.refreshes) == (3, 2)
    train(model, optimizer)
    with pytest.raises(RuntimeError, match=cause):  # the fourth too
        subspace.update()
    operator.failure = None
    assert_fits(model, subspace.refresh())


def test_a_success_resets_the_count_of_failures() -> None:
    model, operator, subspace = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    outcomes = []
    for fails in (0, 1, 1, 0, 1, 1, 0, 1):
        operator.failure = math.nan if fails else None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            subspace.update()
        outcomes.append([w.category for w in caught])
        train(model, optimizer)
    stale = [so.StaleBasisWarning]
    assert outcomes == [[], stale, stale, [], stale, stale, [], stale]
    assert (subspace.stats.failures, subspace.stats.refreshes) == (5, 3)


def test_a_failed_refresh_is_tried_again_at_the_next_step_and_starts_no_cycle() -> None:
    model, operator, subspace = make(refresh=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    tried = []
    for step in range(9):
        operator.failure = math.nan if step in (3, 4) else None
        before = operator.stats.products
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", so.StaleBasisWarning)
            subspace.update()
        tried += [step] * (operator.stats.products > before)
        train(model, optimizer)
    assert tried == [0, 3, 4, 5, 8]


def test_a_failure_inside_of_a_step_warns_where_the_step_was_asked_for() -> None:
    model, operator, subspace = make()
    optimizer = so.DomSGD(model.parameters(), lr=1e-2, subspace=subspace)
    train(model, optimizer)
    operator.failure = math.nan
    with pytest.warns(so.StaleBasisWarning, match="refresh at step 2"):
        train(model, optimizer)
    assert (subspace.stats.refreshes, subspace.stats.failures) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [so.DataChangedError("shuffled"), so.ArgumentError("the loss", 1, "a tensor"), KeyError("x")],
)
def test_errors_that_no_later_step_would_mend_always_raise(error: Exception) -> None:
    model, operator, subspace = make()
    basis = subspace.update()
    model.weights[0].data.mul_(2)
    operator.failure = error
    for _ in range(2):
        with pytest.raises(type(error)):
            subspace.refresh()
    assert subspace.basis is basis
    assert (subspace.stats.failures, subspace.stats.refreshes) == (0, 1)


@pytest.mark.parametrize("error", [so.DataChangedError("shuffled"), RuntimeError("third")])
def test_an_error_that_was_raised_is_raised_again_at_the_same_parameters(error: Exception) -> None:
    """Whoever asks next, perhaps in the cell of a notebook that is run again, must hear of it."""
    model, operator, subspace = make()
    subspace.update()
    operator.failure = RuntimeError("first and second")
    for _ in range(2):
        model.weights[0].data.mul_(1.1)
        with pytest.warns(so.StaleBasisWarning):
            subspace.update()
    model.weights[0].data.mul_(1.1)
    operator.failure = error
    for _ in range(2):
        with pytest.raises(type(error), match=str(error)):
            subspace.update()


def test_data_that_changed_raise_at_a_later_refresh() -> None:
    class Drifting:
        drift = 0

        def __iter__(self) -> Any:
            yield torch.ones(4, 3) + self.drift, torch.zeros(4, 2)

    model, data = nn.Linear(3, 2), Drifting()
    subspace = so.DominantSubspace(so.HessianOperator(model, nn.functional.mse_loss, data), 2)
    basis = subspace.refresh()
    model.weight.data.mul_(2)
    data.drift = 1
    with pytest.raises(so.DataChangedError, match="differs from the first"):
        subspace.update()
    assert subspace.basis is basis
    assert subspace.stats.refreshes == 1


# Saved, loaded, copied.


ORDERS = list(itertools.permutations(range(3)))


def run(cls: Any, refresh: int, steps: int) -> tuple[list[Any], list[list[Tensor]]]:
    """Trains, and returns (model, optimizer, subspace) with the parameters after each step."""
    model, _, subspace = make(refresh=refresh)
    optimizer = cls(model.parameters(), lr=0.02, momentum=0.9, subspace=subspace)
    path = []
    for _ in range(steps):
        train(model, optimizer)
        path.append([p.detach().clone() for p in model.parameters()])
    return [model, optimizer, subspace], path


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("saved_at", [3, 4, 5])
@pytest.mark.parametrize("cls", [so.DomSGD, so.BulkSGD])
def test_a_resumed_run_equals_the_uninterrupted_one(
    cls: Any, saved_at: int, order: tuple[int, ...]
) -> None:
    """Bit for bit, with the same refreshes: refresh=3 is due at steps 3 and 6 in both."""
    (model, _, subspace), path = run(cls, 3, 8)
    interrupted, _ = run(cls, 3, saved_at)
    states = [through_a_file(part.state_dict()) for part in interrupted]

    resumed, _ = run(cls, 3, 1)  # has a basis, a clock and momentum of its own: all replaced
    for part in order:
        resumed[part].load_state_dict(states[part])
    for expected in path[saved_at:]:
        train(resumed[0], resumed[1])
        assert all(map(torch.equal, resumed[0].parameters(), expected))
    costs = [{**vars(s.stats), "seconds": 0} for s in (resumed[2], subspace)]
    assert costs[0] == costs[1]
    assert all(map(torch.equal, resumed[0].parameters(), model.parameters()))


def test_a_run_that_goes_back_to_a_checkpoint_repeats_itself_beside_a_live_monitor() -> None:
    """The monitor lives on when the states are loaded: it must not bring its later clock along."""
    parts, _ = run(so.DomSGD, 5, 2)
    model, optimizer, subspace = parts
    so.Monitor(optimizer, subspace)
    train(model, optimizer)
    states = copy.deepcopy([part.state_dict() for part in parts])
    paths = []
    for _ in range(2):
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(state)
        path = []
        for _ in range(8):
            train(model, optimizer)
            path.append(subspace.stats.refreshes)
        paths.append(path)
    assert paths[0] == paths[1] == [1, 1, 2, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_loading_in_any_order_leaves_no_stale_basis(order: tuple[int, ...], asked: bool) -> None:
    parts, _ = run(so.DomSGD, 1, 3)
    model, _, subspace = parts
    subspace.update()
    states = copy.deepcopy([part.state_dict() for part in parts])
    for _ in range(2):
        train(model, parts[1])
    for part in order:
        parts[part].load_state_dict(states[part])
        if asked:
            assert_fits(model, subspace.update())
    refreshes = subspace.stats.refreshes
    assert_fits(model, subspace.update())
    if not asked:
        assert refreshes == states[2]["stats"]["refreshes"]
        assert subspace.stats.refreshes == refreshes, "a basis that was loaded was made again"


def test_a_state_without_a_basis_takes_the_basis_away() -> None:
    model, _, subspace = make()
    empty = through_a_file(subspace.state_dict())
    subspace.update()
    subspace.load_state_dict(empty)
    assert (subspace.basis, subspace.clock, subspace.stats.refreshes) == (None, 0, 0)
    assert_fits(model, subspace.update())


def test_failures_in_a_row_are_part_of_the_state() -> None:
    model, operator, subspace = make()
    subspace.update()
    operator.failure = math.nan
    for _ in range(2):
        model.weights[0].data.mul_(1.1)
        with pytest.warns(so.StaleBasisWarning):
            subspace.update()
    state = through_a_file(subspace.state_dict())
    other = so.DominantSubspace(operator, K, refresh=1, tol=1e-12)
    other.load_state_dict(state)
    assert other.stats.failures == 2
    model.weights[0].data.mul_(1.1)
    with pytest.raises(so.NonFiniteError):
        other.update()


def test_a_loaded_basis_is_a_copy_in_the_dtype_of_the_operator() -> None:
    _, _, subspace = make(dtype=torch.float32)
    subspace.update()
    state = subspace.state_dict()
    _, _, double = make(dtype=torch.float64)
    double.load_state_dict(state)
    assert double.basis is not None
    assert double.basis.vectors.dtype == double.basis.eigenvalues.dtype == torch.float64
    _, _, twin = make(dtype=torch.float32)
    twin.load_state_dict(state)
    state["vectors"].zero_()
    assert twin.basis is not None
    assert_near(twin.basis.vectors.norm(dim=1), torch.ones(K), 1e-5)


@pytest.mark.parametrize(("k", "shapes"), [(K + 1, None), (K, ((3, 2),)), (1, ((10,),))])
def test_a_state_of_another_shape_is_refused(k: int, shapes: Any) -> None:
    _, _, subspace = make()
    basis = subspace.update()
    other = Quartic() if shapes is None else Quartic(shapes)
    theirs = so.DominantSubspace(DenseOperator(other), k)
    theirs.update()
    with pytest.raises(so.ArgumentError, match=r"shape of the loaded \w+ is .*another model or k"):
        subspace.load_state_dict(theirs.state_dict())
    assert subspace.basis is basis
    assert subspace.update() is basis


def test_copies_of_model_subspace_and_optimizer_are_an_independent_triple() -> None:
    for cls in (so.DomSGD, so.BulkSGD):
        parts, path = run(cls, 3, 4)
        model, optimizer, subspace = parts
        theirs = copy.deepcopy((model, subspace, optimizer))
        their_model, their_subspace, their_optimizer = theirs
        assert their_optimizer.subspace is their_subspace
        own = {id(p) for p in model.parameters()}
        assert not own & {id(p) for p in their_subspace.parameters.tensors}
        _, expected = run(cls, 3, 8)
        for each in expected[4:]:
            train(their_model, their_optimizer)
            assert all(map(torch.equal, their_model.parameters(), each))
        assert all(map(torch.equal, model.parameters(), path[-1])), "the original moved"
        assert (subspace.stats.refreshes, their_subspace.stats.refreshes) == (2, 3)
        assert (subspace.clock, their_subspace.clock) == (4, 8)
        train(model, optimizer)
        assert all(map(torch.equal, model.parameters(), expected[4])), "the original is disturbed"


@pytest.mark.parametrize("order", ORDERS)
def test_in_a_copied_triple_the_subspace_comes_before_the_optimizer(order: tuple[int, ...]) -> None:
    """Copied first, an optimizer cannot know that the subspace will follow: its step says so."""
    parts, _ = run(so.DomSGD, 1, 1)
    copies = dict(zip(order, copy.deepcopy(tuple(parts[i] for i in order)), strict=True))
    if order.index(2) < order.index(1):
        assert copies[1].subspace is copies[2]
        train(copies[0], copies[1])
        assert copies[2].stats.refreshes == 2
    else:
        with pytest.raises(so.ArgumentError, match=r"set `optimizer\.subspace`"):
            train(copies[0], copies[1])


def test_a_copy_of_a_network_with_its_hessian_goes_on_by_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=1e-12)
    subspace.update()
    for pair in (copy.deepcopy((model, subspace)), pickle.loads(pickle.dumps((model, subspace)))):
        copied, theirs = pair
        for p in copied.parameters():
            p.data.mul_(1.3)
        basis = theirs.update()
        dense = landscape(copied, nn.functional.mse_loss, x, y).hessian(flat(copied.parameters()))
        assert_near(basis.vectors.T @ basis.vectors, projector(dense, 2), 1e-8)
        assert (subspace.stats.refreshes, theirs.stats.refreshes) == (1, 2)


def test_a_refresh_leaves_random_states_buffers_gradients_and_modes_alone() -> None:
    """With dropout and batch norm in train mode, where a forward pass changes all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 2))
    model[1].eval()
    x, y = torch.randn(16, 4), torch.randn(16, 2)
    nn.functional.mse_loss(model(x), y).backward()

    def observe() -> tuple[Any, ...]:
        return (
            [p.detach().clone() for p in model.parameters()],
            [p.grad.clone() for p in model.parameters()],
            [b.clone() for b in model.buffers()],
            [torch.get_rng_state()],
            [torch.from_numpy(np.random.get_state()[1].astype(np.int64))],  # noqa: NPY002
            [torch.tensor(random.getstate()[1])],
            [torch.tensor([m.training for m in model.modules()])],
        )

    before = observe()
    gradients = [p.grad for p in model.parameters()]
    subspace = so.DominantSubspace(so.HessianOperator(model, nn.functional.mse_loss, (x, y)), 3)
    subspace.update()
    subspace.refresh()
    for old, new in zip(before, observe(), strict=True):
        assert all(map(torch.equal, old, new))
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert torch.is_grad_enabled()


# Bad input.


@pytest.mark.parametrize(
    ("argument", "value", "allowed"),
    [
        ("k", 0, "an integer from 1 to 9"),
        ("k", -1, "an integer from 1 to 9"),
        ("k", 10, "an integer from 1 to 9"),
        ("k", True, "an integer from 1 to 9"),
        ("k", 2.5, "an integer from 1 to 9"),
        ("k", 2.0, "an integer from 1 to 9"),
        ("k", None, "an integer from 1 to 9"),
        ("refresh", 0, "an integer of at least 1"),
        ("refresh", -3, "an integer of at least 1"),
        ("refresh", "always", "an integer of at least 1"),
        ("refresh", 1.5, "an integer of at least 1"),
        ("refresh", True, "an integer of at least 1"),
        ("max_angle", 0, "a finite number above 0"),
        ("max_angle", 1.01, "at most 1"),
        ("max_angle", math.nan, "a finite number above 0"),
        ("max_angle", "0.1", "a finite number above 0"),
        ("tol", 0, "a finite number above 0"),
        ("tol", 0.0, "a finite number above 0"),
        ("tol", -1e-3, "a finite number above 0"),
        ("tol", math.nan, "a finite number above 0"),
        ("tol", math.inf, "a finite number above 0"),
        ("tol", "1e-3", "a finite number above 0"),
        ("tol", True, "a finite number above 0"),
        ("seed", -1, "an integer of at least 0"),
        ("seed", 0.5, "an integer of at least 0"),
        ("seed", None, "an integer of at least 0"),
    ],
)
def test_a_bad_argument_is_named(argument: str, value: Any, allowed: str) -> None:
    operator = DenseOperator(Quartic())
    arguments = {"k": K, argument: value}
    message = f"{argument} is {value!r}, but must be {allowed}."
    with pytest.raises(so.ArgumentError, match=f"^{re.escape(message)}"):
        so.DominantSubspace(operator, **arguments)
    assert operator.stats.products == 0


def test_a_bad_k_tells_how_many_parameters_there_are() -> None:
    with pytest.raises(so.ArgumentError, match="The operator has 9 parameters"):
        so.DominantSubspace(DenseOperator(Quartic()), 10)


@pytest.mark.parametrize("operator", [None, nn.Linear(2, 2), torch.eye(3), DenseOperator])
def test_what_is_no_operator_is_named(operator: Any) -> None:
    kind = type(operator).__name__
    with pytest.raises(so.ArgumentError, match=f"operator is '{kind}', but must be a CurvatureOp"):
        so.DominantSubspace(operator, K)


@pytest.mark.parametrize("k", [1, np.int64(2), 9])
def test_every_k_from_1_to_the_number_of_parameters_works(k: Any) -> None:
    model, _, subspace = make(k=k)
    basis = subspace.update()
    assert basis.vectors.shape == (int(k), 9)
    assert_fits(model, basis)


# Failure half-way: at any operation of torch, by any exception.


STOPS: dict[str, Callable[[], BaseException]] = {
    "memory": lambda: torch.OutOfMemoryError("out of memory"),
    "host memory": lambda: MemoryError("out of memory"),
    "Ctrl-C": KeyboardInterrupt,
}
WORKS: dict[str, dict[str, Any]] = {
    "renew": {"refresh": "auto", "max_angle": 0.01},
    "solve": {"refresh": 1},
    "forced": {"refresh": "auto", "max_angle": 0.2},
}


def knowledge(subspace: so.DominantSubspace) -> dict[str, Any]:
    """All that a subspace knows of its basis, and when it was made; not what that has cost."""
    state = subspace.state_dict()
    counts = {"bound", "refreshes", "cold", "probes"}
    kept = {name: value for name, value in state["stats"].items() if name in counts}
    passing = {"clock", "state", "state_clock", "attempted", "failures_in_a_row", "checksum"}
    return {n: value for n, value in state.items() if n not in passing} | {"stats": kept}


def same(first: Any, second: Any) -> bool:
    """Bit by bit, whatever holds them."""
    leaves, theirs = tree_leaves(first), tree_leaves(second)
    return len(leaves) == len(theirs) and all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(leaves, theirs, strict=True)
    )


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("work", WORKS)
def test_whatever_stops_a_refresh_half_way_leaves_all_as_it_was(work: str, stop: str) -> None:
    """Old basis and old certificate, at whichever operation, and the next update is as ever."""
    at, ends = 0, set()
    step = {"memory": 47, "host memory": 83, "Ctrl-C": 61}[stop]
    start = Quartic()
    prepared = so.DominantSubspace(DenseOperator(start), K, **WORKS[work])
    prepared.update()
    start.weights[0].data.mul_(1.1)
    while True:
        at += step
        model, subspace = copy.deepcopy((start, prepared))
        basis = subspace.basis
        ask = subspace.refresh if work == "forced" else subspace.update
        before = knowledge(subspace)
        kinds: list[type] = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with Fails(at, STOPS[stop]()) as mode:
                    ask()
            except (RuntimeError, MemoryError, KeyboardInterrupt) as error:
                kinds.append(type(error))
        kinds += [w.category for w in caught]
        if mode.seen < at:
            break
        ends.add(tuple(kinds))
        if kinds:
            assert subspace.basis is basis
            assert same(knowledge(subspace), before)
            failed = so.StaleBasisWarning in kinds
            assert subspace.stats.failures == subspace._failures == failed
        model.weights[0].data.mul_(1.01)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = subspace.update()
        assert_fits(model, found, 1e-1)
        assert subspace._failures == 0
    assert at > 5 * step
    raised = {"memory": torch.OutOfMemoryError, "host memory": MemoryError}
    expected = {(raised.get(stop, KeyboardInterrupt),), (so.StaleBasisWarning,)}
    assert ends <= {(), *expected}
    assert ((so.StaleBasisWarning,) in ends) == (stop != "Ctrl-C")


def test_stats_that_were_looked_up_once_live_on() -> None:
    model, _, subspace = make()
    stats = subspace.stats
    for refreshes in (1, 2):
        model.weights[0].data.mul_(1.1)
        subspace.update()
        assert stats is subspace.stats
        assert stats.refreshes == refreshes


def test_a_warning_that_is_an_error_leaves_a_subspace_that_goes_on() -> None:
    model, operator, subspace = make()
    good = subspace.update()
    operator.failure = math.nan
    model.weights[0].data.mul_(1.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(so.StaleBasisWarning):
            subspace.update()
    assert subspace.update() is good, "tried again at the same state"
    operator.failure = None
    model.weights[0].data.mul_(1.1)
    assert_fits(model, subspace.update())


# States that were changed, or are another's.


def trained(refresh: Any = "auto") -> so.DominantSubspace:
    """A subspace with a history: probes, refinements, and ratios that were learned."""
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), K, refresh=refresh, max_angle=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(4):
        subspace.update()
        train(model, optimizer)
    subspace.update()
    subspace.refresh()
    return subspace


def changed(value: Any) -> list[Any]:
    """What an entry may be mistaken for, or changed to."""
    others: list[Any] = [
        None,
        "text",
        [],
        {},
        object(),
        -1,
        math.nan,
        1e300,
        -math.inf,
        True,
        10**400,
    ]
    if isinstance(value, bool):
        return [*others, not value]
    if isinstance(value, Tensor):
        others += [value[:0], value[..., None], value.long(), value.to(torch.complex64)]
        others += [value * math.nan, value * 1.01, -value, value.flip(0), value + 1e-3]
        others += [value.to("meta"), value.to_sparse(), value.half(), value.tolist()]
        return [*others, value.bool()]
    if isinstance(value, int | float):
        return [*others, value + 1, -value, float(value) / 3, torch.tensor(value)]
    if isinstance(value, list | tuple):
        return [*others, [*value, 0.5], list(value)[:-1], [math.nan for _ in value], [None]]
    if isinstance(value, dict):
        inner = [value | {name: other} for name in value for other in changed(value[name])]
        return others + inner + [{n: v for n, v in value.items() if n != name} for name in value]
    return others


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        plain = not a.is_meta and a.layout == torch.strided and a.dtype == b.dtype
        return plain and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[name], b[name]) for name in a)
    return type(a) is type(b) and a == b


def refusal(subspace: so.DominantSubspace, state: Any) -> str | None:
    """What is said of a state that is refused; anything but an `ArgumentError` is raised."""
    try:
        subspace.load_state_dict(state)
    except so.ArgumentError as error:
        return str(error)
    return None


COSTS = {"refreshes", "cold", "probes", "looks", "failures", "products", "full_products"}
COSTS |= {"gradients", "full_gradients", "seconds"}


@pytest.mark.parametrize("refresh", ["auto", 2])
@pytest.mark.slow
def test_a_state_that_was_changed_is_refused_and_changes_nothing(refresh: Any) -> None:
    """Every entry in turn; counts of what was spent are as good as any other counts."""
    state = trained(refresh).state_dict()
    own = trained(refresh)
    own.refresh()
    basis, before = own.basis, own.state_dict()
    tried = taken = 0
    for name, value in state.items():
        tampered = [state | {name: other} for other in changed(value) if not equal(other, value)]
        tampered.append({n: v for n, v in state.items() if n != name})
        for other in tampered:
            tried += 1
            said = refusal(own, other)
            if said is not None:
                assert name in said or "checksum" in said
                assert own.basis is basis
                assert same(own.state_dict(), before)
                continue
            taken += 1  # what was saved, in another form; or of a basis that has cost other things
            mine = own.state_dict()
            costs = {n: mine["stats"][n] for n in COSTS} if name == "stats" else {}
            assert same(mine, state | {"stats": state["stats"] | costs})
            own.load_state_dict(before)
            basis = own.basis
    assert tried > 400
    assert 0 < taken < 60


def test_a_state_of_another_version_is_refused_by_its_number() -> None:
    subspace = trained()
    state = subspace.state_dict()
    assert state["version"] == 1
    for version in (0, 2, "1", None):
        message = f"the version of the loaded state is {version!r}, but must be 1"
        with pytest.raises(so.ArgumentError, match=message):
            subspace.load_state_dict(state | {"version": version})
        with pytest.raises(so.ArgumentError, match=message):
            subspace.load_state_dict({"version": version})


@pytest.mark.parametrize("state", [None, [], "text", 3, nn.Linear(2, 2), {1: 2}, {}])
def test_what_is_no_state_is_named(state: Any) -> None:
    subspace = trained()
    before = subspace.state_dict()
    with pytest.raises(so.ArgumentError, match="the loaded state is"):
        subspace.load_state_dict(state)
    assert same(subspace.state_dict(), before)


@settings(max_examples=40)
@example(k=9, steps=2, refresh="auto", dtype=torch.float32, seed=0)  # no pair comes next
@given(
    k=st.integers(1, 9),
    steps=st.integers(0, 4),
    refresh=st.sampled_from(["auto", 1, 3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_whatever_was_saved_is_taken(
    k: int, steps: int, refresh: Any, dtype: torch.dtype, seed: int
) -> None:
    """Also into a subspace that knows nothing, and one that knows other things."""

    def make_one() -> tuple[Quartic, so.DominantSubspace]:
        model = Quartic(seed=seed, dtype=dtype)
        return model, so.DominantSubspace(DenseOperator(model), k, refresh=refresh, seed=seed)

    model, subspace = make_one()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", so.NoGapWarning)
        for _ in range(steps):
            subspace.update()
            train(model, optimizer)
        state = through_a_file(subspace.state_dict())
        for asked in (False, True):
            _, other = make_one()
            if asked:
                other.refresh()
            other.load_state_dict(state)
            assert same(other.state_dict(), state)


def test_a_state_shares_no_memory_with_the_basis() -> None:
    """What reads into the tensors of a state, and may fail, changes nothing."""
    subspace = trained()
    before = through_a_file(subspace.state_dict())
    for value in subspace.state_dict().values():
        if isinstance(value, Tensor):
            value.fill_(7)
    assert same(subspace.state_dict(), before)


def test_a_basis_of_lower_precision_is_made_as_exact_as_the_parameters() -> None:
    _, _, single = make(dtype=torch.float32)
    single.update()
    _, _, double = make(dtype=torch.float64)
    double.load_state_dict(single.state_dict())
    rows = double.basis.vectors
    assert (rows @ rows.T - torch.eye(K, dtype=rows.dtype)).abs().max() < 1e-14
    assert (rows - single.basis.vectors).abs().max() < 1e-6


def test_a_basis_that_was_kept_to_a_wider_angle_is_probed_at_the_own_one() -> None:
    model = Quartic()
    wide = so.DominantSubspace(DenseOperator(model), K, max_angle=0.9)
    wide.update()
    narrow = so.DominantSubspace(DenseOperator(model), K, max_angle=0.01)
    narrow.load_state_dict(wide.state_dict())
    for _ in range(5):
        model.weights[0].data.mul_(1.02)
        narrow.update()
        assert narrow.stats.estimate <= 0.01

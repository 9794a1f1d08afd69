"""Trainings of a model whose parameters lie on several ranks, which are threads.

They go where the same training of the whole model goes: the same bases, refreshed at the same
steps, and the same updates; and every rank knows the same numbers, bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.linalg.rows import largest_sine
from subspace_optim.subspaces.class_averages import averaged, check_averages
from subspace_optim.subspaces.put_aside import are_back
from tests.split import Either, SplitInnerProduct, Unsplit, alike, joined, on_ranks, unlocked
from tests.split_model import P, SplitModel, SplitOperator

unlocked(LowRankCurvature)
SPLITS = [[25, 15], [13, 0, 27], [0, 40], [1, 14, 12, 13]]
Made = tuple[SplitModel, so.DominantSubspace]


def made(inner: Either, **options: Any) -> Made:
    model = SplitModel(inner)
    return model, so.DominantSubspace(SplitOperator(model, inner), 3, **options)


def newton(model: SplitModel, subspace: Any) -> Any:
    """Two groups, of different rates."""
    groups = [
        {"params": [model.first], "lr": 0.3, "damping": 0.1},
        {"params": [model.second], "lr": 0.2, "bulk_ratio": 0.1},
    ]
    return so.LowRankNewton(groups, momentum=0.3, subspace=subspace)


def sam(kind: Any, **options: Any) -> Callable[[SplitModel, Any], Any]:
    return lambda model, subspace: kind(
        model.parameters(), lr=0.05, rho=0.1, subspace=subspace, **options
    )


def projected(model: SplitModel, subspace: Any) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    so.project_updates(optimizer, subspace, onto="bulk")
    return optimizer


def jointly(model: SplitModel, subspace: Any) -> Any:
    """Two optimizers, as one to the loop."""
    both = [torch.optim.SGD([model.first], lr=0.05), torch.optim.SGD([model.second], lr=0.03)]
    so.project_updates(both, subspace, onto="bulk")

    class Both:
        def step(self, closure: Callable[[], float]) -> None:
            closure()
            for each in both:
                each.step()

    return Both()


OPTIMIZERS: dict[str, Callable[[SplitModel, Any], Any]] = {
    "DomSGD": lambda m, s: so.DomSGD(m.parameters(), lr=0.05, momentum=0.5, subspace=s),
    "BulkSGD": lambda m, s: so.BulkSGD(m.parameters(), lr=0.05, weight_decay=0.1, subspace=s),
    "newton": newton,
    "DomSAM": sam(so.DomSAM),
    "BulkSAM": sam(so.BulkSAM, adaptive=True),
    "projected": projected,
    "jointly": jointly,
}


REFRESH = {"DomSGD": 2, "DomSAM": 2}
"""Where a training stays in the subspace, what of its drift is outside is rounding, and so is what
``"auto"`` makes of it."""


def trained(inner: Either, name: str, steps: int = 12) -> Any:
    model, subspace = made(inner, refresh=REFRESH.get(name, "auto"))
    make = OPTIMIZERS[name]
    optimizer, angles = make(model, subspace), []
    for _ in range(steps):
        optimizer.step(model.backward)
        angles.append(subspace.stats.estimate or 0.0)
    stats = subspace.stats
    counts = (
        stats.refreshes,
        stats.cold,
        stats.probes,
        stats.looks,
        stats.products,
        subspace.clock,
    )
    return counts, torch.tensor(angles), inner.whole(subspace.basis.vectors), model.theta()


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_goes_where_the_whole_model_goes(name, sizes):
    counts, angles, basis, theta = trained(Unsplit(), name)
    found = on_ranks(sizes, lambda inner: trained(inner, name))
    assert alike([theirs[0] for theirs in found]) == counts
    told = alike([theirs[1] for theirs in found])
    torch.testing.assert_close(told, angles, rtol=1e-4, atol=1e-7)
    assert largest_sine(found[0][2], basis) < 1e-6
    torch.testing.assert_close(found[0][3], theta, rtol=0, atol=1e-8)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", [so.DomSAM, so.BulkSAM])
def test_a_gradient_that_is_not_finite_on_one_rank_stops_sam_on_all(kind, rank):
    def each(inner: SplitInnerProduct) -> int:
        model, subspace = made(inner)
        optimizer, before = sam(kind)(model, subspace), model.theta()

        def closure() -> float:
            loss = model.backward()
            if inner.rank == rank:
                given = model.first if len(model.first) else model.second
                given.grad[0] = math.nan
            return loss

        optimizer.step(closure)
        assert torch.equal(model.theta(), before)
        optimizer.step(model.backward)
        assert not torch.equal(model.theta(), before)
        return subspace.clock

    on_ranks([10, 0, 30] if rank == 2 else [30, 0, 10], each)


def test_a_closure_that_adds_to_the_gradients_of_one_rank_is_refused_on_all():
    """The others have no gradient there yet but zeros, or no elements."""

    def each(inner: SplitInnerProduct) -> bool:
        model, subspace = made(inner)
        optimizer = sam(so.DomSAM)(model, subspace)
        model.backward()
        given = [p.grad.clone() for p in model.parameters()]
        if inner.rank == 0:
            model.second.grad.zero_()

        def closure() -> float:
            pairs = zip(model.parameters(), given, strict=True)
            sum((p * gradient).sum() for p, gradient in pairs).backward()
            return 0.0

        with pytest.raises(so.ArgumentError, match="adds to the gradients"):
            optimizer.step(closure)
        return True

    assert alike(on_ranks([20, 0, 20], each))


@pytest.mark.parametrize("rank", [0, 1])
def test_no_rank_waits_for_an_optimizer_that_is_skipped(rank):
    """A scaler skips the second where a gradient is not finite, perhaps of one rank alone."""

    def each(inner: Either) -> Tensor:
        model, subspace = made(inner)
        both = [torch.optim.SGD([p], lr=0.05) for p in (model.first, model.second)]
        so.project_updates(both, subspace, onto="dominant")
        model.backward()
        if getattr(inner, "rank", rank) == rank:
            model.second.grad[-1] = math.nan
        both[0].step()
        return model.theta()

    expected = each(Unsplit())
    assert bool(expected[-1] != SplitModel(Unsplit()).theta()[-1])  # it was projected
    for theta in on_ranks([20, 20], each):
        torch.testing.assert_close(theta, expected, rtol=0, atol=1e-9)


def test_a_state_is_taken_up_by_each_rank():
    """Each saves the coordinates that lie on it, and goes on as if it had never stopped."""

    def each(inner: Either, *, stops: bool) -> tuple[Any, Tensor]:
        model, subspace = made(inner)
        optimizer = so.BulkSGD(model.parameters(), lr=0.05, subspace=subspace)
        for step in range(10):
            if stops and step == 5:
                state = copy.deepcopy(subspace.state_dict())
                subspace = so.DominantSubspace(SplitOperator(model, inner), 3)
                subspace.load_state_dict(state)
                optimizer.subspace = subspace
            optimizer.step(model.backward)
        return (subspace.stats.refreshes, subspace.stats.products, subspace.clock), model.theta()

    for sizes in SPLITS:
        plain = on_ranks(sizes, lambda inner: each(inner, stops=False))
        resumed = on_ranks(sizes, lambda inner: each(inner, stops=True))
        assert alike([counts for counts, _ in plain + resumed])
        torch.testing.assert_close(resumed[0][1], plain[0][1], rtol=0, atol=1e-12)


def of_classes(inner: Either) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    old, values, size = None, torch.tensor([0.2, 0.1, 0.3, 0.2]).double(), 50
    for _ in range(3):
        gradients = torch.randn(4, size, generator=generator, dtype=torch.float64)
        gradients[1] *= 1e-20  # its squares vanish in float32
        gradients[3] = 0.0
        own = inner.mine(gradients).float()
        old = averaged(old, own, values, torch.tensor([3, 0, 2, 1]), decay=0.9, inner=inner)
        values = values.flip(0)
    assert old is not None
    check_averages(old, 3, torch.float32)
    curvature = old.curvature()
    numbers = [old.norms, old.squares, curvature.eigenvalues, torch.tensor(curvature.largest)]
    return numbers, old.vectors, curvature.orthogonalised().project(old.vectors)


@pytest.mark.parametrize("sizes", [[20, 30], [0, 49, 1]])
def test_class_gradients(sizes):
    numbers, vectors, inside = of_classes(Unsplit())
    found = on_ranks(sizes, of_classes)
    for i, expected in enumerate(numbers):
        value = alike([theirs[0][i] for theirs in found])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    for i, expected in ((1, vectors), (2, inside)):
        rows = joined([theirs[i] for theirs in found])
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_the_span_of_given_vectors(monkeypatch):
    """``FixedSubspace`` of the rows that lie on each rank; what is wrong on one is so on all."""
    from subspace_optim.subspaces import fixed
    from tests.split_model import SplitSpace

    draws = torch.randn(P, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = torch.linalg.qr(draws).Q.T
    inners: dict[int, Either] = {}
    monkeypatch.setattr(
        fixed, "ParameterSpace", lambda model, _: SplitSpace(model, inners[id(model)])
    )

    def each(inner: Either, spoil: Callable[[Tensor], object] = lambda _: None) -> Any:
        model: nn.Module = SplitModel(inner)
        inners[id(model)] = inner
        own = inner.mine(rows) * (1 + 1e-15)
        if getattr(inner, "rank", 0) == 0:
            spoil(own)
        basis = so.FixedSubspace(model, own).update()
        return (basis.size, basis.k), basis.project(inner.mine(rows))

    found = on_ranks([30, 0, 10], each)
    sizes, inside = each(Unsplit())
    assert alike([theirs for theirs, _ in found]) == sizes == (P, 3)
    torch.testing.assert_close(joined([theirs for _, theirs in found]), inside)

    def refused(inner: Either, spoil: Callable[[Tensor], object], message: str) -> bool:
        with pytest.raises(so.ArgumentError, match=message):
            each(inner, spoil)
        return True

    for spoil, message in (
        (lambda own: own[0].fill_(math.nan), "not finite"),
        (lambda own: own[0].mul_(1.1), "orthonormal"),
    ):
        assert alike(on_ranks([30, 0, 10], lambda inner, *a: refused(inner, spoil, message)))  # noqa: B023


@pytest.mark.parametrize("sizes", [[30, 10], [5, 35], [0, 40]])
def test_parameters_that_are_back_are_so_on_all_ranks(sizes):
    """Also where those of one rank alone have not come back, or have."""
    theta, way, off = torch.randn(3, P, generator=torch.Generator().manual_seed(0))
    off[5:] = 0.0
    for near, back in ((0.3, True), (0.8, False)):
        others = theta + way, theta + near * off * way.norm() / off.norm()

        def each(inner: Either, others: Any = others) -> bool:
            return are_back(*(inner.mine(v) for v in (theta, *others)), inner)

        assert alike(on_ranks(sizes, each)) is each(Unsplit()) is back

"""`LowRankNewton` and `ClassGradientQuasiNewton`: one formula, beside plain float64 loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim.curvature import ParameterSpace
from subspace_optim.linalg import EigenBasis
from tests.dense import symmetric
from tests.optim.naive import (
    DenseOperator,
    GivenSubspace,
    Quartic,
    assert_near,
    exact,
    flat,
    relative_gap,
)


def newton(
    problem: Quartic,
    theta: Tensor,
    groups: Sequence[tuple[Tensor, float, float, float]],
    *,
    momentum: float,
    k: int,
    steps: int,
) -> list[Tensor]:
    """θ_0, θ_1, …: each group has indices, rate inside, rate outside and damping."""
    path, buffer = [theta], torch.zeros_like(theta)
    for _ in range(steps):
        buffer = momentum * buffer + problem.gradient(theta)
        values, columns = torch.linalg.eigh(problem.hessian(theta))
        update = torch.zeros_like(theta)
        for where, inside, outside, damping in groups:
            used = [
                i
                for i in range(len(values) - k, len(values))
                if values[i] + damping > 2.2e-16 * values.abs()[-k:].max()
            ]
            U = columns[:, used]
            dominant = U @ (U.T @ buffer)
            solved = U @ ((U.T @ buffer) / (values[used] + damping))
            update[where] = -(inside * solved + outside * (buffer - dominant))[where]
        theta = theta + update
        path.append(theta)
    return path


class Quadratic(nn.Module):
    """½ (θ − m)ᵀ A (θ − m), with the minimum m."""

    def __init__(self, eigenvalues: Sequence[float]) -> None:
        super().__init__()
        self.A = symmetric(torch.tensor(eigenvalues), 0)
        self.m = torch.linspace(-1, 1, len(self.A), dtype=torch.float64)
        self.theta = nn.Parameter(torch.full_like(self.m, 2.0))

    def forward(self) -> Tensor:
        return (self.theta - self.m) @ self.A @ (self.theta - self.m) / 2

    def hessian(self, _: Tensor) -> Tensor:
        return self.A


def held(model: nn.Module, basis: Any) -> GivenSubspace:
    return GivenSubspace(ParameterSpace(model), basis)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model().backward()
    optimizer.step()


# Beside a naive implementation.


@settings(max_examples=40)
@given(
    data=st.data(),
    momentum=st.sampled_from([0.0, 0.9]),
    bulk_ratio=st.sampled_from([0.0, 0.3]),
    damping=st.sampled_from([0.0, 0.5]),
)
def test_low_rank_newton_equals_the_formula(
    data: st.DataObject, momentum: float, bulk_ratio: float, damping: float
) -> None:
    shapes = data.draw(st.sampled_from([((4,), ()), ((2, 3), (2,), ()), ((1, 2, 2), (1,), (5,))]))
    model = Quartic(shapes, seed=data.draw(st.integers(0, 10_000)))
    theta = flat(model.parameters())
    k = data.draw(st.integers(1, len(theta)))
    steps = data.draw(st.integers(3, 6))
    rates = [data.draw(st.floats(0.01, 0.3)) for _ in model.weights]
    pieces = torch.arange(len(theta)).split([p.numel() for p in model.weights])
    groups = [(w, r, r * bulk_ratio, damping) for w, r in zip(pieces, rates, strict=True)]
    path = newton(model, theta, groups, momentum=momentum, k=k, steps=steps)
    assume(all(float(point.norm()) < 50 for point in path))
    for point in path:
        values = torch.linalg.eigvalsh(model.hessian(point)) + damping
        assume(relative_gap(model.hessian(point), k) > 1e-3)
        assume(bool((values.abs() > 1e-2).all()))  # else a rounding error decides on 1/λ

    optimizer = so.LowRankNewton(
        [{"params": [p], "lr": r} for p, r in zip(model.weights, rates, strict=True)],
        bulk_ratio=bulk_ratio,
        damping=damping,
        momentum=momentum,
        subspace=exact(model, k),
    )
    for expected in path[1:]:
        step(model, optimizer)
        assert_near(flat(model.parameters()), expected, 1e-8)


@pytest.mark.parametrize("orthogonal", [False, True], ids=["any angle", "orthogonal"])
@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "momentum"])
def test_the_quasi_newton_update_is_equation_15(orthogonal: bool, momentum: float) -> None:
    """With vectors of any angle: θ − ηd − Σ (1/λ_k − η)(v_kᵀd) v_k, term by term."""
    model = Quartic()
    random = torch.Generator().manual_seed(0)
    size, classes, lr = 9, 4, 0.02
    vectors = torch.randn(classes, size, generator=random, dtype=torch.float64)
    if orthogonal:
        vectors = torch.linalg.qr(vectors.T).Q.T.contiguous()
        values = torch.tensor([9.0, 6.0, 4.0, 3.0], dtype=torch.float64)
        basis: Any = EigenBasis(values, vectors, torch.zeros_like(values))
    else:
        vectors /= vectors.norm(dim=1, keepdim=True)
        values = torch.tensor([4.0, 9.0, 3.0, 6.0], dtype=torch.float64)
        basis = so.LowRankCurvature(values, vectors)
    optimizer = so.ClassGradientQuasiNewton(
        model.parameters(),
        lr=lr,
        momentum=momentum,
        subspace=held(model, basis),
    )
    theta = flat(model.parameters())
    buffer = torch.zeros_like(theta)
    for _ in range(6):
        buffer = momentum * buffer + model.gradient(theta)
        expected = theta - lr * buffer
        for value, v in zip(values, vectors, strict=True):
            expected = expected - (1 / value - lr) * (v @ buffer) * v
        step(model, optimizer)
        theta = expected
        assert_near(flat(model.parameters()), theta, 1e-12)


# Identities.


def test_one_full_step_solves_a_quadratic() -> None:
    model = Quadratic([5.0, 3.0, 1.0, 0.5, 0.1])
    subspace = so.DominantSubspace(DenseOperator(model), 5, tol=1e-12)  # type: ignore[arg-type]
    step(model, so.LowRankNewton(model.parameters(), subspace=subspace))
    torch.testing.assert_close(model.theta.detach(), model.m, rtol=0, atol=1e-12)


def test_equation_11_moves_in_the_subspace_alone_and_solves_there() -> None:
    model = Quadratic([5.0, 3.0, 1.0, 0.5, 0.1])
    vectors = torch.linalg.eigh(model.A).eigenvectors.T
    before = vectors @ (model.theta.detach() - model.m)
    subspace = so.DominantSubspace(DenseOperator(model), 2, tol=1e-12)  # type: ignore[arg-type]
    step(model, so.LowRankNewton(model.parameters(), subspace=subspace))
    after = vectors @ (model.theta.detach() - model.m)
    torch.testing.assert_close(after[:3], before[:3], rtol=1e-10, atol=1e-12)
    assert float(after[3:].abs().max()) < 1e-12


def test_equation_15_is_equation_11_and_sgd_in_the_complement() -> None:
    """Three optimizers of one basis: quasi-Newton, Newton with a bulk rate, Newton + BulkSGD."""
    moves = {}
    lr = 0.03
    for name in ("quasi", "newton", "eq11", "bulk"):
        model = Quartic()
        subspace = so.DominantSubspace(DenseOperator(model), 2, tol=1e-12)
        parameters = list(model.parameters())
        optimizer: torch.optim.Optimizer
        if name == "quasi":
            optimizer = so.ClassGradientQuasiNewton(parameters, lr=lr, subspace=subspace)
        elif name == "newton":
            optimizer = so.LowRankNewton(parameters, lr=1.0, bulk_ratio=lr, subspace=subspace)
        elif name == "eq11":
            optimizer = so.LowRankNewton(parameters, subspace=subspace)
        else:
            optimizer = so.BulkSGD(parameters, lr=lr, subspace=subspace)
        before = flat(parameters)
        step(model, optimizer)
        moves[name] = flat(parameters) - before
    assert_near(moves["quasi"], moves["newton"], 1e-12)
    assert_near(moves["quasi"], moves["eq11"] + moves["bulk"], 1e-12)


@pytest.mark.parametrize("damping", [0.0, 2.0])
def test_directions_in_which_newton_would_climb_belong_to_the_complement(damping: float) -> None:
    """λ = 5, 1, 0, −1, −1.5, …: without damping the first two are solved for, with it the first
    five; the others go at SGD's rate."""
    model = Quadratic([5.0, 1.0, 0.0, -1.0, -1.5, -3.0])
    values, columns = torch.linalg.eigh(model.A)
    values, vectors = values.flip(0), columns.T.flip(0)
    slopes = vectors @ (model.A @ (model.theta.detach() - model.m))
    before = vectors @ model.theta.detach()
    subspace = so.DominantSubspace(DenseOperator(model), 6, tol=1e-12)  # type: ignore[arg-type]
    step(
        model,
        so.LowRankNewton(model.parameters(), damping=damping, bulk_ratio=0.1, subspace=subspace),
    )
    moved = vectors @ model.theta.detach() - before
    inside = 2 if damping == 0 else 5
    factors = torch.full_like(values, 0.1)
    factors[:inside] = 1 / (values[:inside] + damping)
    torch.testing.assert_close(moved, -factors * slopes, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_a_negative_spectrum_leaves_sgd(damping: float) -> None:
    """With a damping of 1, λ_1 + δ is 0 up to rounding."""
    model = Quadratic([-1.0, -2.0, -3.0])
    subspace = so.DominantSubspace(DenseOperator(model), 2, tol=1e-12)  # type: ignore[arg-type]
    slope = model.A @ (model.theta.detach() - model.m)
    before = model.theta.detach().clone()
    options = {"bulk_ratio": 0.1, "damping": damping}
    step(model, so.LowRankNewton(model.parameters(), **options, subspace=subspace))
    torch.testing.assert_close(model.theta.detach(), before - 0.1 * slope, rtol=1e-12, atol=1e-12)


def test_the_newton_rate_follows_the_schedule_of_lr_from_its_first_value() -> None:
    """Half the rate is half the move, inside and outside; a group counts from its own rate."""
    moves = []
    for factor in (1.0, 0.5):
        model = Quartic(((4,), (5,)))
        subspace = so.DominantSubspace(DenseOperator(model), 3, tol=1e-12)
        first, second = model.weights
        groups = [{"params": [first], "lr": 0.1}, {"params": [second], "lr": 0.4}]
        optimizer = so.ClassGradientQuasiNewton(groups, newton_lr=0.7, subspace=subspace)
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1 * factor, 0.4 * factor]
        before = flat(model.parameters())
        step(model, optimizer)
        moves.append(flat(model.parameters()) - before)
    assert_near(2 * moves[1], moves[0], 1e-12)


def test_lr_of_the_quasi_newton_method_starts_above_zero() -> None:
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 3)
    with pytest.raises(so.ArgumentError, match=r"lr is 0.* above 0.*schedule may go to 0 later"):
        so.ClassGradientQuasiNewton(model.parameters(), lr=0.0, subspace=subspace)
    optimizer = so.ClassGradientQuasiNewton(model.parameters(), lr=0.1, subspace=subspace)
    optimizer.param_groups[0]["lr"] = 0.0
    before = flat(model.parameters())
    step(model, optimizer)
    assert torch.equal(flat(model.parameters()), before)
    resumed = so.ClassGradientQuasiNewton(model.parameters(), lr=0.3, subspace=subspace)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["first_lr"] == 0.1


def test_a_basis_that_does_not_fit_is_refused_before_anything_moves() -> None:
    model = Quartic()
    before = flat(model.parameters())
    for rows in (torch.eye(9)[:2], torch.eye(8, dtype=torch.float64)[:2]):
        ones = torch.ones(2, dtype=rows.dtype)
        subspace = held(model, EigenBasis(ones, rows, ones))
        plain = torch.optim.Adam(model.parameters())
        handle = so.project_updates(plain, subspace, "bulk")
        optimizers = [
            plain,
            so.BulkSGD(model.parameters(), lr=0.1, momentum=0.9, subspace=subspace),
            so.LowRankNewton(model.parameters(), momentum=0.9, subspace=subspace),
        ]
        for optimizer in optimizers:
            with pytest.raises(so.ArgumentError, match="size, dtype and device of the subspace's"):
                step(model, optimizer)
            assert not optimizer.state
        handle.remove()
    assert torch.equal(flat(model.parameters()), before)


def test_what_has_no_projector_is_refused_where_one_is_needed() -> None:
    model = Quartic()
    vectors = torch.eye(9, dtype=torch.float64)[:2]
    values = torch.ones(2, dtype=torch.float64)
    subspace = held(model, so.LowRankCurvature(values, vectors))
    before = flat(model.parameters())
    known = so.ClassGradientSubspace(nn.Linear(2, 2), 2)
    weights = known.parameters.tensors
    for make in (
        so.DomSGD,
        so.BulkSAM,
        lambda p, subspace: so.project_updates(torch.optim.SGD(p), subspace, "bulk"),
    ):
        with pytest.raises(so.ArgumentError, match="orthogonal=True"):
            make(weights, subspace=known)
    for cls in (so.DomSGD, so.BulkSGD):
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9, subspace=subspace)  # type: ignore[arg-type]
        with pytest.raises(so.ArgumentError, match="orthogonal=True"):
            step(model, optimizer)
        assert not optimizer.state
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("name", ["quasi", "newton"])
def test_a_basis_without_pairs_leaves_sgd(name: str) -> None:
    """What is left of class gradients whose curvature vanished."""
    model = Quartic()
    empty = torch.zeros(0, dtype=torch.float64)
    subspace = held(model, EigenBasis(empty, torch.zeros(0, 9, dtype=torch.float64), empty))
    optimizer: torch.optim.Optimizer
    if name == "quasi":
        optimizer = so.ClassGradientQuasiNewton(
            model.parameters(), lr=0.1, momentum=0.0, damping=1.0, subspace=subspace
        )
    else:
        optimizer = so.LowRankNewton(model.parameters(), lr=1.0, bulk_ratio=0.1, subspace=subspace)
    theta = flat(model.parameters())
    step(model, optimizer)
    assert_near(flat(model.parameters()), theta - 0.1 * model.gradient(theta), 1e-14)


def test_a_class_that_was_never_seen_does_not_change_the_others() -> None:
    """Its λ of 1 stands for nothing: those of the others may be far below the dtype's epsilon."""
    moves = []
    for extra in (0, 1):
        model = Quartic()
        rows = torch.eye(9, dtype=torch.float64)[:2]
        rows = torch.cat([rows, torch.zeros(extra, 9, dtype=torch.float64)])
        values = torch.tensor([2e-18, 1e-18, 1.0][: 2 + extra], dtype=torch.float64)
        optimizer = so.ClassGradientQuasiNewton(
            model.parameters(),
            lr=0.1,
            newton_lr=1e-18,
            momentum=0.0,
            subspace=held(model, so.LowRankCurvature(values, rows)),
        )
        before = flat(model.parameters())
        step(model, optimizer)
        moves.append(flat(model.parameters()) - before)
    assert torch.equal(moves[0], moves[1])
    assert float(moves[0][0] / -model.gradient(before)[0]) == pytest.approx(0.5)

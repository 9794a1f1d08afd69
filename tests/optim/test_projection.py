"""`project_updates`: plain optimizers whose displacement is projected by dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from tests.optim.naive import (
    DenseOperator,
    Quartic,
    assert_near,
    exact,
    flat,
    projector,
    relative_gap,
)

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def displaced(
    model: Quartic, optimizers: list[torch.optim.Optimizer], part: str, k: int, **step: Any
) -> Tensor:
    """Steps plain optimizers, writes the projected displacement, and returns θ."""
    theta = flat(model.parameters())
    dominant = projector(model.hessian(theta), k)
    for each in optimizers:
        each.step(**step)
    moved = flat(model.parameters()) - theta
    theta = theta + (dominant @ moved if part == "dominant" else moved - dominant @ moved)
    write(model, theta)
    return theta


def write(model: nn.Module, theta: Tensor) -> None:
    with torch.no_grad():
        pieces = theta.split([p.numel() for p in model.parameters()])
        for p, piece in zip(model.parameters(), pieces, strict=True):
            p.copy_(piece.view(p.shape))


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model().backward()


@settings(max_examples=40)
@given(
    data=st.data(),
    name=st.sampled_from(sorted(OPTIMIZERS)),
    part=st.sampled_from(["dominant", "bulk"]),
)
def test_steps_equal_the_dense_projection(data: st.DataObject, name: str, part: str) -> None:
    shapes = data.draw(st.sampled_from([((4,), ()), ((2, 3), (2,), ()), ((1, 2, 2), (1,), (5,))]))
    seed = data.draw(st.integers(0, 10_000))
    plain, model = Quartic(shapes, seed=seed), Quartic(shapes, seed=seed)
    k = data.draw(st.integers(1, flat(plain.parameters()).numel()))
    reference = [OPTIMIZERS[name](plain.parameters())]
    path = []
    for _ in range(data.draw(st.integers(3, 8))):
        assume(relative_gap(plain.hessian(flat(plain.parameters())), k) > 1e-3)
        backward(plain)
        path.append(displaced(plain, reference, part, k))
    assume(all(float(point.norm()) < 50 for point in path))

    optimizer = OPTIMIZERS[name](model.parameters())
    so.project_updates(optimizer, exact(model, k), part)  # type: ignore[arg-type]
    for expected in path:
        backward(model)
        optimizer.step()
        assert_near(flat(model.parameters()), expected, 1e-8)


@pytest.mark.parametrize("part", ["dominant", "bulk"])
def test_sgd_projected_is_our_own(part: str) -> None:
    models = [Quartic() for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
    subspaces = [exact(model, 3) for model in models]
    cls = {"dominant": so.DomSGD, "bulk": so.BulkSGD}[part]
    optimizers = [
        torch.optim.SGD(models[0].parameters(), **options),
        cls(models[1].parameters(), **options, subspace=subspaces[1]),
    ]
    so.project_updates(optimizers[0], subspaces[0], part)  # type: ignore[arg-type]
    for _ in range(8):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model)
            optimizer.step()
    assert_near(flat(models[0].parameters()), flat(models[1].parameters()), 1e-12)


@pytest.mark.parametrize("part", ["dominant", "bulk"])
@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
def test_lbfgs_projects_the_whole_displacement_and_forgets_its_pairs(
    part: str, line_search_fn: str | None
) -> None:
    """The dense version begins with a new LBFGS at every step: it has nothing to remember."""
    plain, model = Quartic(), Quartic()

    def make(m: nn.Module) -> torch.optim.LBFGS:
        return torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=5, line_search_fn=line_search_fn)

    def closure_of(m: nn.Module) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            backward(m)
            return m()

        return closure

    optimizer = make(model)
    so.project_updates(optimizer, exact(model, 3), part)  # type: ignore[arg-type]
    for _ in range(6):
        expected = displaced(plain, [make(plain)], part, 3, closure=closure_of(plain))
        optimizer.step(closure_of(model))
        assert_near(flat(model.parameters()), expected, 1e-8)


class Two(Quartic):
    """A matrix for Muon and the rest for AdamW."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        matrix, *rest = self.weights
        return [torch.optim.Muon([matrix], lr=0.05), torch.optim.AdamW(rest, lr=0.02)]


@pytest.mark.parametrize("part", ["dominant", "bulk"])
@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
def test_optimizers_that_share_the_parameters_are_projected_jointly(
    part: str, reverse: bool
) -> None:
    plain, model = Two(), Two()
    reference, optimizers = plain.optimizers(), model.optimizers()
    subspace = exact(model, 3)
    so.project_updates(optimizers, subspace, part)  # type: ignore[arg-type]
    # Muon computes in bfloat16: the same numbers go in, so the same come out.
    for _ in range(5):
        backward(plain)
        expected = displaced(plain, reference, part, 3)
        backward(model)
        for optimizer in reversed(optimizers) if reverse else optimizers:
            optimizer.step()
        assert_near(flat(model.parameters()), expected, 1e-6)
        write(model, expected)
    assert subspace.refreshes == 5


@pytest.mark.parametrize("monitor_first", [False, True], ids=["monitor last", "monitor first"])
def test_a_monitor_sees_the_projected_update_whatever_came_first(monitor_first: bool) -> None:
    model = Quartic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    subspace = so.DominantSubspace(DenseOperator(model), 3, refresh=1, tol=1e-12)
    if monitor_first:
        monitor = so.Monitor(optimizer, subspace)
        so.project_updates(optimizer, subspace, "dominant")
    else:
        so.project_updates(optimizer, subspace, "dominant")
        monitor = so.Monitor(optimizer, subspace)
    for _ in range(4):
        backward(model)
        optimizer.step()
    assert monitor.history["chi_update"] == pytest.approx([1.0] * 4)
    assert subspace.stats.refreshes == 4


def test_a_joint_step_of_which_one_part_is_skipped_is_projected_as_far_as_it_went() -> None:
    """Muon alone steps twice, as it does if a scaler skips AdamW: each move is projected."""
    model = Two()
    optimizers = model.optimizers()
    subspace = so.DominantSubspace(DenseOperator(model), 3, refresh=1, tol=1e-12)
    so.project_updates(optimizers, subspace, "bulk")
    start = flat(model.parameters())
    dominant = projector(model.hessian(start), 3)
    backward(model)
    optimizers[0].step()
    assert float((dominant @ (flat(model.parameters()) - start)).norm()) > 1e-3
    backward(model)
    seen = []
    optimizers[0].register_step_pre_hook(lambda *_: seen.append(flat(model.parameters())))
    optimizers[0].step()  # the round before ends here
    optimizers[1].step()
    moved = seen[0] - start
    assert float((dominant @ moved).norm()) < 1e-8 * float(moved.norm())
    assert subspace.stats.refreshes == 2


def test_what_the_scaler_skips_inside_a_fused_step_costs_nothing() -> None:
    model = Quartic(dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    subspace = so.DominantSubspace(DenseOperator(model), 3, refresh=1, tol=1e-5)
    so.project_updates(optimizer, subspace, "bulk")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = flat(model.parameters())
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(model()).backward()
        if bad:
            model.weights[0].grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(model.parameters()), before) == bad
        assert subspace.stats.refreshes == (0 if bad else 1)
    assert scaler.get_scale() == 4.0


def test_removed_it_is_the_plain_optimizer_bit_for_bit() -> None:
    models = [Quartic() for _ in range(2)]
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in models]
    subspace = so.DominantSubspace(DenseOperator(models[0]), 3)
    handle = so.project_updates(optimizers[0], subspace, "bulk")
    handle.remove()
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model)
            optimizer.step()
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))
    assert subspace.stats.refreshes == 0


def test_a_basis_that_fails_leaves_the_parameters_alone() -> None:
    model = Quartic()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    operator = DenseOperator(model)
    subspace = so.DominantSubspace(operator, 3, refresh=1, tol=1e-12)
    so.project_updates(optimizer, subspace, "bulk")
    before = flat(model.parameters())
    operator.failure = RuntimeError("out of memory")
    backward(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert torch.equal(flat(model.parameters()), before)
    assert not optimizer.state
    operator.failure = None
    dominant = projector(model.hessian(before), 3)
    optimizer.step()
    moved = flat(model.parameters()) - before
    assert float((dominant @ moved).norm()) < 1e-8 * float(moved.norm())


def test_bad_arguments_are_named_with_the_way_out() -> None:
    model = Two()
    muon, adamw = model.optimizers()
    subspace = so.DominantSubspace(DenseOperator(model), 3)
    with pytest.raises(so.ArgumentError, match=r"onto is 'top', but must be 'dominant' or 'bulk'"):
        so.project_updates([muon, adamw], subspace, "top")  # type: ignore[arg-type]
    with pytest.raises(so.ArgumentError, match=r"weights.1' of the operator .*\[muon, adamw\]"):
        so.project_updates(muon, subspace, "bulk")
    with pytest.raises(so.ArgumentError, match="optimizer is 'int'"):
        so.project_updates(3, subspace, "bulk")  # type: ignore[arg-type]
    with pytest.raises(so.ArgumentError, match="of another model"):
        so.project_updates(torch.optim.SGD(Two().parameters(), lr=0.1), subspace, "bulk")
    with pytest.raises(so.ArgumentError, match="subspace is 'type'"):
        so.project_updates([muon, adamw], so.DominantSubspace, "bulk")  # type: ignore[arg-type]
    extra = nn.Parameter(torch.zeros(2))
    muon_and_more = torch.optim.SGD([*model.parameters(), extra], lr=0.1)
    with pytest.raises(so.ArgumentError, match=r"shape \(2,\) is 'of another model'"):
        so.project_updates(muon_and_more, subspace, "bulk")
    assert all(not each._optimizer_step_pre_hooks for each in (muon, adamw))

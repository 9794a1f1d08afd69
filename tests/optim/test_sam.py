"""`SAM`, `DomSAM` and `BulkSAM`: the formula beside plain float64 loops, and their two passes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import subspace_optim as so
from tests.optim.naive import (
    OPTIONS,
    DenseOperator,
    Landscape,
    Quartic,
    assert_near,
    descend,
    exact,
    flat,
    landscape,
    relative_gap,
)

CLASSES = {"dominant": so.DomSAM, "bulk": so.BulkSAM, "all": so.SAM}


def make(part: str, model: Quartic, groups: Any, k: int, **options: Any) -> Any:
    if part == "all":
        return so.SAM(groups, **options)
    return CLASSES[part](groups, **options, subspace=exact(model, k))


def sharpened(
    problem: Landscape | Quartic, rho: float | Tensor, *, adaptive: bool, maximize: bool
) -> Landscape:
    """The same landscape with the gradient of SAM in the place of its own."""

    def gradient(theta: Tensor) -> Tensor:
        g = problem.gradient(theta)
        scale = theta.abs() if adaptive else torch.ones_like(theta)
        ascent = rho * scale**2 * g / (scale * g).norm()
        return problem.gradient(theta - ascent if maximize else theta + ascent)

    return Landscape(problem.loss, gradient, problem.hessian)


def closure_of(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return closure


# Beside naive implementations.


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.9]))
    return OPTIONS | {
        "lr": draw(st.floats(1e-3, 0.05)),
        "momentum": momentum,
        "weight_decay": draw(st.sampled_from([0.0, 0.5])),
        "nesterov": momentum > 0 and draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }


@settings(max_examples=40)
@given(
    data=st.data(),
    part=st.sampled_from(sorted(CLASSES)),
    rho=st.floats(0, 0.5),
    adaptive=st.booleans(),
    two_calls=st.booleans(),
)
def test_steps_equal_the_formula(
    data: st.DataObject, part: str, rho: float, adaptive: bool, two_calls: bool
) -> None:
    shapes = data.draw(st.sampled_from([((4,), ()), ((2, 3), (2,), ()), ((1, 2, 2), (1,), (5,))]))
    model = Quartic(shapes, seed=data.draw(st.integers(0, 10_000)))
    chosen = data.draw(options())
    theta = flat(model.parameters())
    k = data.draw(st.integers(1, len(theta)))
    steps = data.draw(st.integers(3, 8))
    problem = sharpened(model, rho, adaptive=adaptive, maximize=chosen["maximize"])
    groups = [(torch.arange(len(theta)), chosen)]
    try:
        path = descend(problem, theta, groups, part=part, k=k, steps=steps)
    except (ValueError, torch.linalg.LinAlgError):  # no gap, or ascent to infinity
        assume(False)
    assume(all(float(point.norm()) < 50 for point in path))
    assume(all(relative_gap(model.hessian(point), k) > 1e-3 for point in path))

    optimizer = make(part, model, model.parameters(), k, rho=rho, adaptive=adaptive, **chosen)
    closure = closure_of(model, optimizer)
    for expected in path[1:]:
        if two_calls:
            closure()
            optimizer.first_step(zero_grad=True)
            model().backward()
            optimizer.second_step()
        else:
            optimizer.step(closure)
        assert_near(flat(model.parameters()), expected, 1e-8)


@pytest.mark.parametrize("part", CLASSES)
def test_steps_of_a_network_equal_the_formula(part: str) -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, y = torch.randn(10, 3).double(), torch.randint(2, (10,))
    chosen = OPTIONS | {"lr": 0.2, "momentum": 0.8}
    theta = flat(model.parameters())
    whole = landscape(model, nn.functional.cross_entropy, x, y)
    problem = sharpened(whole, 0.1, adaptive=False, maximize=False)
    groups = [(torch.arange(len(theta)), chosen)]
    path = descend(problem, theta, groups, part=part, k=2, steps=5)
    hessian = so.HessianOperator(model, nn.functional.cross_entropy, (x, y))
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=1e-12)
    extra = {} if part == "all" else {"subspace": subspace}
    optimizer = CLASSES[part](model.parameters(), rho=0.1, **chosen, **extra)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for expected in path[1:]:
        optimizer.step(closure)
        assert_near(flat(model.parameters()), expected, 1e-8)


def test_two_gradients_written_out_by_hand() -> None:
    """L = ½(a² + 4b²) at (1, 1): g = (1, 4), ‖g‖ = √17, and then g at θ + ρg/‖g‖."""

    class Bowl(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self) -> Tensor:
            return (self.theta[0] ** 2 + 4 * self.theta[1] ** 2) / 2

    model = Bowl()
    optimizer = so.SAM(model.parameters(), lr=0.1, rho=0.5)
    optimizer.step(closure_of(model, optimizer))
    root = math.sqrt(17)
    expected = [1 - 0.1 * (1 + 0.5 / root), 1 - 0.1 * 4 * (1 + 0.5 * 4 / root)]
    torch.testing.assert_close(model.theta.tolist(), expected, rtol=1e-14, atol=0)


def test_at_the_edge_of_sam_a_quadratic_bounces_between_two_points() -> None:
    """ηλ(1 + ρλ/‖g‖) = 2 at the start, so that θ goes to −θ and back (DESIGN of the SAM-edge)."""
    model = nn.Linear(1, 1, bias=False).double()
    sharpness, rho, start = 3.0, 0.2, 0.7
    slope = sharpness * start
    lr = 2 / (sharpness * (1 + rho * sharpness / slope))
    with torch.no_grad():
        model.weight.fill_(start)
    optimizer = so.SAM(model.parameters(), lr=lr, rho=rho)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sharpness * model.weight.square().sum() / 2
        loss.backward()
        return loss

    for step in range(6):
        assert model.weight.item() == pytest.approx(start * (-1) ** step, rel=1e-12)
        optimizer.step(closure)


# Identities.


@pytest.mark.parametrize("part", CLASSES)
def test_without_a_radius_it_is_sgd_or_its_projection(part: str) -> None:
    models = [Quartic() for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    optimizer = make(part, models[0], models[0].parameters(), 3, rho=0.0, **options)
    plain: torch.optim.Optimizer
    if part == "all":
        plain = torch.optim.SGD(models[1].parameters(), **options)
    else:
        cls = {"dominant": so.DomSGD, "bulk": so.BulkSGD}[part]
        plain = cls(models[1].parameters(), **options, subspace=exact(models[1], 3))
    for _ in range(5):
        optimizer.step(closure_of(models[0], optimizer))
        plain.step(closure_of(models[1], plain))
    assert_near(flat(models[0].parameters()), flat(models[1].parameters()), 1e-14)


def test_dominant_and_bulk_update_add_up_to_that_of_sam() -> None:
    moves = {}
    for part in CLASSES:
        model = Quartic()
        before = flat(model.parameters())
        optimizer = make(part, model, model.parameters(), 3, rho=0.3, lr=0.1)
        optimizer.step(closure_of(model, optimizer))
        moves[part] = flat(model.parameters()) - before
    assert_near(moves["dominant"] + moves["bulk"], moves["all"], 1e-12)
    assert min(float(move.norm()) for move in moves.values()) > 1e-3


def test_each_group_has_its_radius_and_the_norm_is_over_all_of_them() -> None:
    model = Quartic(((2,), (3,)))
    theta = flat(model.parameters())
    rho = torch.tensor([0.1, 0.1, 0.4, 0.4, 0.4], dtype=torch.float64)
    problem = sharpened(model, rho, adaptive=False, maximize=False)
    everything = [(torch.arange(5), OPTIONS)]
    expected = descend(problem, theta, everything, part="all", k=1, steps=1)[1]
    groups = [{"params": [p], "rho": r} for p, r in zip(model.weights, (0.1, 0.4), strict=True)]
    optimizer = so.SAM(groups, lr=OPTIONS["lr"])
    optimizer.step(closure_of(model, optimizer))
    assert_near(flat(model.parameters()), expected, 1e-13)


# Two passes.


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("bad_pass", [0, 1], ids=["first pass", "second pass"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("two_calls", [False, True], ids=["step", "two calls"])
def test_a_gradient_that_is_not_finite_leaves_everything_as_it_was(
    part: str, bad_pass: int, bad: float, two_calls: bool
) -> None:
    model = Quartic(dtype=torch.float32)
    optimizer = make(part, model, model.parameters(), 2, rho=0.3, lr=0.1, momentum=0.9)
    optimizer.step(closure_of(model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    passes: list[int] = []
    hooked: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        if len(passes) == bad_pass:
            next(model.parameters()).grad[0] = bad
        passes.append(1)
        return loss

    if two_calls:
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()
        assert not hooked, "a step that was skipped is no step"
    else:
        optimizer.step(closure)
        assert len(passes) == bad_pass + 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for number, buffers in optimizer.state_dict()["state"].items():
        assert torch.equal(buffers["momentum_buffer"], state[number]["momentum_buffer"])
    passes.extend([1, 1])
    optimizer.step(closure_of(model, optimizer))  # and on it goes
    assert not all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_an_error_in_the_second_pass_puts_the_parameters_back() -> None:
    model = Quartic()
    optimizer = so.SAM(model.parameters(), lr=0.1, rho=0.3)
    before = flat(model.parameters())
    calls: list[int] = []

    def closure() -> Tensor:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return closure_of(model, optimizer)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    optimizer.step(closure_of(model, optimizer))


def test_a_gradient_of_zero_gives_no_perturbation() -> None:
    model = nn.Linear(2, 1, bias=False)
    seen = []
    optimizer = so.SAM(model.parameters(), lr=0.1, rho=0.3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0 * model.weight.sum()
        loss.backward()
        seen.append(model.weight.detach().clone())
        return loss

    optimizer.step(closure)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(model.weight, seen[0])


def test_the_scale_of_the_first_gradient_does_not_matter() -> None:
    moved = []
    for scale in (1.0, 2.0**16):
        model = Quartic()
        optimizer = so.SAM(model.parameters(), lr=0.1, rho=0.3)
        (scale * model()).backward()
        optimizer.first_step(zero_grad=True)
        moved.append(flat(model.parameters()))
    assert_near(moved[1], moved[0], 1e-14)


def test_calls_out_of_order_say_what_is_missing() -> None:
    model = Quartic()
    optimizer = so.SAM(model.parameters(), lr=0.1)
    model().backward()
    with pytest.raises(RuntimeError, match=r"without first_step\(\)"):
        optimizer.second_step()
    with pytest.raises(RuntimeError, match=r"gradient at two points: call step\(closure\)"):
        optimizer.step()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"second_step\(\) has to follow"):
        optimizer.first_step()


def test_the_basis_is_that_of_the_point_it_steps_from() -> None:
    """One refresh a step, at θ_t, which a monitor that asks there shares."""
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 2, refresh=1, tol=1e-12)
    optimizer = so.DomSAM(model.parameters(), lr=0.1, rho=0.5, subspace=subspace)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(4):
        optimizer.step(closure_of(model, optimizer))
    assert subspace.stats.refreshes == 4
    assert len(monitor.history["step"]) == 4
    assert min(monitor.history["chi_update"]) == pytest.approx(1)


@pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
def test_complex_parameters_step_as_their_moduli_say(adaptive: bool) -> None:
    """L = |z|²/2 at z = 3 + 4i: g = z, |g| = 5, and |z|² g / ‖|z| g‖ is 5 times as long."""
    z = nn.Parameter(torch.tensor([3.0 + 4.0j], dtype=torch.complex128))
    optimizer = so.SAM([z], lr=0.1, rho=0.5, adaptive=adaptive)
    for _ in range(2):
        z.grad = z.detach().clone()
        optimizer.first_step() if optimizer._before is None else optimizer.second_step()
    factor = 1 - 0.1 * (1 + 0.5 * (5 if adaptive else 1) / 5)
    torch.testing.assert_close(
        z.detach(), factor * torch.tensor([3.0 + 4.0j]).to(z), rtol=1e-12, atol=0
    )
    before = z.detach().clone()
    z.grad = torch.tensor([complex(1.0, math.inf)], dtype=torch.complex128)
    optimizer.first_step()
    optimizer.second_step()
    assert torch.equal(z, before)


def test_put_back_undoes_a_first_step_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = so.SAM(model.parameters(), lr=0.1, rho=0.5)
    model(torch.randn(4, 3)).square().mean().backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.put_back()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.first_step()
    assert not any(map(torch.equal, model.parameters(), before))
    optimizer.put_back()
    assert all(map(torch.equal, model.parameters(), before))
    with pytest.raises(RuntimeError, match="without first_step"):
        optimizer.second_step()

"""Optimizers that are wrapped, or step another one: what is followed is the step that happens."""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

import subspace_optim as so
from tests.optim.naive import DenseOperator, Quartic, assert_near, flat, projector

# As the libraries have them.


class Accelerated(Optimizer):
    """Accelerate's: a class of optimizer without its constructor, which may skip steps."""

    def __init__(self, optimizer: Optimizer, every: int = 1) -> None:
        self.optimizer, self.every, self.count = optimizer, every, 0

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        return self.optimizer.step(closure) if self.count % self.every == 0 else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.count % self.every == 0:
            self.optimizer.zero_grad(set_to_none)


class Takes:
    """Lightning's and Fabric's: it takes on the class of what it wraps, and adds a closure."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type(f"Takes{kind.__name__}", (type(self), kind), {})  # type: ignore[assignment]

    optimizer = property(lambda self: self._optimizer)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure=closure or (lambda: None))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class TakesAll(Takes):
    """As Lightning's was: with the attributes too."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.__dict__ = {n: v for n, v in vars(optimizer).items() if n not in ("step", "__del__")}
        super().__init__(optimizer)


class Lookahead(Optimizer):
    """As timm's: no call of the constructor, so that torch does not wrap ``step``."""

    def __init__(self, base_optimizer: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self._base_optimizer = base_optimizer
        self.param_groups = base_optimizer.param_groups
        self.defaults = base_optimizer.defaults
        self.state = defaultdict(dict)
        self.k, self.alpha, self.count = k, alpha, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.clone())
        loss = self._base_optimizer.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for p, state in self.state.items():
                p.copy_(state["slow"].lerp_(p, self.alpha))
        return loss


class OtherSAM(Optimizer):
    """Another library's: two calls, of which the second steps the optimizer inside."""

    def __init__(self, params: Any, base: Any, rho: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / float(norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        loss = torch.enable_grad()(closure)()
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()
        return loss


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


# What they are tried on.


def make(seed: int = 0) -> tuple[Quartic, so.DominantSubspace]:
    model = Quartic(seed=seed)
    return model, so.DominantSubspace(DenseOperator(model), 2, refresh=1, tol=1e-12)


def sgd(model: nn.Module) -> Optimizer:
    Twice(model.parameters(), lr=0.1)  # so that torch has wrapped the step of SGD too
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def closure_of(model: nn.Module) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        for p in model.parameters():
            p.grad = None
        loss = model()
        loss.backward()
        return loss

    return closure


def by_gradients(model: nn.Module, optimizer: Any) -> None:
    closure_of(model)()
    optimizer.step()


def by_closure(model: nn.Module, optimizer: Any) -> None:
    optimizer.step(closure_of(model))


def in_two_calls(model: nn.Module, optimizer: Any) -> None:
    closure_of(model)()
    optimizer.first_step()
    closure_of(model)()
    optimizer.second_step()


def other_sam(model: nn.Module) -> Optimizer:
    return OtherSAM(model.parameters(), torch.optim.SGD, lr=0.05)


CASES: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module, Any], None]]] = {
    "Accelerate's": (lambda m: Accelerated(sgd(m)), by_gradients),
    "Lightning's": (lambda m: Takes(sgd(m)), by_gradients),
    "Lightning's of old": (lambda m: TakesAll(sgd(m)), by_gradients),
    "wrapped twice": (lambda m: Takes(Accelerated(Takes(sgd(m)))), by_gradients),  # type: ignore[arg-type]
    "with a closure": (lambda m: Accelerated(sgd(m)), by_closure),
    "Lookahead": (lambda m: Lookahead(sgd(m)), by_gradients),
    "Lookahead, wrapped": (lambda m: Accelerated(Lookahead(sgd(m))), by_closure),
    "Lookahead of a wrapper": (lambda m: Lookahead(Accelerated(sgd(m))), by_gradients),
    "SAM in one call": (other_sam, by_closure),
    "SAM in two calls": (other_sam, in_two_calls),
    "SAM, wrapped, in two calls": (lambda m: Accelerated(other_sam(m)), by_closure),
    "of a subclass": (lambda m: Takes(Twice(m.parameters(), lr=0.05)), by_gradients),
}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("part", ["dominant", "bulk"])
@pytest.mark.parametrize("scheduled", [None, "before", "after"])
def test_the_whole_move_is_projected_and_measured(
    name: str, part: str, scheduled: str | None
) -> None:
    """Beside the same optimizer without a subspace, whose displacement is projected by hand."""
    wrap, step = CASES[name]
    (model, subspace), (plain, _) = make(), make()
    optimizer, reference = wrap(model), wrap(plain)
    schedulers = []
    for one in (optimizer, reference):
        inner = one
        while not hasattr(type(inner).step, "hooked"):
            inner = getattr(inner, "optimizer", None) or inner._base_optimizer
        inner = getattr(inner, "base_optimizer", inner)
        if scheduled == "before":
            schedulers.append(lr_scheduler.ExponentialLR(inner, 0.9))
        if one is optimizer:
            monitor = so.Monitor(optimizer, subspace)
            handle = so.project_updates(optimizer, subspace, part)  # type: ignore[arg-type]
        if scheduled == "after":
            schedulers.append(lr_scheduler.ExponentialLR(inner, 0.9))
    norms = []
    for _ in range(4):
        theta = flat(plain.parameters())
        step(plain, reference)
        moved = flat(plain.parameters()) - theta
        P = projector(model.hessian(theta), 2)
        expected = P @ moved if part == "dominant" else moved - P @ moved
        step(model, optimizer)
        assert_near(flat(model.parameters()) - theta, expected, 1e-8)
        norms.append(float(expected.norm()))
        with torch.no_grad():
            for p, q in zip(plain.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        if "Lookahead" in name:
            break  # the slow weights of the two are apart from here on
        for each in schedulers:
            each.step()
    assert monitor.history["update_norm"] == pytest.approx(norms, rel=1e-8)
    assert subspace.stats.refreshes == len(norms)
    handle.remove()
    monitor.detach()


def test_of_lookahead_the_move_of_the_slow_weights_is_in_the_row() -> None:
    """At every second step the parameters go half of the way back."""
    model, subspace = make()
    optimizer = Lookahead(sgd(model))
    monitor = so.Monitor(optimizer, subspace)
    norms = []
    for _ in range(4):
        theta = flat(model.parameters())
        by_gradients(model, optimizer)
        norms.append(float((flat(model.parameters()) - theta).norm()))
    assert monitor.history["update_norm"] == pytest.approx(norms, rel=1e-12)
    assert all(map(math.isnan, monitor.history["threshold"]))  # it has another


def test_of_another_sam_the_edge_is_told() -> None:
    model, subspace = make()
    optimizer = other_sam(model)
    monitor = so.Monitor(optimizer, subspace)
    in_two_calls(model, optimizer)
    by_closure(model, optimizer)
    norms = monitor.history["gradient_norm"]
    expected = [so.diagnostics.sam_edge(norm, 0.05, 0.1).item() for norm in norms]
    assert monitor.history["sam_edge"] == pytest.approx(expected)


def test_steps_that_a_wrapper_skips_are_none() -> None:
    model, subspace = make()
    optimizer = Accelerated(sgd(model), every=3)
    monitor = so.Monitor(optimizer, subspace)
    for _ in range(7):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    assert monitor.history["step"] == [0, 1]


def test_adam_in_a_wrapper_is_adam() -> None:
    model, subspace = make()
    optimizer = Takes(torch.optim.Adam(model.parameters(), lr=0.02))
    monitor = so.Monitor(optimizer, subspace, preconditioned=True)  # type: ignore[arg-type]
    for _ in range(2):
        by_gradients(model, optimizer)
    found = so.diagnostics.preconditioned_sharpness(subspace.operator, optimizer, tol=1e-12)  # type: ignore[arg-type]
    alone = so.diagnostics.preconditioned_sharpness(
        subspace.operator, optimizer.optimizer, tol=1e-12
    )
    assert found == alone
    assert monitor.history["adam_threshold"][1] > 0


def test_what_cannot_be_followed_is_named_with_the_way_out() -> None:
    model, subspace = make()
    first, *others = model.parameters()
    a, b = torch.optim.SGD([first], lr=0.1), torch.optim.SGD(others, lr=0.1)

    class Both:
        def __init__(self) -> None:
            self.one, self.two = a, b

        def step(self) -> None: ...

    class Own:
        def __init__(self) -> None:
            self.base = sgd(model)
            self.param_groups, self.state = self.base.param_groups, {}

        def step(self) -> None: ...

    for given, message in (
        (Both(), "'Both, with several inside', but must be one.* in a sequence"),
        (Own(), "'Own', but must be a torch.optim.Optimizer, where it has .* the one inside"),
        (object(), "'object', but must be a torch.optim.Optimizer, a wrapper that holds one"),
        ([a, a], "a sequence of 2', but must be without repetition"),
        ([a, Takes(a)], "a sequence of 2', but must be without repetition"),
    ):
        for attach in (
            lambda: so.Monitor(given, subspace),  # type: ignore[arg-type]  # noqa: B023
            lambda: so.project_updates(given, subspace, "bulk"),  # type: ignore[arg-type]  # noqa: B023
        ):
            with pytest.raises(so.ArgumentError, match=f"^optimizer is .*{message}"):
                attach()
    assert not a._optimizer_step_pre_hooks
    assert "step" not in vars(a)


# SAM of ours in a wrapper.


@pytest.mark.parametrize("wrap", [Takes, TakesAll, Accelerated])
@pytest.mark.parametrize("name", ["SAM", "DomSAM", "BulkSAM"])
def test_sam_in_a_wrapper_steps_as_it_does_alone(name: str, wrap: Any) -> None:
    """In both ways; the step hooks of the second call are those of one step, from θ_t."""
    (model, subspace), (plain, other) = make(), make()
    extra = [{"subspace": s} if name != "SAM" else {} for s in (subspace, other)]
    inner = getattr(so, name)(model.parameters(), lr=0.05, rho=0.2, momentum=0.5, **extra[0])
    alone = getattr(so, name)(plain.parameters(), lr=0.05, rho=0.2, momentum=0.5, **extra[1])
    optimizer = wrap(inner)
    monitor = so.Monitor(optimizer, subspace)
    for turn in range(4):
        by_closure(plain, alone)
        if turn % 2 == 0:
            by_closure(model, optimizer)
        elif wrap is Accelerated:
            in_two_calls(model, inner)
        else:
            in_two_calls(model, optimizer)
        assert_near(flat(model.parameters()), flat(plain.parameters()), 1e-12)
    assert monitor.history["step"] == [0, 1, 2, 3]
    if name != "SAM" and wrap is not Accelerated:
        assert optimizer.subspace is subspace


@pytest.mark.parametrize("name", ["SAM", "BulkSAM"])
def test_after_first_step_a_step_is_the_second(name: str) -> None:
    """With hooks, monitors and projections at θ_t; a closure is the second pass."""
    (model, subspace), (plain, other) = make(), make()
    extra = [{"subspace": s} if name != "SAM" else {} for s in (subspace, other)]
    optimizer = getattr(so, name)(model.parameters(), lr=0.05, rho=0.2, **extra[0])
    alone = getattr(so, name)(plain.parameters(), lr=0.05, rho=0.2, **extra[1])
    monitor = so.Monitor(optimizer, subspace)
    seen: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(flat(model.parameters())))
    for turn in range(4):
        theta = flat(model.parameters())
        closure_of(model)()
        optimizer.first_step(zero_grad=True)
        if turn % 2:
            model().backward()
            assert optimizer.step() is None
        else:
            loss = model().detach()
            assert torch.equal(optimizer.step(closure_of(model)), loss)
        assert torch.equal(seen[-1], theta)
        by_closure(plain, alone)
        assert_near(flat(model.parameters()), flat(plain.parameters()), 1e-12)
    assert len(seen) == len(monitor.history["step"]) == 4


@pytest.mark.parametrize("name", ["SAM", "DomSAM"])
def test_a_closure_that_adds_to_earlier_minibatches_is_refused(name: str) -> None:
    """It can evaluate its own again at the other point, and not theirs."""
    model, subspace = make()
    extra = {"subspace": subspace} if name != "SAM" else {}
    optimizer = getattr(so, name)(model.parameters(), lr=0.05, rho=0.2, **extra)
    values = flat(model.parameters())

    def adds() -> Tensor:
        loss = model()
        loss.backward()
        return loss

    closure_of(model)()
    with pytest.raises(so.ArgumentError, match=r"adds to the gradients.*first_step\(\) after the"):
        optimizer.step(adds)
    with pytest.raises(so.ArgumentError, match="computes no gradients"):
        optimizer.step(lambda: 0.0)
    assert torch.equal(flat(model.parameters()), values)
    assert not model.weights[-1]._backward_hooks


@pytest.mark.parametrize("clears", ["before the step", "in place", "by autograd.grad"])
def test_closures_that_are_whole_are_taken_however_they_clear(clears: str) -> None:
    (model, _), (plain, _) = make(), make()
    optimizer = so.SAM(model.parameters(), lr=0.05, rho=0.2)
    alone = so.SAM(plain.parameters(), lr=0.05, rho=0.2)

    def closure() -> Tensor:
        if clears == "in place":
            optimizer.zero_grad(set_to_none=False)
        loss = model()
        if clears == "by autograd.grad":
            params = list(model.parameters())
            for p, gradient in zip(params, torch.autograd.grad(loss, params), strict=True):
                p.grad = gradient
        else:
            loss.backward()
        return loss

    for _ in range(3):
        if clears == "before the step":
            optimizer.zero_grad()
        optimizer.step(closure)
        by_closure(plain, alone)
        assert_near(flat(model.parameters()), flat(plain.parameters()), 1e-14)


def test_a_step_that_was_given_up_after_first_step_can_be_begun_anew() -> None:
    model, _ = make()
    optimizer = so.SAM(model.parameters(), lr=0.05, rho=0.2)
    theta = flat(model.parameters())
    closure_of(model)()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="begin the step anew"):
        optimizer.first_step()
    assert torch.equal(flat(model.parameters()), theta)
    in_two_calls(model, optimizer)
    assert not torch.equal(flat(model.parameters()), theta)


# Attached twice, and to what does not step.


def test_a_projection_takes_the_place_of_the_one_before() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    first = so.project_updates(optimizer, subspace, "dominant")
    with pytest.warns(so.AttachedTwiceWarning, match=r"onto='dominant'.*onto='bulk' takes its"):
        second = so.project_updates(Takes(optimizer), subspace, "bulk")  # type: ignore[arg-type]
    theta = flat(model.parameters())
    P = projector(model.hessian(theta), 2)
    by_gradients(model, optimizer)
    moved = flat(model.parameters()) - theta
    assert float(moved.norm()) > 0.01
    assert float((P @ moved).norm()) < 1e-8 * float(moved.norm())
    first.remove()
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    second.remove()
    assert not optimizer._optimizer_step_pre_hooks
    so.project_updates(optimizer, subspace, "bulk")  # and then without a warning


def test_a_monitor_of_the_same_rows_takes_the_place_of_the_one_before() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    first = so.Monitor(optimizer, subspace)
    other = so.Monitor(optimizer, subspace, every=2)
    by_gradients(model, optimizer)
    with pytest.warns(so.AttachedTwiceWarning, match="keeps its history"):
        second = so.Monitor(optimizer, subspace)
    by_gradients(model, optimizer)
    assert (first.history["step"], second.history["step"]) == ([0], [0])
    assert other.history["step"] == [0]


@pytest.mark.parametrize(
    "ask", [lambda m: m.history, so.Monitor.rows, so.Monitor.state_dict, so.Monitor.detach]
)
def test_parameters_that_move_without_a_step_are_told_of_once(ask: Any) -> None:
    """Here a copy of the optimizer steps, which has no hooks."""
    model, subspace = make()
    monitor = so.Monitor(sgd(model), subspace)
    handle = so.project_updates(sgd(model), subspace, "bulk")
    copied = sgd(model)
    assert monitor.history["step"] == []
    by_gradients(model, copied)
    with pytest.warns(so.UnseenStepsWarning, match="no step of SGD was seen"):
        ask(monitor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert monitor.history["step"] == []
        monitor.detach()
    with pytest.warns(so.UnseenStepsWarning, match="since Projection was attached"):
        handle.remove()


class Bare:
    """Lookahead again, by hand: nothing tells it from a wrapper that passes steps on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.count = optimizer, 0
        self.slow = [p.detach().clone() for p in so.step_hooks.parameters_of(optimizer)]

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, so.step_hooks.parameters_of(self.optimizer), strict=True):
                p.copy_(slow.lerp_(p, 0.5))


def test_a_wrapper_that_moves_the_parameters_itself_is_told_of_once() -> None:
    model, subspace = make()
    optimizer = Bare(sgd(model))
    handle = so.project_updates(optimizer, subspace, "bulk")
    for _ in range(2):
        by_gradients(model, optimizer)
    with pytest.warns(so.UnseenStepsWarning, match="between the steps of SGD.*not seen by Proj"):
        by_gradients(model, optimizer)
    for _ in range(3):
        by_gradients(model, optimizer)  # warnings are errors
    handle.remove()


def test_a_step_that_was_compiled_or_taken_before_is_seen() -> None:
    """``step`` was looked up before anything was attached: the hooks are torch's own."""
    model, subspace = make()
    optimizer = sgd(model)
    step = optimizer.step
    monitor = so.Monitor(optimizer, subspace)
    handle = so.project_updates(optimizer, subspace, "dominant")

    def broken() -> float:
        raise KeyError("data")

    for _ in range(2):
        closure_of(model)()
        step()
        with pytest.raises(KeyError):
            step(broken)  # type: ignore[arg-type]
    assert monitor.history["step"] == [0, 1]
    assert monitor.history["chi_update"] == pytest.approx([1.0, 1.0])
    handle.remove()


def test_a_copy_of_what_is_followed_is_plain() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    monitor = so.Monitor(optimizer, subspace)
    twin, copied = copy.deepcopy((model, optimizer))
    theta = flat(model.parameters())
    by_gradients(twin, copied)
    assert torch.equal(flat(model.parameters()), theta)
    assert not torch.equal(flat(twin.parameters()), theta)
    assert monitor.history["step"] == []


def test_a_log_may_detach_its_monitor_or_save_it() -> None:
    model, subspace = make()
    optimizer = sgd(model)
    states: list[Any] = []

    def log(row: dict[str, Any]) -> None:
        states.append(monitor.state_dict())
        if row["step"] == 1:
            monitor.detach()

    monitor = so.Monitor(optimizer, subspace, log=log)
    so.Monitor(optimizer, subspace, every=2)  # its hooks come after
    for _ in range(4):
        by_gradients(model, optimizer)
    assert [state["steps"] for state in states] == [1, 2]
    assert monitor.history["step"] == [0, 1]


# Inside of autocast.


@pytest.mark.parametrize("name", ["DomSGD", "BulkSAM", "SAM", "LowRankNewton", "AdamW"])
def test_a_step_inside_autocast_is_the_step_outside_bit_for_bit(name: str) -> None:
    """Optimizers, projections and rows; the passes of SAM there see the parameters displaced."""
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    ends, rows = [], []
    for inside in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        quartic = Quartic(((4, 3), (4,), (1, 4), (1,)), dtype=torch.float32)
        for p, q in zip(model.parameters(), quartic.parameters(), strict=True):
            p.data.copy_(q)
        operator = so.HessianOperator(model, nn.functional.mse_loss, (x, x[:, :1]))
        subspace = so.DominantSubspace(operator, 2, refresh=1)
        params: Any = list(model.parameters())
        optimizer: Any
        if name == "AdamW":
            optimizer = torch.optim.AdamW(params, lr=0.01)
            so.project_updates(optimizer, subspace, "bulk")
        elif name == "SAM":
            optimizer = so.SAM(params, lr=0.1, rho=0.5)
        else:
            optimizer = getattr(so, name)(params, lr=0.1, subspace=subspace)
        monitor = so.Monitor(optimizer, subspace)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.mse_loss(model(x).float(), x[:, :1])
            loss.backward()
            return loss

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step(closure)
        ends.append([p.detach().clone() for p in params])
        rows.append(str(monitor.history))
    assert all(map(torch.equal, *ends))
    assert rows[0] == rows[1]

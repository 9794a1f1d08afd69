"""Optimizers that are wrapped, or step another one: what is followed is the step that happens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import subspace_optim as so
from tests.contract.loops import by_closure, by_gradients, in_two_calls, make, other_sam, sgd
from tests.contract.others import Accelerated, Lookahead, Takes, TakesAll, Twice
from tests.optim.naive import assert_near, flat, projector

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

# The projection is the same function for both parts. A scheduler wraps the step of the innermost
# optimizer before or after ours does, in each of the ways in which ours finds that.
WRAPPED = [
    *((name, "bulk", None) for name in CASES),
    *((name, "dominant", None) for name in ("Lightning's", "Lookahead", "SAM in two calls")),
    *(
        (name, "bulk", when)
        for name in ("wrapped twice", "with a closure", "SAM in one call", "of a subclass")
        for when in ("scheduler before", "scheduler after")
    ),
]


@pytest.mark.parametrize(
    ("name", "part", "scheduled"),
    WRAPPED,
    ids=lambda value: "no scheduler" if value is None else value,
)
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
        if scheduled == "scheduler before":
            schedulers.append(lr_scheduler.ExponentialLR(inner, 0.9))
        if one is optimizer:
            monitor = so.Monitor(optimizer, subspace)
            handle = so.project_updates(optimizer, subspace, part)  # type: ignore[arg-type]
        if scheduled == "scheduler after":
            schedulers.append(lr_scheduler.ExponentialLR(inner, 0.9))
    norms = []
    for _ in range(3):
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
    monitor = so.Monitor(
        optimizer,
        subspace,
        measures=[so.measures.dominant(), so.measures.preconditioned_sharpness()],
    )  # type: ignore[arg-type]
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

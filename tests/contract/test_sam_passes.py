"""The two passes of SAM: in wrappers, in two calls, and with closures of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import subspace_optim as so
from tests.contract.loops import by_closure, closure_of, in_two_calls, make
from tests.contract.others import Accelerated, Takes, TakesAll
from tests.optim.naive import assert_near, flat


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

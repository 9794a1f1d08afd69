"""Gradients that are cleared, accumulated, compiled, of other dtypes, scaled."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import subspace_optim as so
from tests.contract.cases import (
    CASES,
    EACH_ALGORITHM,
    EACH_WAY,
    OURS,
    PROJECTED,
    Case,
    each_algorithm,
    each_way_observing,
    ours,
    sams,
)
from tests.contract.runs import Reference, Run, follow, pair, same, scaled_step, watch
from tests.contract.settings import Setting, network, quartic
from tests.optim.naive import assert_near, flat, projector


@each_way_observing
def test_gradients_that_are_zeroed_are_as_good_as_none(case: Case) -> None:
    run, other = Run(case), Run(case)

    def closure() -> Tensor:
        other.zero_grad(set_to_none=False)
        loss = other.setting.loss()
        loss.backward()
        return loss

    for _ in range(3):
        run.step()
        other.step(closure)
    assert same(run.values(), other.values())
    other.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not bool(p.grad.any()) for p in other.model.parameters())
    other.zero_grad()
    assert all(p.grad is None for p in other.model.parameters())


@each_way_observing
def test_gradients_may_be_accumulated(case: Case) -> None:
    """Two backward passes of half the loss each are one of the loss, to the bit."""
    run, other = Run(case), Run(case)

    def closure() -> Tensor:
        other.zero_grad()
        losses = [other.setting.loss() / 2 for _ in range(2)]
        for loss in losses:
            loss.backward()
        return sum(losses)

    for _ in range(3):
        run.step()
        other.step(closure)
    assert same(run.values(), other.values())


COMPILED = [*OURS, *(CASES[f"{n}, dominant"] for n in ("AdamW fused", "Muon + AdamW", "LBFGS"))]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_a_compiled_model_takes_the_same_steps(case: Case) -> None:
    """The optimizer has the parameters of the compiled model, the operator the model in it."""
    torch.compiler.reset()
    run, other = Run(case), None
    setting = quartic()
    compiled = torch.compile(setting.model, backend="eager")
    setting = Setting(setting.model, compiled, setting.hessian, setting.operator)
    other = Run(case, setting, params=list(compiled.parameters()))
    for _ in range(2):
        for one in (run, other):
            one.step()
    assert_near(other.theta(), run.theta(), 1e-12)


@each_algorithm
def test_float32_parameters_take_the_same_steps(case: Case) -> None:
    run, reference = pair(case, lambda: case.setting(torch.float32))
    relative = 0.05 if case.joint else 1e-3  # Muon works in bfloat16 inside
    if case.lbfgs:
        run.groups[0]["max_iter"] = reference.groups[0]["max_iter"] = 3
    follow(run, reference, 3, relative)
    assert run.subspace.update().dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("case", [c for c in PROJECTED if c in EACH_ALGORITHM], ids=str)
def test_of_bf16_parameters_the_displacement_is_projected_in_float32(case: Case) -> None:
    """It is what the plain optimizer made of them, rounded; the result is rounded once."""
    lr = 16.0 if "Adadelta" in case.name else 0.5
    run, reference = pair(case, lambda: network(torch.bfloat16), lr=lr)
    theta, expected = run.theta(), reference.step()
    run.step()
    basis = run.subspace.basis
    assert basis is not None
    assert basis.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
    update = reference.setting.theta() - theta
    error = (run.theta() - expected).abs()
    assert bool((error <= 1.01 * half_ulp + 1e-4 * update.norm()).all())
    assert float(error.norm()) < 0.2 * float((expected - theta).norm())


@ours
def test_bf16_parameters_have_a_float32_basis_and_buffers_of_bf16(case: Case) -> None:
    """Beside the reference in float64: what is left is the rounding of model and parameters."""
    lr = case.options["lr"] * 16
    run = Run(case, network(torch.bfloat16), lr=lr, refresh=1)
    exact = network()
    exact.model.load_state_dict(run.model.state_dict())
    expected = Reference(run, exact, lr=lr).step()
    theta = run.theta()
    run.step()
    assert run.subspace.update().dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in run.model.parameters())
    buffers = [state["momentum_buffer"] for state in run.optimizer.state.values()]
    assert len(buffers) == 4
    assert all(buffer.dtype == torch.bfloat16 for buffer in buffers)
    error = float((run.theta() - expected).norm())
    assert error < 0.15 * float((expected - theta).norm())


@pytest.mark.parametrize("case", [c for c in OURS if c.ours in (so.DomSGD, so.BulkSGD)], ids=str)
def test_bf16_parameters_are_rounded_once_at_the_end(case: Case) -> None:
    run = Run(case, network(torch.bfloat16), lr=10.3, refresh=1)
    run.closure()
    theta = run.theta()
    update = -10.3 * flat(p.grad for p in run.model.parameters())
    dominant = projector(run.setting.hessian(theta), 2) @ update
    moved = dominant if case.part == "dominant" else update - dominant
    run.apply()
    expected = theta + moved
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
    error = (run.theta() - expected).abs()
    assert bool((error <= 1.01 * half_ulp + 1e-4 * update.norm()).all())
    assert float(error.norm()) < 0.1 * float(moved.norm())


# Gradient scalers.


# Torch's scaler takes no closures, and its fused SGD with momentum leaves the buffers as it found
# the memory if the very first step is skipped.
SCALED = [case for case in EACH_WAY if not case.lbfgs and not case.name.startswith("SGD fused")]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("case", SCALED, ids=str)
def test_a_step_that_the_scaler_skips_is_no_step(case: Case, bad: float) -> None:
    """The next one is that of a run that has not met the overflow."""
    run, other = Run(case, refresh=1), Run(case)
    monitor = so.Monitor(run.optimizers, run.subspace)
    calls = watch(run)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = run.values()
    for at in range(2 if case.sam else 1):
        scale = scaler.get_scale()
        scaled_step(run, scaler, bad, at)
        assert same(before, run.values())
        assert (run.refreshes, run.subspace.clock) == (0, 0)
        assert monitor.history["step"] == []
        if at + 1 == (2 if case.sam else 1):
            assert scaler.get_scale() == scale / 2
            scale /= 2
    if "fused" not in case.options:  # fused kernels look for infinities themselves
        assert calls == []
        assert all(not each.state for each in run.optimizers) or "Adagrad" in case.name
    for _ in range(2):
        scaled_step(run, scaler)
        other.step()
        assert_near(run.theta(), other.theta(), 1e-12)
    assert run.refreshes == 2
    assert monitor.history["step"] == [0, 1]


@sams
def test_an_overflow_of_the_scale_itself_lowers_it_until_sam_steps(case: Case) -> None:
    """Both passes overflow here, as they do in training: scale times gradient is infinite."""
    run, other = Run(case, quartic(torch.float32)), Run(case, quartic(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-90)
    before = run.values()
    scaled_step(run, scaler)
    assert same(before, run.values())
    assert scaler.get_scale() == 2.0**37
    scaled_step(run, scaler)
    other.step()
    assert_near(run.theta(), other.theta(), 1e-6)


@sams
def test_gradients_whose_squares_overflow_are_finite_to_sam(case: Case) -> None:
    """With the scale 2^100 the gradients are finite float32 numbers, and the sum of squares is not.

    If that skipped the step, the scaler, which sees no infinity, would never lower the scale.
    """
    run, other = Run(case, quartic(torch.float32)), Run(case, quartic(torch.float32))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    scaled_step(run, scaler)
    other.step()
    assert_near(run.theta(), other.theta(), 1e-6)

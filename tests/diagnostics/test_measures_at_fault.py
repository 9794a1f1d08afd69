"""What measures tell where something is amiss: nothing that is wrong, and no more than is lost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import subspace_optim as so
from subspace_optim import measures
from subspace_optim.diagnostics.measures.base import Measure, Row
from subspace_optim.diagnostics.measures.step import Step

cross_entropy = nn.CrossEntropyLoss()


class Setting:
    """A network, and a training of it on the minibatches that a ``CurrentBatch`` is given."""

    def __init__(self, *layers: nn.Module) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *layers, nn.Linear(6, 3))
        self.x, self.y = torch.randn(48, 4), torch.randint(3, (48,))
        self.batch = so.CurrentBatch()

    def operator(self, kind: Any = so.HessianOperator, **options: Any) -> Any:
        return kind(self.model, cross_entropy, self.batch, verify=False, **options)

    def rows(self, step: int) -> tuple[Tensor, Tensor]:
        rows = (torch.arange(16) + 16 * step) % 48
        return self.x[rows], self.y[rows]

    def train(
        self,
        *optimizers: torch.optim.Optimizer,
        steps: int = 3,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
        given: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y),
        changed: Callable[[nn.Module], object] = lambda _: None,
    ) -> None:
        for step in range(steps):
            x, y = self.rows(step)
            self.batch.set(*given(x, y))
            self.model.zero_grad()
            loss_fn(self.model(x), y).backward()
            changed(self.model)
            for each in optimizers:
                each.step()

    def sgd(self, lr: float = 0.1, **options: Any) -> torch.optim.SGD:
        return torch.optim.SGD(self.model.parameters(), lr=lr, **options)


def muon_and_adamw(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    return torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.02)


# --- another gradient than that of the loss ---------------------------------------------------


def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
    return 10 * nn.functional.cross_entropy(outputs, (y + 1) % 3)


FAULTS: dict[str, dict[str, Any]] = {
    "another loss": {"loss_fn": smoothed},
    "another batch": {"given": lambda x, y: (x.flip(0), y)},
    "gradients that were changed": {
        "changed": lambda model: [p.grad.sign_() for p in model.parameters()]
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_gradient_that_is_not_the_losss_is_told_once(fault: str) -> None:
    s = Setting()
    optimizer = s.sgd()
    monitor = so.Monitor(optimizer, s.operator())
    with pytest.warns(so.OtherGradientWarning, match="has a cosine of ") as told:
        s.train(optimizer, steps=4, **FAULTS[fault])
    assert len(told) == 1
    assert len(monitor.history["step"]) == 4


def test_micro_batches_that_are_set_are_told_the_way_out_and_those_that_are_added_are_right() -> (
    None
):
    """Of two accumulated micro-batches ``set`` keeps the second, whose gradient is another."""
    for take in ("set", "add"):
        s = Setting()
        optimizer = s.sgd()
        monitor = so.Monitor(optimizer, s.operator(), measures=so.measures.stability())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for x, y in (s.rows(0), (s.rows(1)[0], (s.rows(1)[1] + 1) % 3)):
                getattr(s.batch, take)(x, y)
                nn.functional.cross_entropy(s.model(x), y).backward()
            optimizer.step()
        assert len(monitor.history["step"]) == 1
        assert ["`batch.add(x, y)` each micro-batch" in str(w.message) for w in told] == (
            [True] if take == "set" else []
        )


def scaled(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.parametrize("case", ["plain", "clipped", "dropout", "closure", "no gradient", "SAM"])
def test_nothing_is_told_where_it_is_the_same_or_cannot_be_compared(case: str) -> None:
    """Any warning is an error here."""
    s = Setting(*([nn.Dropout(0.9)] if case == "dropout" else []))
    optimizer: torch.optim.Optimizer = s.sgd()
    if case == "SAM":
        optimizer = so.SAM(s.model.parameters(), lr=0.1, rho=5.0)
    monitor = so.Monitor(optimizer, s.operator())
    if case == "clipped":
        s.train(optimizer, changed=scaled)
    elif case == "no gradient":
        s.train(optimizer, changed=lambda model: setattr(model[0].weight, "grad", None))
    elif case in ("closure", "SAM"):
        for step in range(3):
            x, y = s.rows(step)
            s.batch.set(x, y)

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                optimizer.zero_grad()
                loss = cross_entropy(s.model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    else:
        s.train(optimizer)
    assert not any(map(math.isnan, monitor.history["gradient_sharpness"]))


def test_other_data_may_have_another_gradient() -> None:
    s = Setting()
    optimizer = s.sgd()
    operator = so.HessianOperator(s.model, cross_entropy, (s.x.flip(0), s.y), verify=False)
    so.Monitor(optimizer, operator)
    s.train(optimizer)  # any warning is an error


# --- a measure that raises ---------------------------------------------------------------------


class Failing(Measure):
    """Raises at step 1, before or after it."""

    columns = ("early", "late")
    lists = {"late": 2}  # noqa: RUF012 (never written to)

    def __init__(self, when: str) -> None:
        self.when = when

    def before(self, step: Step) -> Row:
        if self.when == "before" and step.number == 1:
            raise ValueError("not now")
        return {"early": 1.0}

    def after(self, step: Step) -> Row:
        if self.when == "after" and step.number == 1:
            raise ValueError("not now")
        return {"late": [2.0, 3.0]}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_measure_that_raises_costs_its_own_columns_of_that_row(when: str) -> None:
    s = Setting()
    optimizer = s.sgd()
    monitor = so.Monitor(optimizer, s.operator(), measures=[Failing(when), measures.update()])
    told = r"^A part of the row of step 1 is NaN: not now \(ValueError\) The part is: early, late\."
    with pytest.warns(so.LogWarning, match=told):
        s.train(optimizer)
    assert not any(map(math.isnan, monitor.history["update_norm"]))
    assert [math.isnan(v) for v in monitor.history["early"]] == [False, True, False]
    assert [list(map(math.isnan, v)) for v in monitor.history["late"]] == [
        [False, False],
        [True, True],
        [False, False],
    ]


def test_an_interrupted_row_is_of_a_step_that_was_taken_all_the_same() -> None:
    class Interrupted(Measure):
        columns = ("never",)

        def after(self, step: Step) -> Row:
            if step.number == 1:
                raise KeyboardInterrupt
            return {}

    s = Setting()
    optimizer = s.sgd()
    subspace = so.DominantSubspace(s.operator(), k=1, refresh=1)
    monitor = so.Monitor(optimizer, subspace, measures=[Interrupted(), measures.update()])
    s.train(optimizer, steps=1)
    with pytest.raises(KeyboardInterrupt):
        s.train(optimizer, steps=1)
    assert subspace.steps.state_dict()["clock"] == 2  # both steps
    s.train(optimizer, steps=2)
    assert monitor.history["step"] == [0, 2, 3]
    assert s.batch.held() == []


# --- several monitors of one batch -------------------------------------------------------------


@pytest.mark.parametrize("alike", [True, False])
def test_monitors_of_one_optimizer_and_of_both_have_the_batch_until_each_is_done(
    alike: bool,
) -> None:
    s = Setting()
    muon, adamw = muon_and_adamw(s.model)
    operator = s.operator()
    of_muon = measures.critical_sharpness() if alike else measures.directional_sharpness()
    first = so.Monitor(muon, operator, measures=of_muon)
    both = so.Monitor([muon, adamw], operator, measures=measures.critical_sharpness())
    s.train(muon, adamw)
    for monitor in (first, both):
        column = next(c for c in ("actual_change", "critical_multiple") if c in monitor.history)
        assert len(monitor.history[column]) == 3
        assert not any(map(math.isnan, monitor.history[column]))
    assert s.batch.held() == []  # and no longer


def test_a_step_that_raises_gives_its_hold_of_the_batch_back() -> None:
    class Once(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if self.defaults.pop("broken", None):
                raise RuntimeError("boom")
            return super().step(closure)

    s = Setting()
    optimizer = Once(s.model.parameters(), lr=0.1)
    optimizer.defaults["broken"] = True
    so.Monitor(optimizer, s.operator(), measures=measures.update())
    with pytest.raises(RuntimeError, match="boom"):
        s.train(optimizer, steps=1)
    assert len(s.batch.held()) == 1  # the step may be tried again
    s.train(optimizer, steps=1)
    assert s.batch.held() == []


# --- what cannot be read yet, or does not belong together --------------------------------------


def test_minibatches_of_a_batch_that_is_not_there_yet_are_looked_at_in_the_row() -> None:
    s = Setting()
    optimizer = s.sgd()
    subspace = so.DominantSubspace(s.operator(), k=2)
    chosen = [measures.batch_sharpness(batch_size=4), measures.gradient_noise(2, batch_size=4)]
    monitor = so.Monitor(optimizer, subspace, measures=chosen)
    s.train(optimizer)
    assert not any(map(math.isnan, monitor.history["batch_sharpness"]))
    assert not any(math.isnan(v) for row in monitor.history["noise"] for v in row)
    with pytest.raises(so.ArgumentError, match="batch_size is 0"):
        so.Monitor(optimizer, subspace, measures=measures.batch_sharpness(batch_size=0))


def test_losses_of_two_minibatches_make_no_hill_share() -> None:
    s = Setting()
    optimizer = s.sgd()
    subspace = so.DominantSubspace(s.operator(), k=2)
    monitor = so.Monitor(optimizer, subspace, measures=measures.valley())
    s.train(optimizer)
    assert all(map(math.isfinite, monitor.history["river_loss"]))
    assert all(map(math.isnan, monitor.history["hill_share"]))


def test_an_operator_that_is_no_hessian_is_measured_by_its_products() -> None:
    s = Setting()
    optimizer = s.sgd()
    operator = s.operator(so.GaussNewtonOperator)
    with pytest.raises(so.ArgumentError, match=r"GaussNewtonOperator.*Use by='products'"):
        so.Monitor(optimizer, operator, measures=measures.directional_sharpness(by="losses"))
    monitor = so.Monitor(optimizer, operator)
    theta = [p.detach().clone() for p in s.model.parameters()]
    expected = Quotient(s, theta, s.rows(0)[0])
    s.train(optimizer, steps=1)
    u = [p.detach() - q for p, q in zip(s.model.parameters(), theta, strict=True)]
    assert monitor.history["update_sharpness"] == [pytest.approx(expected.along(u), rel=1e-4)]


class Quotient:
    """``u'Gu / u'u`` of the Gauss-Newton matrix of cross-entropy, by the change of its outputs."""

    def __init__(self, s: Setting, theta: list[Tensor], x: Tensor) -> None:
        self.names = [name for name, _ in s.model.named_parameters()]
        self.theta, self.model, self.x = theta, s.model, x

    def along(self, u: list[Tensor]) -> float:
        def outputs(c: Tensor) -> Tensor:
            at = {n: t + c * d for n, t, d in zip(self.names, self.theta, u, strict=True)}
            found: Tensor = torch.func.functional_call(self.model, at, (self.x,))
            return found

        zero = torch.zeros(())
        jacobian = torch.func.jacfwd(outputs)(zero)
        p = outputs(zero).softmax(1)
        bend = (p * jacobian**2).sum(1) - (p * jacobian).sum(1) ** 2
        return float(bend.mean()) / sum(float(d.square().sum()) for d in u)


def test_low_precision_takes_products_for_curvature() -> None:
    """θ + c u, rounded to bf16, is not on the line: products are of the point itself."""
    s = Setting()
    s.model.bfloat16()
    s.x = s.x.bfloat16()
    optimizer = torch.optim.AdamW(s.model.parameters(), lr=1e-3)
    chosen = [*measures.stability(), measures.update()]
    monitor = so.Monitor(optimizer, s.operator(), measures=chosen)
    theta = torch.cat([p.detach().double().flatten() for p in s.model.parameters()])
    x, y = s.rows(0)
    s.train(optimizer, steps=1)
    u = torch.cat([p.detach().double().flatten() for p in s.model.parameters()]) - theta

    def loss(flat: Tensor) -> Tensor:
        w, b, v, c = flat.split([24, 6, 18, 3])
        hidden = torch.tanh(x.double() @ w.view(6, 4).T + b)
        return nn.functional.cross_entropy(hidden @ v.view(3, 6).T + c, y)

    hessian = torch.func.hessian(loss)(theta)
    assert monitor.history["update_sharpness"][0] == pytest.approx(
        float(u @ hessian @ u / (u @ u)), rel=1e-3
    )


# --- thresholds that do not fit ------------------------------------------------------------------


def of_batches(s: Setting, optimizer: torch.optim.Optimizer) -> dict[str, list[float]]:
    operator = so.HessianOperator(s.model, cross_entropy, (s.x, s.y), verify=False)
    chosen = [
        measures.batch_sharpness(batch_size=16, max_batches=2),
        measures.critical_sharpness(),
    ]
    monitor = so.Monitor(optimizer, operator, measures=chosen)
    x, y = s.rows(0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(s.model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    return monitor.history


def test_batch_thresholds_are_of_the_groups_that_move_and_of_plain_sgd() -> None:
    s = Setting()
    sam = of_batches(s, so.SAM(s.model.parameters(), lr=0.1, rho=0.5))
    assert math.isnan(sam["small_batch_threshold"][0])
    decayed = of_batches(s, s.sgd(weight_decay=1.0, momentum=0.5))
    assert decayed["small_batch_threshold"] == pytest.approx([2 * 0.5 / 0.1 - 1])
    assert decayed["large_batch_threshold"] == pytest.approx([2 * 1.5 / 0.1 - 1])
    first, last = s.model[0].parameters(), s.model[2].parameters()
    resting = torch.optim.SGD(
        [{"params": first, "momentum": 0.9}, {"params": last, "lr": 0.0}], 0.1
    )
    assert of_batches(s, resting)["small_batch_threshold"] == pytest.approx([2 * 0.1 / 0.1])


def test_a_rate_of_frozen_or_of_other_parameters_is_no_second_rate() -> None:
    s = Setting()
    elsewhere = nn.Linear(2, 2)
    for p in s.model[0].parameters():
        p.requires_grad_(False)
    groups = [
        {"params": list(s.model[0].parameters()), "lr": 5.0},
        {"params": list(elsewhere.parameters()), "lr": 7.0},
        {"params": list(s.model[2].parameters()), "lr": 0.1},
    ]
    history = of_batches(s, torch.optim.SGD(groups))
    assert history["critical_threshold"] == [pytest.approx(2 / 0.1)]


def test_the_norm_threshold_of_steps_of_both_kinds_is_nan() -> None:
    s = Setting()
    muon, _ = muon_and_adamw(s.model)
    biases = torch.optim.SGD([p for p in s.model.parameters() if p.dim() != 2], lr=0.02)
    chosen = measures.norm_sharpness(starts=1, steps=2)
    monitor = so.Monitor([muon, biases], s.operator(), measures=chosen)
    s.train(muon, biases, steps=1)
    assert math.isfinite(monitor.history["norm_sharpness"][0])
    assert math.isnan(monitor.history["norm_threshold"][0])


def test_adam_that_maximizes_is_refused_at_the_attachment() -> None:
    s = Setting()
    adam = torch.optim.Adam(s.model.parameters(), maximize=True)
    with pytest.raises(so.ArgumentError, match="maximize is True"):
        so.Monitor(adam, s.operator(), measures=measures.preconditioned_sharpness())


def test_eigenvalues_below_the_kth_take_a_kth() -> None:
    s = Setting()
    with pytest.raises(so.ArgumentError, match=r"source without eigenpairs.*DominantSubspace"):
        so.Monitor(s.sgd(), s.operator(), measures=measures.next_eigenvalues(2))
    subspace = so.DominantSubspace(s.operator(), k=sum(p.numel() for p in s.model.parameters()))
    with pytest.raises(so.ArgumentError, match=r"of all pairs.*smaller k"):
        so.Monitor(s.sgd(), subspace, measures=measures.next_eigenvalues(1))

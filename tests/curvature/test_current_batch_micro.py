"""Calls of a model that no backward pass is of are no micro-batches of its step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import subspace_optim as so
from subspace_optim.curvature.forwards import Call


class Labelled(nn.Module):
    """Returns its loss where it gets labels, and its outputs where it does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs if labels is None else F.cross_entropy(outputs, labels)


def batch_loss(model: Callable[..., Tensor], call: Call) -> tuple[Tensor, int]:
    return call(model), len(call.kwargs["inputs"])


def examples(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(30, 4, generator=random, dtype=torch.float64)
    return {"inputs": inputs, "labels": torch.randint(3, (30,), generator=random)}


class Setting:
    def __init__(self) -> None:
        self.model = Labelled()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.batch = so.CurrentBatch.from_forward(self.model)
        self.hessian = so.HessianOperator.from_loss(self.model, batch_loss, self.batch)

    def loss_of(self, *parts: dict[str, Tensor]) -> float:
        with torch.no_grad():
            return float(torch.stack([self.model(**part) for part in parts]).mean())


def validation(model: nn.Module) -> None:
    model.eval()
    model(**examples(9)).item()
    model.train()


def accuracy(model: nn.Module) -> None:
    model(inputs=examples(9)["inputs"]).argmax(1)


@pytest.mark.parametrize("look", [validation, accuracy])
def test_a_call_after_the_last_backward_pass_is_no_micro_batch(
    look: Callable[[nn.Module], None],
) -> None:
    s = Setting()
    monitor = so.Monitor(s.optimizer, s.hessian, measures=so.measures.critical_sharpness())
    expected = []
    for step in range(2):
        s.optimizer.zero_grad()
        s.model(**examples(step)).backward()
        look(s.model)
        assert s.hessian.loss() == pytest.approx(s.loss_of(examples(step)), rel=1e-12)
        theta = [p.detach().clone() for p in s.model.parameters()]
        gradients = [p.grad.clone() for p in s.model.parameters() if p.grad is not None]
        expected.append(crossing(s, examples(step), theta, gradients))
        s.optimizer.step()
    assert monitor.history["critical_multiple"] == pytest.approx(expected, rel=1 / 16)


def crossing(
    s: Setting, part: dict[str, Tensor], theta: list[Tensor], gradients: list[Tensor]
) -> float:
    """The first multiple, of a fine grid, at which the step raises the loss of its own batch."""

    def loss(c: float) -> float:
        weight, bias = (p - 0.1 * c * g for p, g in zip(theta, gradients, strict=True))
        return float(F.cross_entropy(F.linear(part["inputs"], weight, bias), part["labels"]))

    c, start = 0.5, loss(0.0)
    while loss(c) <= start:
        c *= 1.005
    return c


def test_it_counts_once_its_backward_pass_has_come_and_operators_see_that() -> None:
    s = Setting()
    s.optimizer.zero_grad()
    s.model(**examples(0)).backward()
    second = s.model(**examples(1))
    assert s.hessian.loss() == pytest.approx(s.loss_of(examples(0)), rel=1e-12)
    number = s.batch.number
    second.backward()
    assert s.batch.number != number
    assert s.hessian.loss() == pytest.approx(s.loss_of(examples(0), examples(1)), rel=1e-12)


def test_a_call_alone_counts_before_its_backward_pass() -> None:
    s = Setting()
    s.model(**examples(3))
    assert s.hessian.loss() == pytest.approx(s.loss_of(examples(3)), rel=1e-12)


def test_what_did_not_count_does_not_come_back_once_gradients_are_cleared() -> None:
    s = Setting()
    s.model(**examples(0)).backward()
    s.model(**examples(1)).backward()
    validation(s.model)
    s.optimizer.step()
    s.optimizer.zero_grad()
    assert s.hessian.loss() == pytest.approx(s.loss_of(examples(0), examples(1)), rel=1e-12)

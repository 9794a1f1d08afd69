"""`DomSGD` and `BulkSGD`: the formula, beside plain float64 loops and beside `torch.optim.SGD`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

import subspace_optim as so
from tests.optim.naive import (
    OPTIONS,
    Quartic,
    assert_near,
    descend,
    exact,
    flat,
    landscape,
    relative_gap,
)

CLASSES = {"dominant": so.DomSGD, "bulk": so.BulkSGD}
SHAPES = [((4,), ()), ((2, 3), (2,), ()), ((3, 2), (3,), (2, 3), (2,)), ((1, 2, 2), (1,), (5,))]


def split(model: nn.Module, members: list[list[int]]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The parameters of each group, and their indices in θ."""
    parameters = list(model.parameters())
    indices = torch.arange(sum(p.numel() for p in parameters))
    pieces = indices.split([p.numel() for p in parameters])
    return (
        [[parameters[i] for i in group] for group in members],
        [torch.cat([pieces[i] for i in group]) for group in members],
    )


# Beside a naive implementation.


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    momentum = draw(st.sampled_from([0.0, 0.5, 0.9]))
    dampening = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return {
        "lr": draw(st.floats(1e-3, 0.1)),
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.5])),
        "nesterov": momentum > 0 and dampening == 0 and draw(st.booleans()),
        "maximize": draw(st.booleans()),
    }


@settings(max_examples=40)
@given(data=st.data(), part=st.sampled_from(sorted(CLASSES)), foreach=st.booleans())
def test_steps_equal_the_formula(data: st.DataObject, part: str, foreach: bool) -> None:
    """θ + P u, with u of SGD's recurrences and P of dense eigh, each in a line of its own."""
    model = Quartic(data.draw(st.sampled_from(SHAPES)), seed=data.draw(st.integers(0, 10_000)))
    count = len(model.weights)
    where = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    members = [[i for i in order if where[i] == g] for g in sorted(set(where))]
    settings_of = [data.draw(options()) for _ in members]
    k = data.draw(st.integers(1, sum(p.numel() for p in model.parameters())))
    steps = data.draw(st.integers(3, 6))

    tensors, indices = split(model, members)
    theta = flat(model.parameters())
    try:
        path = descend(
            model, theta, list(zip(indices, settings_of, strict=True)), part=part, k=k, steps=steps
        )
    except (ValueError, torch.linalg.LinAlgError):  # no gap, or ascent to infinity
        assume(False)
    assume(all(float(point.norm()) < 50 for point in path))
    assume(all(relative_gap(model.hessian(point), k) > 1e-3 for point in path))

    groups = [{"params": p, **o} for p, o in zip(tensors, settings_of, strict=True)]
    optimizer = CLASSES[part](groups, foreach=foreach, subspace=exact(model, k))
    for expected in path[1:]:
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
        assert_near(flat(model.parameters()), expected, 1e-8)


@pytest.mark.parametrize("part", CLASSES)
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_steps_of_a_network_equal_the_formula(part: str, loss: str, nesterov: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(10, 3).double()
    y = torch.randint(2, (10,)) if loss == "cross_entropy" else torch.randn(10, 2).double()
    loss_fn = getattr(nn.functional, loss)
    chosen = OPTIONS | {"lr": 0.2, "momentum": 0.8, "weight_decay": 0.1, "nesterov": nesterov}
    theta = flat(model.parameters())
    groups = [(torch.arange(len(theta)), chosen)]
    path = descend(landscape(model, loss_fn, x, y), theta, groups, part=part, k=2, steps=3)

    subspace = so.DominantSubspace(
        so.HessianOperator(model, loss_fn, (x, y)), 2, refresh=1, tol=1e-12
    )
    optimizer = CLASSES[part](model.parameters(), **chosen, subspace=subspace)
    for expected in path[1:]:
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
        assert_near(flat(model.parameters()), expected, 1e-8)


# Beside `torch.optim.SGD`.


@dataclass
class Case:
    """Options of each group (as many groups as there are), and a scheduler on top."""

    groups: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None


MOMENTUM = {"momentum": 0.9}
NESTEROV = MOMENTUM | {"nesterov": True}
CASES = {
    "plain": Case(),
    "momentum": Case([MOMENTUM]),
    "dampening": Case([MOMENTUM | {"dampening": 0.4}]),
    "nesterov": Case([NESTEROV]),
    "weight decay": Case([{"weight_decay": 0.2}]),
    "maximize": Case([NESTEROV | {"maximize": True, "weight_decay": 0.1, "lr": 0.01}]),
    "groups": Case([{"lr": 0.3}, MOMENTUM | {"lr": 0.02}, NESTEROV | {"weight_decay": 0.1}]),
    "tensor lr": Case([MOMENTUM | {"lr": torch.tensor(0.05)}]),
    "tensor lr of one group": Case([{"lr": torch.tensor([0.05])}, {"lr": 0.1}]),
    "StepLR": Case([MOMENTUM, {}], lambda o: lr_scheduler.StepLR(o, 2, 0.3)),
    "StepLR, tensor": Case(
        [{"lr": torch.tensor(0.1)}], lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3)
    ),
    "CosineAnnealingLR": Case([NESTEROV], lambda o: lr_scheduler.CosineAnnealingLR(o, 6)),
    "OneCycleLR": Case(
        [MOMENTUM], lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=7, cycle_momentum=True)
    ),
}
EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}


@dataclass
class Updates:
    """What three optimizers did from the same parameters, and their momentum buffers after."""

    theta: Tensor
    dominant: Tensor
    bulk: Tensor
    sgd: Tensor
    buffers: list[list[Tensor | None]]

    def allowed(self, dtype: torch.dtype) -> float:
        """The rounding of the update, and of the parameters to which it is added."""
        rounding = torch.finfo(dtype).eps * float(self.theta.norm())
        return EXACT[dtype] * float(self.sgd.norm()) + rounding


def updates(
    case: Case, k: int, dtype: torch.dtype, foreach: bool | None, steps: int = 4
) -> Iterator[Updates]:
    """Steps all three along the path of SGD: each time they start from the same parameters."""
    models = [Quartic(dtype=dtype) for _ in range(3)]
    optimizers: list[torch.optim.Optimizer] = []
    for model, cls in zip(models, [so.DomSGD, so.BulkSGD, torch.optim.SGD], strict=True):
        parts = torch.arange(3).tensor_split(len(case.groups))
        groups = [
            {"params": [model.weights[int(i)] for i in part]} | options
            for part, options in zip(parts, case.groups, strict=True)
        ]
        # A scheduler fills a tensor rate in place, so each optimizer needs its own.
        groups = [
            {n: v.clone() if n == "lr" and isinstance(v, Tensor) else v for n, v in group.items()}
            for group in groups
        ]
        arguments: dict[str, Any] = {}
        if cls is not torch.optim.SGD:
            arguments["subspace"] = exact(model, k)
        optimizers.append(cls(groups, lr=0.05, foreach=foreach, **arguments))
    schedulers = [case.scheduler(each) for each in optimizers] if case.scheduler else []
    for _ in range(steps):
        theta = flat(models[2].parameters())
        moves, buffers = [], []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model().backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
            if optimizer is not optimizers[2]:  # torch's own writes into them, for Nesterov
                assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
            moves.append(flat(model.parameters()) - theta)
            buffers.append([optimizer.state[p].get("momentum_buffer") for p in model.parameters()])
        assert float(moves[2].norm()) > 0
        yield Updates(theta, *moves, buffers=buffers)
        for model in models[:2]:
            model.load_state_dict(models[2].state_dict())
        for scheduler in schedulers:
            scheduler.step()


kinds = pytest.mark.parametrize(
    ("dtype", "foreach"),
    [
        (torch.float32, None),
        (torch.float32, False),
        (torch.float64, True),
        (torch.float64, False),
    ],
    ids=str,
)
cases = pytest.mark.parametrize("name", CASES)


@cases
@kinds
def test_with_all_directions_dominant_there_is_sgd_and_a_standstill(
    name: str, dtype: torch.dtype, foreach: bool | None
) -> None:
    """With k = P the dominant subspace is everything, and the bulk nothing."""
    for step in updates(CASES[name], 9, dtype, foreach):
        assert float((step.dominant - step.sgd).norm()) <= step.allowed(dtype)
        assert float(step.bulk.norm()) <= EXACT[dtype] * float(step.sgd.norm())


@cases
@kinds
def test_dominant_and_bulk_update_add_up_to_that_of_sgd_with_its_buffers(
    name: str, dtype: torch.dtype, foreach: bool | None
) -> None:
    """Only the update is projected: the buffers equal torch's bit for bit at the same gradients."""
    remembered = 0
    for step in updates(CASES[name], 3, dtype, foreach):
        assert float((step.dominant + step.bulk - step.sgd).norm()) <= 2 * step.allowed(dtype)
        for part in (step.dominant, step.bulk):
            assert float(part.norm()) > 1e-3 * float(step.sgd.norm()), "nothing was projected"
        cosine = step.dominant @ step.bulk / (step.dominant.norm() * step.bulk.norm())
        assert abs(float(cosine)) < 100 * step.allowed(dtype) / float(step.sgd.norm())
        for dominant, bulk, sgd in zip(*step.buffers, strict=True):
            assert (dominant is None) == (bulk is None) == (sgd is None)
            if sgd is not None:
                assert torch.equal(dominant, sgd)
                assert torch.equal(bulk, sgd)
                remembered += 1
    assert bool(remembered) == any("momentum" in group for group in CASES[name].groups)


# The memory that is kept.


def test_another_subspace_of_the_same_size_has_other_coordinates() -> None:
    """The memory of the update is kept from step to step, in the shapes of the parameters."""
    models = [Quartic() for _ in range(2)]
    reordered = []
    for model in models:
        space = so.ParameterSpace(model, reversed(list(model.parameters())))
        order = torch.cat([torch.tensor([8]), torch.arange(6, 8), torch.arange(6)])
        vectors = torch.eye(9, dtype=torch.float64)[:3]
        reordered.append(so.FixedSubspace(model, vectors[:, order], params=space.tensors))
    optimizers = [
        so.BulkSGD(models[0].parameters(), lr=0.1, subspace=exact(models[0], 3)),
        so.BulkSGD(models[1].parameters(), lr=0.1, subspace=reordered[1]),
    ]
    models[0]().backward()
    optimizers[0].step()
    models[0].load_state_dict(models[1].state_dict())
    optimizers[0].subspace = reordered[0]
    before = flat(models[0].parameters())
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    moved = flat(models[0].parameters()) - before
    assert not moved[:3].any()  # the dominant coordinates
    assert bool((moved[3:] != 0).all())
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))


def test_a_gradient_that_is_gone_leaves_nothing_of_the_step_before() -> None:
    """Its part of the direction is zero, in memory that held another step's."""
    models = [Quartic() for _ in range(2)]
    optimizers = [so.BulkSGD(m.parameters(), lr=0.1, subspace=exact(m, 2)) for m in models]
    start = copy.deepcopy(models[0].state_dict())
    models[0]().backward()
    optimizers[0].step()
    models[0].load_state_dict(start)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.zero_grad()
        model().backward()
        model.weights[0].grad = None
        optimizer.step()
    assert torch.equal(flat(models[0].parameters()), flat(models[1].parameters()))
    assert not torch.equal(flat(models[0].parameters()), flat(start.values()))

"""What `torch.optim` promises of every optimizer, kept by those that work in a subspace."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import subspace_optim as so
from tests.checkpoints import through_a_file
from tests.optim.naive import (
    OPTIONS,
    DenseOperator,
    Quartic,
    assert_near,
    descend,
    flat,
    landscape,
    projector,
)

both = pytest.mark.parametrize("cls", [so.DomSGD, so.BulkSGD])
PART = {so.DomSGD: "dominant", so.BulkSGD: "bulk"}


def make(
    cls: Any, *, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Quartic, Any, so.DominantSubspace]:
    model = Quartic(dtype=dtype)
    tol = 1e-12 if dtype == torch.float64 else 1e-5
    subspace = so.DominantSubspace(DenseOperator(model), 2, refresh=1, tol=tol)
    return model, cls(model.parameters(), **{"lr": 0.05} | options, subspace=subspace), subspace


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(left: Any, right: Any) -> bool:
    return all(map(torch.equal, left, right))


# The step.


@both
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
    ],
    ids=str,
)
def test_a_step_writes_into_the_parameters_in_place_and_never_into_gradients(
    cls: Any, options: dict[str, Any]
) -> None:
    """Gradients accumulate here, so that a buffer which is a gradient would be seen."""
    model, optimizer, _ = make(cls, **options)
    for _ in range(3):
        model().backward()
        seen = [(p, p.data_ptr(), p.grad, p.grad.clone()) for p in model.parameters()]
        before = values(model)
        optimizer.step()
        for p, address, gradient, value in seen:
            assert p.data_ptr() == address
            assert p.grad is gradient
            assert torch.equal(gradient, value)
        assert not same(before, values(model))
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@both
def test_closure_runs_once_with_gradients_on_before_the_basis_is_used(cls: Any) -> None:
    """It moves the parameters, as no closure should: basis and gradient are those of after it."""
    model, optimizer, subspace = make(cls)
    twin, other, _ = make(cls)
    calls = []

    def closure() -> Tensor:
        calls.append((torch.is_grad_enabled(), subspace.stats.refreshes))
        for p in model.parameters():
            p.data.mul_(1.5)
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    for p in twin.parameters():
        p.data.mul_(1.5)
    expected = twin()
    expected.backward()
    other.step()
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [(True, 0)]
    assert torch.equal(loss, expected)
    assert same(model.parameters(), twin.parameters())
    assert optimizer.step() is None


@both
def test_step_hooks_and_schedulers_see_one_step(cls: Any) -> None:
    model, optimizer, _ = make(cls)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        model().backward()
        optimizer.step()
        scheduler.step()
    assert calls == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.0125


@both
def test_a_missing_gradient_is_a_zero_in_the_direction(cls: Any) -> None:
    """Its parameter moves all the same, as the projection mixes coordinates; it gets no decay."""
    model, optimizer, _ = make(cls, momentum=0.9, weight_decay=0.1)
    theta = flat(model.parameters())
    model().backward()
    model.weights[0].grad = None
    optimizer.step()
    update = -0.05 * (model.gradient(theta) + 0.1 * theta)
    update[: model.weights[0].numel()] = 0
    dominant = projector(model.hessian(theta), 2) @ update
    expected = theta + (dominant if cls is so.DomSGD else update - dominant)
    assert_near(flat(model.parameters()), expected, 1e-9)
    assert model.weights[0] not in optimizer.state
    assert not torch.equal(flat([model.weights[0]]), theta[: model.weights[0].numel()])


@both
def test_without_any_gradient_nothing_happens(cls: Any) -> None:
    model, optimizer, subspace = make(cls, momentum=0.9, weight_decay=0.1)
    before = values(model)
    optimizer.step()
    assert optimizer.step(lambda: 3.0) == 3.0
    assert same(before, values(model))
    assert (subspace.stats.refreshes, subspace.clock, len(optimizer.state)) == (0, 0, 0)


@both
@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)])
def test_with_all_rates_zero_buffers_are_made_and_nothing_moves(cls: Any, zero: Any) -> None:
    """The step with which torch prepares a checkpoint is no training step."""
    model, optimizer, subspace = make(cls, momentum=0.9, lr=zero, weight_decay=0.1)
    before = values(model)
    model().backward()
    optimizer.step()
    assert same(before, values(model))
    assert (subspace.stats.refreshes, subspace.clock) == (0, 0)
    assert set(optimizer.state) == set(model.parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    assert subspace.stats.refreshes == 1
    assert not same(before, values(model))


@both
def test_one_rate_above_zero_moves(cls: Any) -> None:
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 2)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.weights, (0, 0, 0.1), strict=True)]
    optimizer = cls(groups, subspace=subspace)
    before = values(model)
    model().backward()
    optimizer.step()
    assert subspace.stats.refreshes == 1
    assert not torch.equal(before[0], model.weights[0])


class Odd(nn.Module):
    """Tied, non-contiguous and 0-d parameters, of which nothing is in the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        draw = torch.randn(3, 2, generator=random, dtype=torch.float64)
        self.encoder = nn.Parameter(draw.t())  # (2, 3) with strides (1, 2)
        self.decoder = self.encoder
        self.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64)[::2])
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(x @ self.encoder.T) @ self.decoder + self.bias


@both
def test_tied_non_contiguous_and_0d_parameters_take_the_same_steps(cls: Any) -> None:
    model = Odd()
    assert not model.encoder.is_contiguous()
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theta = flat(model.parameters())
    assert len(theta) == 10
    chosen = OPTIONS | {"lr": 0.1, "momentum": 0.9}
    dense = landscape(model, nn.functional.mse_loss, x, x)
    groups = [(torch.arange(10), chosen)]
    path = descend(dense, theta, groups, part=PART[cls], k=2, steps=3)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, x))
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=1e-12)
    optimizer = cls(model.parameters(), **chosen, subspace=subspace)
    for expected in path[1:]:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), x).backward()
        optimizer.step()
        assert_near(flat(model.parameters()), expected, 1e-8)
    assert model.encoder is model.decoder
    assert not model.encoder.is_contiguous()


def network(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).to(dtype)
    for p in model.parameters():
        p.data.copy_(torch.randn(p.shape, generator=random))
    x, y = torch.randn(8, 3, generator=random), torch.randn(8, 2, generator=random)
    return model, x.to(dtype), y.to(dtype)


@both
def test_frozen_parameters_are_passed_over(cls: Any) -> None:
    """In the optimizer they may be: they do not move, and the Hessian is that of the others."""
    model, x, y = network()
    for p in model[0].parameters():
        p.requires_grad_(False)
    frozen, free = values(model[0]), flat(model[2].parameters())
    with torch.no_grad():
        hidden = model[1](model[0](x))
    dense = landscape(model[2], nn.functional.mse_loss, hidden, y)
    groups = [(torch.arange(8), OPTIONS | {"weight_decay": 0.3})]
    path = descend(dense, free, groups, part=PART[cls], k=2, steps=2)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    assert hessian.size == 8
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=1e-12)
    optimizer = cls(model.parameters(), lr=0.05, weight_decay=0.3, subspace=subspace)
    model[0].weight.grad = torch.ones_like(model[0].weight)  # left over from before the freeze
    for expected in path[1:]:
        optimizer.zero_grad(set_to_none=False)
        nn.functional.mse_loss(model(x), y).backward()
        model[0].weight.grad.fill_(1.0)
        optimizer.step()
        assert_near(flat(model[2].parameters()), expected, 1e-8)
    assert same(frozen, model[0].parameters())


@both
def test_bf16_parameters_have_a_float32_basis(cls: Any) -> None:
    """The parameters are rounded once, at the end; buffers are torch's, in bf16."""
    model, x, y = network(torch.bfloat16)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    subspace = so.DominantSubspace(hessian, 2, refresh=1, tol=1e-5)
    optimizer = cls(model.parameters(), lr=10.3, momentum=0.9, subspace=subspace)
    nn.functional.mse_loss(model(x), y).backward()
    theta = flat(model.parameters())
    update = -10.3 * flat(p.grad for p in model.parameters())
    dense = landscape(model, nn.functional.mse_loss, x, y).hessian(theta)
    dominant = projector(dense, 2) @ update
    moved = dominant if cls is so.DomSGD else update - dominant
    optimizer.step()
    basis = subspace.basis
    assert basis is not None
    assert basis.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(s["momentum_buffer"].dtype == torch.bfloat16 for s in optimizer.state.values())
    expected = theta + moved
    half_ulp = torch.finfo(torch.bfloat16).eps / 2 * expected.abs()
    error = (flat(model.parameters()) - expected).abs()
    assert bool((error <= 1.01 * half_ulp + 1e-4 * update.norm()).all())
    assert float(error.norm()) < 0.1 * float(moved.norm())


@both
def test_the_basis_survives_a_checkpoint_of_a_bf16_model_in_float32(cls: Any) -> None:
    """torch casts an optimizer's state to the dtype of its parameters: the basis is not in it."""
    model, x, y = network(torch.bfloat16)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    subspace = so.DominantSubspace(hessian, 2)
    optimizer = cls(model.parameters(), lr=0.1, momentum=0.9, subspace=subspace)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    basis = subspace.update()
    subspace.load_state_dict(through_a_file(subspace.state_dict()))
    assert subspace.basis is not None
    assert torch.equal(subspace.basis.vectors, basis.vectors)
    assert {n for s in optimizer.state.values() for n in s} == {"momentum_buffer"}


@pytest.mark.parametrize("injected", [math.inf, math.nan])
@both
def test_a_step_that_the_gradient_scaler_skips_is_no_step(cls: Any, injected: float) -> None:
    model, optimizer, subspace = make(cls, dtype=torch.float32, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    monitor = so.Monitor(optimizer, subspace)
    before = values(model)

    scaler.scale(model()).backward()
    model.weights[0].grad.view(-1)[0] = injected
    scaler.step(optimizer)
    scaler.update()
    assert same(before, values(model))
    assert (subspace.stats.refreshes, subspace.clock, len(optimizer.state)) == (0, 0, 0)
    assert monitor.history["step"] == []
    assert scaler.get_scale() == 4.0

    twin, plain, _ = make(cls, dtype=torch.float32, momentum=0.9)
    optimizer.zero_grad()
    scaler.scale(model()).backward()
    scaler.step(optimizer)
    twin().backward()
    plain.step()
    assert_near(flat(model.parameters()), flat(twin.parameters()), 1e-6)
    assert (subspace.stats.refreshes, monitor.history["step"]) == (1, [0])


# Signature, groups and bad input.


@both
def test_the_arguments_are_those_of_torch_sgd_and_subspace(cls: Any) -> None:
    theirs = dict(inspect.signature(torch.optim.SGD).parameters)
    ours = dict(inspect.signature(cls).parameters)
    subspace = ours.pop("subspace")
    assert subspace.kind is inspect.Parameter.KEYWORD_ONLY
    assert subspace.default is inspect.Parameter.empty
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@both
def test_positional_arguments_mean_what_they_mean_to_torch(cls: Any) -> None:
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 2)
    optimizer = cls(model.parameters(), 0.1, 0.9, 0.0, 0.01, True, subspace=subspace)
    theirs = torch.optim.SGD(model.parameters(), 0.1, 0.9, 0.0, 0.01, True)
    assert optimizer.defaults == theirs.defaults
    assert optimizer.param_groups == theirs.param_groups


NUMBER = "a finite number of at least 0"
BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, f"lr is -0.1, but must be {NUMBER}."),
    ({"lr": math.nan}, f"lr is nan, but must be {NUMBER}."),
    ({"lr": math.inf}, f"lr is inf, but must be {NUMBER}."),
    ({"lr": "0.1"}, f"lr is '0.1', but must be {NUMBER}."),
    ({"lr": None}, f"lr is None, but must be {NUMBER}."),
    ({"lr": torch.tensor([0.1, 0.2])}, f"lr is tensor([0.1000, 0.2000]), but must be {NUMBER}."),
    ({"lr": torch.tensor(-1.0)}, f"lr is tensor(-1.), but must be {NUMBER}."),
    ({"momentum": -0.9}, f"momentum is -0.9, but must be {NUMBER}."),
    ({"momentum": True}, f"momentum is True, but must be {NUMBER}."),
    ({"momentum": torch.tensor(0.9)}, f"momentum is tensor(0.9000), but must be {NUMBER}."),
    ({"dampening": math.nan}, "dampening is nan, but must be a finite number."),
    ({"dampening": None}, "dampening is None, but must be a finite number."),
    ({"weight_decay": -1e-4}, f"weight_decay is -0.0001, but must be {NUMBER}."),
    ({"weight_decay": math.inf}, f"weight_decay is inf, but must be {NUMBER}."),
    ({"nesterov": True}, "nesterov is True, but must be False without momentum"),
    (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
        "nesterov is True, but must be False without momentum or with dampening. Set momentum",
    ),
    ({"nesterov": 1}, "nesterov is 1, but must be True or False."),
    ({"maximize": None}, "maximize is None, but must be True or False."),
    ({"foreach": 1}, "foreach is 1, but must be True, False or None."),
    ({"fused": "yes"}, "fused is 'yes', but must be True, False or None."),
    ({"fused": True}, "fused is True, but must be False or None. A fused kernel applies"),
    ({"differentiable": True}, "differentiable is True, but must be False. The eigenbasis is"),
    ({"differentiable": 0}, "differentiable is 0, but must be True or False."),
]


def bad(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize("place", ["defaults", "group", "add_param_group", "load_state_dict"])
@pytest.mark.parametrize(("options", "message"), BAD, ids=[bad(options) for options, _ in BAD])
def test_a_bad_option_is_named_wherever_it_is_given(
    options: dict[str, Any], message: str, place: str
) -> None:
    """Each group is checked, where torch's own optimizers check the defaults only."""
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 2)
    first, *others = model.parameters()
    group = {"params": others, **options}
    given = dict(group)
    optimizer = so.DomSGD([first], lr=0.1, subspace=subspace)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(before)
    state["param_groups"][0] |= options
    attempts: dict[str, Callable[[], Any]] = {
        "defaults": lambda: so.DomSGD([first], **options, subspace=subspace),
        "group": lambda: so.BulkSGD([{"params": [first]}, group], lr=0.1, subspace=subspace),
        "add_param_group": lambda: optimizer.add_param_group(group),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    with pytest.raises(so.ArgumentError, match=f"^{re.escape(message)}"):
        attempts[place]()
    assert optimizer.state_dict() == before
    assert group == given, "the group of the caller was changed"
    assert subspace.stats.refreshes == 0


def test_a_good_group_can_be_added_and_counts() -> None:
    model, whole, _ = make(so.DomSGD)
    twin, _, subspace = make(so.DomSGD)
    first, *others = twin.parameters()
    optimizer = so.DomSGD([first], lr=0.05, subspace=subspace)
    optimizer.add_param_group({"params": others})
    for each, own in ((whole, model), (optimizer, twin)):
        own().backward()
        each.step()
    assert same(model.parameters(), twin.parameters())


def test_torchs_own_checks_of_a_group_change_nothing() -> None:
    model, optimizer, _ = make(so.DomSGD)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [model.weights[0]]})
    assert len(optimizer.param_groups) == 1


@both
def test_a_parameter_of_another_model_is_refused(cls: Any) -> None:
    model, optimizer, subspace = make(cls)
    stranger = nn.Linear(2, 5)
    message = re.escape(
        "parameter of shape (5, 2) is 'of another model', but must be one that the operator "
        "differentiates by. Build operator and subspace from the model"
    )
    with pytest.raises(so.ArgumentError, match=message):
        cls(stranger.parameters(), lr=0.1, subspace=subspace)
    with pytest.raises(so.ArgumentError, match=message):
        optimizer.add_param_group({"params": stranger.parameters()})
    assert len(optimizer.param_groups) == 1
    model().backward()
    optimizer.step()


@both
def test_a_parameter_that_the_operator_has_not_is_named_as_in_the_model(cls: Any) -> None:
    model, x, y = network()
    hessian = so.HessianOperator(
        model, nn.functional.mse_loss, (x, y), params=model[2].parameters()
    )
    subspace = so.DominantSubspace(hessian, 2)
    with pytest.raises(
        so.ArgumentError, match=r"^parameter '0\.weight' is .*Add it to the `params"
    ):
        cls(model.parameters(), lr=0.1, subspace=subspace)
    optimizer = cls(model[2].parameters(), lr=0.1, subspace=subspace)
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    assert subspace.stats.refreshes == 1


def test_what_the_optimizer_lacks_is_named_at_the_step() -> None:
    model, x, y = network()
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    subspace = so.DominantSubspace(hessian, 2)
    optimizer = so.DomSGD(model[2].parameters(), lr=0.1, subspace=subspace)
    nn.functional.mse_loss(model(x), y).backward()
    before = values(model)
    with pytest.raises(so.ArgumentError, match=r"parameter '0\.weight' of the operator is 'in no"):
        optimizer.step()
    assert same(before, model.parameters())
    assert (subspace.stats.refreshes, len(optimizer.state)) == (0, 0)


def test_a_parameter_that_was_frozen_since_is_named_at_the_step() -> None:
    model, optimizer, subspace = make(so.BulkSGD)
    model().backward()
    model.weights[1].requires_grad_(False)
    before = values(model)
    with pytest.raises(so.ArgumentError, match=r"parameter 'weights\.1' of the .* 'frozen since'"):
        optimizer.step()
    assert same(before, model.parameters())
    assert subspace.stats.refreshes == 0


def test_a_parameter_that_was_unfrozen_since_is_named_at_the_step() -> None:
    model, x, y = network()
    model[0].bias.requires_grad_(False)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    optimizer = so.DomSGD(model.parameters(), lr=0.1, subspace=so.DominantSubspace(hessian, 2))
    model[0].bias.requires_grad_(True)
    nn.functional.mse_loss(model(x), y).backward()
    with pytest.raises(so.ArgumentError, match=r"parameter '0\.bias' is .*not the operator's"):
        optimizer.step()


def test_a_sparse_gradient_is_refused_with_the_way_out() -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    x, y = torch.tensor([0, 3, 3]), torch.zeros(3, 1)
    hessian = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    subspace = so.DominantSubspace(hessian, 2)
    optimizer = so.DomSGD(model.parameters(), lr=0.1, momentum=0.9, subspace=subspace)
    nn.functional.mse_loss(model(x), y).backward()
    before = values(model)
    message = r"gradient of '0\.weight' is torch\.sparse_coo, but must be dense\. Use sparse=False"
    with pytest.raises(so.ArgumentError, match=message):
        optimizer.step()
    assert same(before, model.parameters())
    assert (subspace.stats.refreshes, len(optimizer.state)) == (0, 0)


@both
@pytest.mark.parametrize("kind", ["NoneType", "HessianOperator", "EigenBasis", "Linear", "int"])
def test_what_is_no_subspace_is_named(cls: Any, kind: str) -> None:
    model = nn.Linear(2, 1)
    hessian = so.HessianOperator(
        model, nn.functional.mse_loss, (torch.ones(3, 2), torch.ones(3, 1))
    )
    basis = so.DominantSubspace(hessian, 1).update()
    found = {type(v).__name__: v for v in (None, hessian, basis, model, 3)}
    with pytest.raises(so.ArgumentError, match=f"^subspace is '{kind}', but must be a subspace"):
        cls(model.parameters(), lr=0.1, subspace=found[kind])


@both
def test_a_subspace_is_required(cls: Any) -> None:
    with pytest.raises(TypeError, match="subspace"):
        cls(Quartic().parameters(), lr=0.1)


# Saved, loaded, copied.


@both
def test_an_optimizer_copied_or_pickled_alone_says_what_to_set(cls: Any) -> None:
    model, optimizer, _ = make(cls, momentum=0.9)
    model().backward()
    optimizer.step()
    for alone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert alone.subspace is None
        assert alone.defaults == optimizer.defaults
        remembered = [s["momentum_buffer"] for s in alone.state.values()]
        assert same(remembered, (s["momentum_buffer"] for s in optimizer.state.values()))
        own = alone.param_groups[0]["params"]
        assert not {id(p) for p in own} & {id(p) for p in model.parameters()}
        before = [p.detach().clone() for p in own]
        for attempt in (
            alone.step,
            lambda o=alone: o.add_param_group({"params": nn.Linear(1, 1).weight}),
        ):
            with pytest.raises(so.ArgumentError, match=r"set `optimizer\.subspace`"):
                attempt()
        assert same(before, own)
        assert len(alone.param_groups) == 1


def test_a_copy_that_is_given_a_subspace_goes_on() -> None:
    model, optimizer, _ = make(so.DomSGD, momentum=0.9)
    model().backward()
    optimizer.step()
    twin, alone = pickle.loads(pickle.dumps((model, optimizer)))
    alone.subspace = so.DominantSubspace(DenseOperator(twin), 2, refresh=1, tol=1e-12)
    for own, each in ((model, optimizer), (twin, alone)):
        own.zero_grad()
        own().backward()
        each.step()
    assert same(model.parameters(), twin.parameters())


@both
def test_a_state_dict_goes_through_a_file(cls: Any) -> None:
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "lr": torch.tensor(0.05)}
    model, optimizer, _ = make(cls, **options)
    for _ in range(2):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    twin, resumed, _ = make(cls)
    twin.load_state_dict(through_a_file(model.state_dict()))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    assert resumed.subspace is not None
    for own, each in ((model, optimizer), (twin, resumed)):
        own.zero_grad()
        own().backward()
        each.step()
    assert same(model.parameters(), twin.parameters())
    assert resumed.param_groups[0]["nesterov"] is True


@both
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_torch_sgd_can_be_loaded_and_the_other_way(cls: Any, momentum: float) -> None:
    """After it both have the same buffers: the next update is torch's, projected."""
    model, optimizer, _ = make(cls, lr=0.9)
    twin = Quartic()
    theirs = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=momentum)
    for _ in range(2):
        theirs.zero_grad()
        twin().backward()
        theirs.step()
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(through_a_file(theirs.state_dict()))
    theta = flat(model.parameters())
    for own, each in ((model, optimizer), (twin, theirs)):
        own.zero_grad()
        own().backward()
        each.step()
    update = flat(twin.parameters()) - theta
    dominant = projector(model.hessian(theta), 2) @ update
    expected = dominant if cls is so.DomSGD else update - dominant
    assert_near(flat(model.parameters()) - theta, expected, 1e-9)
    theirs.load_state_dict(optimizer.state_dict())
    mine, yours = optimizer.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert mine["state"].keys() == yours["state"].keys()


@both
def test_distributed_checkpoints_of_a_fresh_optimizer_cost_no_refresh_and_no_row(cls: Any) -> None:
    """torch fills a fresh state by a step with zero gradients and zero rates. No process group."""
    model, optimizer, subspace = make(cls, momentum=0.9)
    monitor = so.Monitor(optimizer, subspace)
    before = values(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert same(before, model.parameters())
    assert (subspace.stats.refreshes, subspace.clock, monitor.history["step"]) == (0, 0, [])
    names = {name for name, _ in model.named_parameters()}
    assert set(state["state"]) == names
    assert all(set(entry) == {"momentum_buffer"} for entry in state["state"].values())
    assert optimizer.param_groups[0]["lr"] == 0.05


@both
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_distributed_checkpoints_resume(cls: Any, momentum: float) -> None:
    model, optimizer, _ = make(cls, momentum=momentum)
    for _ in range(2):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin, resumed, subspace = make(cls, momentum=momentum, lr=0.3)
    twin.load_state_dict(model.state_dict())
    set_optimizer_state_dict(twin, resumed, state)
    assert subspace.stats.refreshes == 0
    for own, each in ((model, optimizer), (twin, resumed)):
        own.zero_grad()
        own().backward()
        each.step()
    assert same(model.parameters(), twin.parameters())

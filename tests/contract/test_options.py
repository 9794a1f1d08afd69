"""Options, groups and parameters that cannot be used: one clear error, before anything changes."""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so
from tests.contract.cases import (
    CASES,
    IN_SUBSPACE,
    LR,
    OBSERVING,
    OURS,
    PROJECTED,
    Case,
    in_subspace,
    ours,
)
from tests.contract.runs import Run, same
from tests.contract.settings import Setting, data, network, quartic
from tests.optim.naive import DenseOperator, GivenSubspace, Quartic, dense_eigenbasis, exact

LIKE_SGD = [case for case in OURS if case.part != "newton"]


def build(case: Case, params: Any, subspace: Any, **options: Any) -> Any:
    return case.ours(params, **options, **({"subspace": subspace} if case.has_subspace else {}))


# Signatures.

THEIRS = [*inspect.signature(torch.optim.SGD).parameters.values()]


@pytest.mark.parametrize("case", LIKE_SGD, ids=str)
def test_the_arguments_are_those_of_torch_sgd_with_rho_and_subspace(case: Case) -> None:
    ours = dict(inspect.signature(case.ours).parameters)
    if case.has_subspace:
        subspace = ours.pop("subspace")
        assert subspace.kind is inspect.Parameter.KEYWORD_ONLY
        assert subspace.default is inspect.Parameter.empty
    if case.sam:
        assert list(ours)[:3] == ["params", "lr", "rho"]
        assert (ours.pop("rho").default, ours.pop("adaptive").default) == (0.05, False)
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in THEIRS
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LowRankNewton", {"lr": 1.0, "damping": 0.0, "bulk_ratio": 0.0, "momentum": 0.0}),
        (
            "ClassGradientQuasiNewton",
            {"lr": 0.1, "newton_lr": 1.0, "damping": 0.0, "momentum": 0.9},
        ),
    ],
)
def test_the_arguments_of_newton_are_these(name: str, expected: dict[str, float]) -> None:
    ours = dict(inspect.signature(CASES[name].ours).parameters)
    assert ours.pop("subspace").kind is inspect.Parameter.KEYWORD_ONLY
    del ours["params"]
    assert {n: p.default for n, p in ours.items()} == expected


@pytest.mark.parametrize("case", LIKE_SGD, ids=str)
def test_positional_arguments_mean_what_they_mean_to_torch(case: Case) -> None:
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 2)
    radius = [0.3] if case.sam else []
    extra = {"subspace": subspace} if case.has_subspace else {}
    optimizer = case.ours(model.parameters(), 0.1, *radius, 0.9, 0.0, 0.01, True, **extra)
    theirs = torch.optim.SGD(model.parameters(), 0.1, 0.9, 0.0, 0.01, True)
    own = {"rho": 0.3, "adaptive": False} if case.sam else {}
    assert optimizer.defaults == theirs.defaults | own
    assert optimizer.param_groups == [theirs.param_groups[0] | own]


# Options that cannot be used.

NUMBER = "a finite number of at least 0"
Bad = list[tuple[dict[str, Any], str]]


def numbers(*names: str) -> Bad:
    values = (-0.5, math.nan, math.inf, "0.1", None, True)
    return [({n: v}, f"{n} is {v!r}, but must be {NUMBER}.") for n in names for v in values]


RATES: Bad = [
    *numbers("lr"),
    ({"lr": torch.tensor([0.1, 0.2])}, f"lr is tensor([0.1000, 0.2000]), but must be {NUMBER}."),
    ({"lr": torch.tensor(-1.0)}, f"lr is tensor(-1.), but must be {NUMBER}."),
    ({"lr": torch.tensor(math.nan)}, f"lr is tensor(nan), but must be {NUMBER}."),
    ({"lr": torch.tensor(1j)}, f"lr is tensor(0.+1.j), but must be {NUMBER}."),
    *numbers("momentum"),
    ({"momentum": torch.tensor(0.9)}, f"momentum is tensor(0.9000), but must be {NUMBER}."),
]
SGD: Bad = [
    *RATES,
    ({"dampening": math.nan}, "dampening is nan, but must be a finite number."),
    ({"dampening": None}, "dampening is None, but must be a finite number."),
    *numbers("weight_decay"),
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
RADIUS: Bad = [
    *SGD,
    *numbers("rho"),
    ({"rho": torch.tensor(0.1)}, f"rho is tensor(0.1000), but must be {NUMBER}."),
    ({"adaptive": 1}, "adaptive is 1, but must be True or False."),
    ({"adaptive": None}, "adaptive is None, but must be True or False."),
]
BAD: dict[str, Bad] = {
    "DomSGD": SGD,
    "BulkSGD": SGD,
    "SAM": RADIUS,
    "DomSAM": RADIUS,
    "BulkSAM": RADIUS,
    "LowRankNewton": [*RATES, *numbers("damping", "bulk_ratio")],
    "ClassGradientQuasiNewton": [*RATES, *numbers("damping", "newton_lr")],
}
PLACES = ["defaults", "group", "add_param_group", "load_state_dict"]


def test_each_option_of_each_optimizer_is_given_badly() -> None:
    for case in OURS:
        run = Run(case)
        options = set(build(case, run.setting.trained, run.subspace, lr=0.1).defaults)
        assert options == {name for options, _ in BAD[case.name] for name in options}


def label(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        pytest.param(CASES[name], options, message, id=f"{name} {label(options)}")
        for name, table in BAD.items()
        for options, message in table
    ],
)
def test_a_bad_option_is_named_wherever_it_is_given(
    case: Case, options: dict[str, Any], message: str
) -> None:
    """Each group is checked, where torch's own optimizers check the defaults only."""
    model = Quartic()
    subspace = exact(model, 2)
    first, *others = model.parameters()
    group = {"params": others, **options}
    given = dict(group)
    optimizer = build(case, [first], subspace, lr=0.1)
    before = optimizer.state_dict()
    state = {"state": {}, "param_groups": [before["param_groups"][0] | options]}
    attempts: dict[str, Callable[[], Any]] = {
        "defaults": lambda: build(case, [first], subspace, **options),
        "group": lambda: build(case, [{"params": [first]}, group], subspace, lr=0.1),
        "add_param_group": lambda: optimizer.add_param_group(group),
        "load_state_dict": lambda: optimizer.load_state_dict(state),
    }
    assert list(attempts) == PLACES
    for place, attempt in attempts.items():
        with pytest.raises(so.ArgumentError, match=f"^{re.escape(message)}"):
            attempt()
        assert optimizer.state_dict() == before, place
        assert group == given, f"the group of the caller was changed: {place}"
    assert subspace.refreshes == 0


@pytest.mark.parametrize("place", PLACES)
def test_the_rate_of_the_quasi_newton_method_begins_above_zero(place: str) -> None:
    """Later, and in a checkpoint, it may be 0: a schedule may end there."""
    model = Quartic()
    subspace = so.DominantSubspace(DenseOperator(model), 2)
    first, *others = model.parameters()
    zero = {"lr": 0.0}
    cls = so.ClassGradientQuasiNewton
    optimizer = cls([first], subspace=subspace)
    attempts: dict[str, Callable[[], Any]] = {
        "defaults": lambda: cls([first], **zero, subspace=subspace),
        "group": lambda: cls([{"params": [first]}, {"params": others} | zero], subspace=subspace),
        "add_param_group": lambda: optimizer.add_param_group({"params": others} | zero),
    }
    if place == "load_state_dict":
        state = optimizer.state_dict()
        state["param_groups"][0] |= zero
        optimizer.load_state_dict(state)
        assert optimizer.param_groups[0]["lr"] == 0
    else:
        message = re.escape("lr is 0.0, but must be a finite number above 0. newton_lr is scaled")
        with pytest.raises(so.ArgumentError, match=message):
            attempts[place]()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("bad", [0.0, math.nan, "0.1", None], ids=repr)
def test_a_checkpoint_with_a_bad_first_rate_is_refused(bad: Any) -> None:
    """It is an entry of each group, which the step divides by."""
    run = Run(CASES["ClassGradientQuasiNewton"])
    state = copy.deepcopy(run.optimizer.state_dict())
    state["param_groups"][0]["first_lr"] = bad
    with pytest.raises(so.ArgumentError, match="first_lr"):
        run.optimizer.load_state_dict(state)


# Groups that can be used.


@ours
def test_a_good_group_can_be_added_and_counts(case: Case) -> None:
    run, other = Run(case, two_groups=True), Run(case)
    first, second = (dict(group) for group in run.groups)
    for group in (first, second):
        group["params"] = [
            q
            for p, q in zip(run.setting.trained, other.setting.trained, strict=True)
            if any(p is held for held in group["params"])
        ]
        group.pop("first_lr", None)
    extra = {"subspace": other.subspace} if case.has_subspace else {}
    other.optimizers = [case.ours([first], **extra)]
    other.optimizer.add_param_group(second)
    for _ in range(2):
        for one in (run, other):
            one.step()
    assert same(run.values(), other.values())


@ours
def test_torchs_own_checks_of_groups_change_nothing(case: Case) -> None:
    run = Run(case)
    with pytest.raises(ValueError, match="more than one parameter group"):
        run.optimizer.add_param_group({"params": [run.model.weights[0]]})
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        run.optimizer.add_param_group({"params": [3.0]})
    assert len(run.optimizer.param_groups) == 1
    first = run.model.weights[0]
    with pytest.raises(TypeError, match="should be an iterable of Tensors"):
        build(case, first, run.subspace, lr=LR)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        build(case, [first, first], run.subspace, lr=LR)
    with pytest.raises(ValueError, match="empty parameter list"):
        build(case, [], run.subspace, lr=LR)
    with pytest.raises(ValueError, match="with/without names"):
        build(case, [("weight", first), run.model.weights[1]], run.subspace, lr=LR)


def test_a_group_that_is_no_dictionary_is_refused_as_torch_does() -> None:
    run = Run(OURS[0])
    with pytest.raises(TypeError, match="must be a dict"):
        run.optimizer.add_param_group([run.model.weights[0]])


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.5}, {"maximize": True}, {"nesterov": True}, {"dampening": 0.5}],
    ids=label,
)
@pytest.mark.parametrize("case", [c for c in OURS if c.part == "newton"], ids=str)
def test_an_option_that_an_optimizer_has_not_changes_nothing_in_a_group(
    case: Case, options: dict[str, Any]
) -> None:
    """Torch takes any entry of a group, and of the state of `torch.optim.SGD`, and ignores it."""
    run, other = Run(case), Run(case, **options)
    for _ in range(2):
        for one in (run, other):
            one.step()
    assert same(run.values(), other.values())


# Parameters that cannot be used.


@in_subspace
def test_a_parameter_of_another_model_is_refused(case: Case) -> None:
    run = Run(case)
    stranger = nn.Linear(2, 5)
    message = re.escape(
        "parameter of shape (5, 2) is 'of another model', but must be one that the operator "
        "differentiates by. Build operator and subspace from the model"
    )
    with pytest.raises(so.ArgumentError, match=message):
        build(case, stranger.parameters(), run.subspace, lr=0.1)
    with pytest.raises(so.ArgumentError, match=message):
        run.optimizer.add_param_group({"params": stranger.parameters()})
    assert len(run.optimizer.param_groups) == 1
    run.step()


def last_layer() -> tuple[Setting, nn.Module, so.DominantSubspace]:
    """The network, whose operator differentiates by its last layer alone."""
    setting = network()
    model, x, y = setting.model, *data()[1:]
    own = so.HessianOperator(model, nn.functional.mse_loss, (x, y), params=model[2].parameters())
    return setting, model, so.DominantSubspace(own, 2)


@in_subspace
def test_a_parameter_that_the_operator_has_not_is_named_as_in_the_model(case: Case) -> None:
    setting, model, subspace = last_layer()
    with pytest.raises(
        so.ArgumentError, match=r"^parameter '0\.weight' is .*Add it to the `params"
    ):
        build(case, model.parameters(), subspace, lr=0.1)
    run = Run(case, setting, subspace=subspace, params=model[2].parameters())
    run.step()
    assert subspace.stats.refreshes == 1


@pytest.mark.parametrize("case", [*IN_SUBSPACE, *PROJECTED[:1]], ids=str)
def test_what_the_optimizer_lacks_is_named_at_the_step(case: Case) -> None:
    """By a projection too, as a group may be taken away after it was made."""
    setting = network()
    run = Run(case, setting, params=None if not case.ours else setting.model[2].parameters())
    if not case.ours:
        run.optimizer.param_groups[0]["params"] = list(setting.model[2].parameters())
    before = run.values()
    with pytest.raises(so.ArgumentError, match=r"parameter '0\.weight' of the operator is 'in no"):
        run.step()
    assert same(before, run.values())
    assert (run.refreshes, len(run.optimizer.state)) == (0, 0)


@pytest.mark.parametrize("case", [*IN_SUBSPACE, *PROJECTED[:1]], ids=str)
def test_a_parameter_that_was_frozen_since_is_named_at_the_step(case: Case) -> None:
    run = Run(case)
    run.model.weights[1].requires_grad_(False)
    before = run.values()
    with pytest.raises(so.ArgumentError, match=r"parameter 'weights\.1' of the .* 'frozen since'"):
        run.step()
    assert same(before, run.values())
    assert run.refreshes == 0


@pytest.mark.parametrize("case", [*IN_SUBSPACE, *PROJECTED[:1]], ids=str)
def test_a_parameter_that_was_unfrozen_since_is_named_at_the_step(case: Case) -> None:
    model, x, y = data()
    model[0].bias.requires_grad_(False)
    operator = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    mse = nn.functional.mse_loss
    setting = Setting(model, lambda: mse(model(x), y), lambda theta: theta, operator)
    run = Run(case, setting, everything=True)
    model[0].bias.requires_grad_(True)
    before = run.values()
    with pytest.raises(so.ArgumentError, match=r"parameter '0\.bias' is .*not the operator's"):
        run.step()
    assert same(before, run.values())


@in_subspace
def test_a_sparse_gradient_is_refused_with_the_way_out(case: Case) -> None:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1))
    x, y = torch.tensor([0, 3, 3]), torch.zeros(3, 1)
    operator = so.HessianOperator(model, nn.functional.mse_loss, (x, y))
    mse = nn.functional.mse_loss
    setting = Setting(model, lambda: mse(model(x), y), lambda theta: theta, operator)
    # A basis that is there already: the operator, which refuses them too, is not asked.
    fixed = GivenSubspace(setting.operator.parameters, dense_eigenbasis(13, 2, 0, torch.float32))
    run = Run(case, setting, subspace=fixed)
    before = run.values()
    message = r"gradient of '0\.weight' is torch\.sparse_coo, but must be dense\. Use sparse=False"
    with pytest.raises(so.ArgumentError, match=message):
        run.step()
    assert same(before, run.values())
    assert not run.optimizer.state


def test_sam_itself_refuses_a_sparse_gradient_before_it_moves() -> None:
    """It has no subspace, and no operator's name for the parameter."""
    layer = nn.Embedding(5, 2, sparse=True)
    optimizer = so.SAM(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = layer(torch.tensor([0, 3, 3])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(so.ArgumentError, match=r"sparse_coo, but must be dense"):
        optimizer.step(closure)
    assert torch.equal(before, layer.weight)


@in_subspace
@pytest.mark.parametrize("kind", ["NoneType", "HessianOperator", "EigenBasis", "Linear", "int"])
def test_what_is_no_subspace_is_named(case: Case, kind: str) -> None:
    model = nn.Linear(2, 1)
    hessian = so.HessianOperator(
        model, nn.functional.mse_loss, (torch.ones(3, 2), torch.ones(3, 1))
    )
    basis = so.DominantSubspace(hessian, 1).update()
    found = {type(v).__name__: v for v in (None, hessian, basis, model, 3)}
    with pytest.raises(so.ArgumentError, match=f"^subspace is '{kind}', but must be a subspace"):
        build(case, model.parameters(), found[kind], lr=0.1)
    with pytest.raises(so.ArgumentError, match=r"^subspace is 'type', but must be a subspace"):
        build(case, model.parameters(), so.DominantSubspace, lr=0.1)


@in_subspace
def test_a_subspace_is_required(case: Case) -> None:
    with pytest.raises(TypeError, match="subspace"):
        case.ours(Quartic().parameters(), lr=0.1)


@pytest.mark.parametrize("case", [*IN_SUBSPACE, *PROJECTED[:1]], ids=str)
def test_only_newton_takes_vectors_that_are_not_orthogonal(case: Case) -> None:
    """The others say so when they are made, or at the step at the latest."""
    observing = Run(OBSERVING)
    setting, subspace = observing.setting, observing.subspace
    subspace.observe(*setting.batch)
    before = observing.values()
    if case.part == "newton":
        Run(case, setting, subspace=subspace).step()
        assert not same(before, observing.values())
        return

    def attempt() -> None:
        Run(case, setting, subspace=subspace).step()

    with pytest.raises(so.ArgumentError, match=r"orthogonal=True"):
        attempt()
    assert same(before, observing.values())


def test_the_problem_has_a_parameter_of_each_kind() -> None:
    assert [p.dim() for p in quartic().trained] == [2, 1, 0]

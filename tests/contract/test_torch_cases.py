"""The cases of torch's own optimizer tests: which of them apply to which of our optimizers.

Two tables of data, which the docs show, and tests that take them at their word:

* `OPTIONS`: the option ranges (`optim_inputs_func_sgd` in `common_optimizers`) that apply to ours.
  To `project_updates` all ranges of all optimizers apply: they are read from torch and stepped.
* `TESTS`: the tests of `TestOptimRenewed`, with the test here that stands for each.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import subspace_optim as so
from tests.checkpoints import through_a_file
from tests.contract.cases import (
    CASES,
    EACH_ALGORITHM,
    LR,
    OURS,
    Case,
    muon_and_adamw,
    one,
    ours_observing,
)
from tests.contract.runs import Reference, Run, pair, same
from tests.contract.settings import quartic
from tests.optim.naive import assert_near

# What applies. ---------------------------------------------------------------------------------

_SGD_LIKE = ("DomSGD", "BulkSGD", "SAM", "DomSAM", "BulkSAM")
_NEWTON = ("LowRankNewton", "ClassGradientQuasiNewton")
_NO_DECAY = "a Newton step divides by the eigenvalues: decay would be divided too"
_NO_ASCENT = "a Newton step goes to where the gradient is 0: it does not maximize"
_ONE_MOMENTUM = "one momentum: the direction is the plain buffer of raw gradients"

# The description of each input that torch's tests give SGD: why it does not apply to Newton's
# methods, or None. All of them apply to DomSGD, BulkSGD, SAM, DomSAM and BulkSAM.
OPTIONS: dict[str, str | None] = {
    "default": None,
    "non-default lr": None,
    "tensor lr": None,
    "non-zero weight_decay": _NO_DECAY,
    "momentum": None,
    "maximize": _NO_ASCENT,
    "dampening": _ONE_MOMENTUM,
    "weight_decay w/ momentum": _NO_DECAY,
    "nesterov": _ONE_MOMENTUM,
}
# The implementations that torch's tests combine with each input.
IMPLEMENTATIONS: dict[str, dict[str, str | None]] = {
    "foreach": dict.fromkeys(_SGD_LIKE)
    | dict.fromkeys(_NEWTON, "no such option: all directions are always made at once"),
    "fused": dict.fromkeys(_SGD_LIKE, "refused: a fused kernel applies its update inside")
    | dict.fromkeys(_NEWTON, "no such option, for the reason of DomSGD"),
    "differentiable": dict.fromkeys(_SGD_LIKE, "refused: the eigenbasis is a constant to autograd")
    | dict.fromkeys(_NEWTON, "no such option, for the reason of DomSGD"),
    "capturable": dict.fromkeys(
        (*_SGD_LIKE, *_NEWTON), "torch.optim.SGD has no such option; a refresh is no CUDA graph"
    ),
}

_EVERY = (*_SGD_LIKE, *_NEWTON, "project_updates")
_ONLY_OURS = (*_SGD_LIKE, *_NEWTON)
_ONLY_PROJECTED = ("project_updates",)
_AS_TORCH = "by torch's own code, which the projection does not touch"


def _row(test: str | None, applies: tuple[str, ...] = _EVERY, reason: str = "") -> Any:
    return SimpleNamespace(test=test, applies=applies, reason=reason)


# torch's test: the test here that stands for it, to what it applies, and why not to the others.
TESTS: dict[str, Any] = {
    "test_errors": _row("test_a_bad_option_is_named_wherever_it_is_given", _ONLY_OURS, _AS_TORCH),
    "test_errors (groups, names)": _row(
        "test_torchs_own_checks_of_groups_change_nothing", _ONLY_OURS, _AS_TORCH
    ),
    "test_forloop_goes_right_direction": _row(
        "test_steps_are_the_references_in_place_and_gradients_are_only_read"
    ),
    "test_forloop_goes_right_direction (non-contiguous)": _row(
        "test_unusual_parameters_take_the_same_steps",
        reason="torch's LBFGS takes no non-contiguous parameters",
    ),
    "test_forloop_goes_right_direction (schedulers)": _row(
        "test_steps_under_a_scheduler_have_the_rates_that_it_sets"
    ),
    "test_forloop_goes_right_direction_multigpu": _row(
        None, (), "the parameters of one operator are on one device"
    ),
    "test_param_group_with_lrscheduler_goes_right_direction": _row(
        "test_groups_under_a_scheduler_have_their_own_rates",
        reason="torch's LBFGS takes one group",
    ),
    "test_rosenbrock_sparse": _row(
        None, (), "sparse gradients are refused: a projected update is dense"
    ),
    "test_tensor_lr": _row("test_a_tensor_rate_is_the_number"),
    "test_tensor_lr_num_dim": _row("test_a_tensor_rate_is_the_number"),
    "test_complex": _row(
        "test_sam_of_a_complex_parameter_is_that_of_its_real_view",
        ("SAM",),
        "an operator has real parameters: view them as real numbers",
    ),
    "test_complex_2d": _row(
        "test_sam_of_a_complex_parameter_is_that_of_its_real_view", ("SAM",), "as test_complex"
    ),
    "test_foreach_matches_forloop": _row(
        "test_each_option_of_sgd_is_the_references_and_gradients_are_only_read",
        (*_SGD_LIKE, "project_updates"),
        "no such option",
    ),
    "test_set_default_dtype_works_with_foreach": _row(
        "test_the_default_dtype_changes_no_step",
    ),
    "test_foreach_large_tensor": _row(None, (), "needs 2^32 elements; sizes are torch's own ops"),
    "test_peak_memory_foreach": _row(None, (), "needs a GPU; see the cost section of the docs"),
    "test_fused_matches_forloop": _row(
        "test_steps_are_the_references_in_place_and_gradients_are_only_read",
        _ONLY_PROJECTED,
        "fused=True is refused",
    ),
    "test_fused_does_not_step_if_foundinf": _row(
        "test_a_step_that_the_scaler_skips_is_no_step", _ONLY_PROJECTED, "fused=True is refused"
    ),
    "test_fused_error_on_params_on_meta": _row(None, (), _AS_TORCH),
    "test_fused_cpu_matches_cuda": _row(None, (), _AS_TORCH),
    "test_fused_large_tensor": _row(None, (), _AS_TORCH),
    "test_capturable": _row(None, (), "a refresh is no CUDA graph"),
    "test_param_groups_weight_decay": _row(
        "test_steps_are_the_references_in_place_and_gradients_are_only_read",
        (*_SGD_LIKE, "project_updates"),
        _NO_DECAY,
    ),
    "test_param_groups_lr": _row(
        "test_steps_are_the_references_in_place_and_gradients_are_only_read",
        reason="torch's LBFGS takes one group",
    ),
    "test_step_is_noop_when_params_have_no_grad": _row("test_without_any_gradient_nothing_happens"),
    "test_step_is_noop_for_zero_grads": _row("test_a_gradient_of_zeros_moves_nothing", _ONLY_OURS),
    "test_optimizer_can_be_printed": _row(
        "test_names_of_parameters_are_kept", _ONLY_OURS, _AS_TORCH
    ),
    "test_state_dict_deterministic": _row(
        "test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit"
    ),
    "test_can_load_older_state_dict": _row(
        "test_a_checkpoint_of_an_older_torch_goes_on", _ONLY_OURS, _AS_TORCH
    ),
    "test_can_load_from_to_named_state_dict": _row(
        "test_states_with_and_without_names_load_into_each_other", _ONLY_OURS, _AS_TORCH
    ),
    "test_save_load_equality_with_weights_only": _row(
        "test_a_state_dict_goes_through_a_file_with_its_options"
    ),
    "test_load_nontensor_step": _row(None, (), "ours count no steps in their state"),
    "test_state_dict_with_cuda_params": _row(None, (), "needs a GPU"),
    "test_mixed_device_dtype": _row(None, (), "the parameters of one operator are on one device"),
    "test_step_pre_hook": _row("test_step_hooks_fire_once"),
    "test_step_post_hook": _row("test_step_hooks_fire_once"),
    "test_step_all_hooks": _row("test_step_hooks_fire_once"),
    "test_state_dict_pre_hook": _row("test_hooks_of_state_dicts_fire_once", _ONLY_OURS, _AS_TORCH),
    "test_state_dict_post_hook": _row("test_hooks_of_state_dicts_fire_once", _ONLY_OURS, _AS_TORCH),
    "test_load_state_dict_pre_hook_and_prepend": _row(
        "test_a_hook_may_mend_a_checkpoint_before_it_is_loaded", _ONLY_OURS, _AS_TORCH
    ),
    "test_load_state_dict_post_hook_and_prepend": _row(
        "test_hooks_of_state_dicts_fire_once", _ONLY_OURS, _AS_TORCH
    ),
    "test_deepcopy_copies_all_public_attrs": _row(
        "test_a_copy_has_all_public_attributes", _ONLY_OURS, "torch copies no hooks"
    ),
    "test_defaults_changed_to_foreach": _row(
        None, (), "foreach=None and foreach=True are one implementation here"
    ),
    "TestDifferentiableOptimizer": _row(None, (), "the eigenbasis is a constant to autograd"),
    "CompiledOptimizerTests": _row(
        None, (), "steps are not compiled: a refresh calls autograd; models may be, see below"
    ),
    "compiled model": _row("test_a_compiled_model_takes_the_same_steps"),
    "test_grad_scaling_autocast": _row(
        "test_a_step_that_the_scaler_skips_is_no_step",
        reason="torch's scaler takes no closures, so no LBFGS; SAM by its two calls",
    ),
}

# The tables are true. --------------------------------------------------------------------------


def test_each_row_names_a_test_or_a_reason() -> None:
    here = Path(__file__).parent
    names = set()
    for path in here.glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for theirs, row in TESTS.items():
        assert (row.test in names) if row.applies else (row.test is None and row.reason), theirs
        assert set(row.applies) <= set(_EVERY)
        # SAM is the only one that is named for itself.
        assert row.reason or set(_EVERY) - set(row.applies) <= {"project_updates"}, theirs
    assert {case.name for case in OURS} == set(_ONLY_OURS)


def torchs() -> dict[str, list[SimpleNamespace]]:
    """The option ranges of torch's own tests, by class name, for the CPU.

    Only these functions are run: the module around them needs packages that are not installed.
    """
    package = importlib.util.find_spec("torch.testing._internal")
    assert package is not None
    assert package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "common_optimizers.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wanted = re.compile(r"optim_inputs_func_\w+|_get_device_type")
    functions = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and wanted.fullmatch(node.name)
    ]
    constants = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Constant)
    ]
    space: dict[str, Any] = {"torch": torch, "OptimizerInput": SimpleNamespace}
    future = ast.parse("from __future__ import annotations").body
    exec(compile(ast.Module([*future, *constants, *functions], []), str(path), "exec"), space)
    classes = {name.lower(): name for name in dir(torch.optim)}
    return {
        classes[node.name.removeprefix("optim_inputs_func_")]: space[node.name](device="cpu")
        for node in functions
        if node.name.startswith("optim_inputs")
    }


THEIRS = torchs()


def test_every_optimizer_and_every_option_range_of_torch_is_here() -> None:
    """A new one has to be given a place in these tables."""
    theirs = {
        name
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)
    } - {"Optimizer"}
    assert set(THEIRS) <= theirs
    covered = {
        type(each).__name__
        for case in EACH_ALGORITHM
        if not case.ours
        for each in Run(case).optimizers
    }
    assert theirs - covered == {"SparseAdam"}  # of sparse gradients alone
    assert {entry.desc for entry in THEIRS["SGD"]} <= set(OPTIONS)


@pytest.mark.parametrize("entry", THEIRS["SGD"], ids=lambda entry: entry.desc)
@pytest.mark.parametrize("case", OURS, ids=str)
def test_the_option_ranges_of_sgd(case: Case, entry: SimpleNamespace) -> None:
    missing = set(entry.kwargs) - set(inspect.signature(case.ours).parameters)
    reason = OPTIONS[entry.desc] if case.name in _NEWTON else None
    assert bool(missing) == bool(reason)
    if reason:
        run = Run(case)
        extra = {"subspace": run.subspace} if case.has_subspace else {}
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            case.ours(run.setting.trained, **entry.kwargs, **extra)
        return
    run, reference = pair(case, **({"momentum": 0.0} | entry.kwargs))
    for _ in range(3):
        theta, expected = run.theta(), reference.step()
        run.step()
        relative = 1e-7 if isinstance(entry.kwargs.get("lr"), torch.Tensor) else 1e-8
        assert_near(run.theta() - theta, expected - theta, relative)


@pytest.mark.parametrize("flag", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", OURS, ids=str)
def test_the_implementations(case: Case, flag: str) -> None:
    reason = IMPLEMENTATIONS[flag][case.name]
    run = Run(case)
    extra = {"subspace": run.subspace} if case.has_subspace else {}
    if reason is None:
        assert case.ours(run.setting.trained, **{flag: True}, **extra).defaults[flag] is True
    else:
        refusal = flag if reason.startswith("refused") else "unexpected keyword argument"
        with pytest.raises((so.ArgumentError, TypeError), match=refusal):
            case.ours(run.setting.trained, **{flag: True}, **extra)


RANGES = [
    (name, entry)
    for name, entries in THEIRS.items()
    if name not in ("SGD", "SparseAdam")
    for entry in entries
] + [("SGD", entry) for entry in THEIRS["SGD"]]


@pytest.mark.parametrize(
    ("name", "entry"), RANGES, ids=[f"{name}, {entry.desc}" for name, entry in RANGES]
)
def test_the_option_ranges_of_each_optimizer_are_projected(
    name: str, entry: SimpleNamespace
) -> None:
    """Onto the bulk, where nothing of the displacement is lost to a small remainder."""
    cls = getattr(torch.optim, name)
    options = dict(entry.kwargs)
    plain = one(cls)
    if name == "Muon":

        def plain(groups: Any) -> Any:
            muon, adamw = muon_and_adamw([{"params": g["params"]} for g in groups])
            return [cls([{"params": muon.param_groups[0]["params"], **options}]), adamw]

    case = Case(name, options, part="bulk", plain=plain)
    run, setting = Run(case, quartic()), quartic()
    reference = Reference(run, setting)
    for _ in range(2):
        theta, expected = run.theta(), reference.step()
        run.step()
        distance = float((run.theta() - expected).norm())
        assert distance <= 1e-8 * float((expected - theta).norm()) + 1e-14


# Tests of torch's that have no other place. ----------------------------------------------------


@pytest.mark.parametrize("case", [c for c in EACH_ALGORITHM if c.takes_groups], ids=str)
def test_groups_under_a_scheduler_have_their_own_rates(case: Case) -> None:
    run, reference = pair(case, two_groups=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
    rates = [group["lr"] for group in run.groups]
    assert len(set(rates)) == 2
    for step in range(3):
        for group, rate in zip(reference.groups, rates, strict=True):
            group["lr"] = rate / 2**step
        theta, expected = run.theta(), reference.step()
        run.step()
        assert_near(run.theta() - theta, expected - theta, 1e-8)
        scheduler.step()


@ours_observing
def test_a_gradient_of_zeros_moves_nothing(case: Case) -> None:
    run = Run(case)
    if case.observes:
        run.subspace.observe(*run.setting.batch)
    before = run.values()

    def closure() -> torch.Tensor:
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        return torch.tensor(0.0)

    for _ in range(2):
        run.optimizer.step(closure)
    assert same(before, run.values())


@ours_observing
def test_states_with_and_without_names_load_into_each_other(case: Case) -> None:
    run, other = Run(case), Run(case)
    extra = {"subspace": other.subspace} if case.has_subspace else {}
    other.optimizers = [case.ours(list(other.model.named_parameters()), **case.options, **extra)]
    run.step()
    other.model.load_state_dict(run.model.state_dict())
    if case.observes:
        other.subspace.load_state_dict(run.subspace.state_dict())
    other.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    assert "param_names" in other.groups[0]
    run.optimizer.load_state_dict(through_a_file(other.optimizer.state_dict()))
    for each in (run, other):
        each.step()
    assert same(run.values(), other.values())


@ours_observing
def test_a_copy_has_all_public_attributes(case: Case) -> None:
    optimizer = Run(case).optimizer
    names = [{n for n in vars(o) if n[0] != "_"} for o in (optimizer, copy.deepcopy(optimizer))]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", ["DomSGD", "BulkSAM", "LowRankNewton", "AdamW foreach, bulk"])
def test_the_default_dtype_changes_no_step(name: str) -> None:
    run, other = Run(CASES[name]), Run(CASES[name])
    run.step()
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        other.step()
    finally:
        torch.set_default_dtype(before)
    assert same(run.values(), other.values())


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["plain", "momentum"])
def test_sam_of_a_complex_parameter_is_that_of_its_real_view(momentum: float) -> None:
    random = torch.Generator().manual_seed(0)
    z = nn.Parameter(torch.randn(3, dtype=torch.complex128, generator=random))
    w = nn.Parameter(torch.view_as_real(z.detach()).clone())

    def loss(z: torch.Tensor) -> torch.Tensor:
        return (3 * z.real**2 + z.imag**4 + z.real * z.imag).sum()

    for parameter, value in ((z, lambda: loss(z)), (w, lambda: loss(torch.view_as_complex(w)))):
        optimizer = so.SAM([parameter], lr=LR, rho=0.3, momentum=momentum, weight_decay=0.1)

        def closure(optimizer: Any = optimizer, value: Any = value) -> torch.Tensor:
            optimizer.zero_grad()
            result = value()
            result.backward()
            return result

        for _ in range(3):
            optimizer.step(closure)
    assert_near(torch.view_as_real(z.detach()).flatten(), w.detach().flatten(), 1e-14)

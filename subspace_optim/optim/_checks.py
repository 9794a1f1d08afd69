"""What an optimizer refuses: options, parameters, gradients and states that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, check_flag, check_number
from subspace_optim.curvature.dtensors import local
from subspace_optim.curvature.parameters import ParameterSpace


def check_sgd_options(group: dict[str, Any]) -> None:
    """Checks the options of ``torch.optim.SGD`` in one parameter group.

    Raises:
        ArgumentError: one is out of range, or not supported, with the reason.
    """
    check_number("lr", group["lr"], tensor=True)
    check_number("momentum", group["momentum"])
    check_number("dampening", group["dampening"], minimum=None)
    check_number("weight_decay", group["weight_decay"])
    for name in ("nesterov", "maximize", "differentiable"):
        check_flag(name, group[name])
    for name in ("foreach", "fused"):
        check_flag(name, group[name], optional=True)
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        remedy = "Set momentum above 0 and dampening to 0."
        raise ArgumentError("nesterov", True, "False without momentum or with dampening", remedy)
    if group["fused"]:
        remedy = "A fused kernel applies its update inside: there is nothing left to project."
        raise ArgumentError("fused", True, "False or None", remedy)
    if group["differentiable"]:
        remedy = "The eigenbasis is a constant to autograd, so its derivative would be missing."
        raise ArgumentError("differentiable", True, "False", remedy)


def check_dense(parameter: Tensor, name: str | None = None) -> None:
    """Checks that the gradient of a parameter is dense, if it has one.

    Raises:
        ArgumentError: it is not.
    """
    gradient = parameter.grad
    if gradient is not None and gradient.layout != torch.strided:
        of = f"'{name}'" if name else f"a parameter of shape {tuple(parameter.shape)}"
        raise ArgumentError(f"the gradient of {of}", gradient.layout, "dense", "Use sparse=False.")


def check_buffer(parameter: Any, entries: Any) -> None:
    """Checks what a state that is loaded has for one parameter.

    Raises:
        ArgumentError: it is no dict, or its momentum buffer cannot be used.
    """
    remedy = "The state was damaged, or is of a run that had diverged."
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise ArgumentError("the loaded state of a parameter", kind, "a dict", remedy)
    buffer = entries.get("momentum_buffer")
    if buffer is None or not isinstance(parameter, Tensor):
        return
    found = type(buffer).__name__
    if isinstance(buffer, Tensor):
        found = f"of shape {tuple(buffer.shape)}, {buffer.layout}"
        if buffer.shape == parameter.shape and buffer.layout == torch.strided:
            if bool(local(buffer).isfinite().all()):
                return
            found = "not finite"
    allowed = f"a dense tensor of finite numbers, of shape {tuple(parameter.shape)}"
    raise ArgumentError("momentum_buffer of the loaded state", found, allowed, remedy)


def check_membership(params: Iterable[Tensor], space: ParameterSpace) -> list[Tensor]:
    """Checks that the operator differentiates by all parameters that are trained.

    Returns:
        Those that it differentiates by, in its order.

    Raises:
        ArgumentError: it does not by one.
    """
    tensors = space.tensors
    members = set(map(id, tensors))
    for p in params:
        if id(p) not in members and p.requires_grad:
            label, found = f"parameter of shape {tuple(p.shape)}", "of another model"
            remedy = "Build operator and subspace from the model that the optimizer trains."
            if name := space.name_in_model(p):
                label, found = f"parameter '{name}'", "not the operator's"
                remedy = "Add it to the `params` of the operator, or leave it out of the optimizer."
            raise ArgumentError(label, found, "one that the operator differentiates by", remedy)
    return tensors


def check_same(params: list[Tensor], space: ParameterSpace) -> list[Tensor]:
    """Checks that optimizers train the parameters of the operator, and no others.

    Returns:
        These parameters, in the operator's order.

    Raises:
        ArgumentError: one is missing on either side, or was frozen since.
    """
    tensors = check_membership(params, space)
    held = {id(p) for p in params if p.requires_grad}
    if held.issuperset(map(id, tensors)):
        return tensors
    for p, name in zip(tensors, space.names, strict=True):
        if id(p) not in held:
            raise ArgumentError(
                f"parameter '{name}' of the operator",
                "in no group of the optimizer" if p.requires_grad else "frozen since",
                "trained by this optimizer",
                "The projection is over all of the operator's parameters together: give it only "
                "those with `params=`, or add the others to the optimizer. Optimizers that share "
                "them are projected together: project_updates([muon, adamw], subspace, onto=...).",
            )
    return tensors

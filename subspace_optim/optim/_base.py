"""What the optimizers share: group checks, gather and scatter, and the direction of SGD."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim._validation import ArgumentError, check_number
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.subspace import EigenBasis, Subspace


class SubspaceSGD(torch.optim.Optimizer):
    r"""SGD whose whole update passes through a restriction to a subspace or its complement.

    .. math:: \theta_{t+1} = \theta_t + R_t\, u_t

    where :math:`u_t` is the update of ``torch.optim.SGD``, with its momentum, weight decay and
    rates, over all parameter groups together. The momentum buffers see the raw gradients.
    """

    subspace: Subspace | None = None  # an optimizer that was pickled or copied alone has none

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        subspace: Subspace,
    ) -> None:
        if isinstance(subspace, type) or not isinstance(subspace, Subspace):
            allowed = "a subspace, such as DominantSubspace(hessian, k=10)"
            raise ArgumentError("subspace", type(subspace).__name__, allowed)
        self.subspace = subspace
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    @abstractmethod
    def _restrict(self, basis: EigenBasis, update: Tensor) -> Tensor:
        """Returns ``R u`` for the update ``u: (P,)``, whose memory it may use for the result."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: evaluates the loss again and returns it; called first, with gradients on.

        Returns:
            What ``closure`` returned.
        """
        subspace = self._subspace()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = self._coordinates(subspace.parameters)
        if not any(p.grad is not None for p in index):
            return loss
        # Where every rate is 0, nothing moves: no reason to pay for a basis.
        moves = any(float(group["lr"]) != 0 for group in self.param_groups)
        basis = subspace.update() if moves else None
        update = self._gather(subspace.parameters, index)
        if basis is not None:
            moved = subspace.parameters.unflatten(self._restrict(basis, update))
            for p, i in index.items():
                p.add_(moved[i])
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do, after its options and parameters were checked.

        Raises:
            ArgumentError: an option is out of range, or a parameter is none of the subspace's.
        """
        super().add_param_group(dict(param_group))
        group = self.param_groups[-1]
        try:
            _check_options(group)
            self._check_membership(group["params"], self._subspace().parameters)
        except ArgumentError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads options and momentum buffers, of ``torch.optim.SGD`` too.

        The subspace has a ``state_dict`` of its own.
        """
        for group in state_dict["param_groups"]:
            _check_options(self.defaults | group)
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # checkpoints of older torch have fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # With `deepcopy((model, subspace, optimizer))` the copies belong together. Alone, a copy
        # would pay for the subspace of another model: it has none, and `step` says what to set.
        optimizer = type(self).__new__(type(self))
        memo[id(self)] = optimizer
        optimizer.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        optimizer.subspace = memo.get(id(self.subspace))
        return optimizer

    def _subspace(self) -> Subspace:
        if self.subspace is None:
            remedy = (
                "A copied or unpickled optimizer has none: set `optimizer.subspace`, or copy "
                "them together, the subspace first: `deepcopy((model, subspace, optimizer))`."
            )
            raise ArgumentError("subspace", None, "set before step()", remedy)
        return self.subspace

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    @staticmethod
    def _check_membership(params: list[Tensor], space: ParameterSpace) -> None:
        members = {id(p) for p in space.tensors}
        for p in params:
            if p.requires_grad and id(p) not in members:
                raise _not_a_member(p, space)

    def _coordinates(self, space: ParameterSpace) -> dict[Tensor, int]:
        """Returns where each parameter is in ``space``, after a check that both hold the same.

        Raises:
            ArgumentError: a parameter is missing on either side, was frozen since, or has a
                sparse gradient.
        """
        own = list(self._parameters())
        self._check_membership(own, space)
        held = {id(p) for p in own if p.requires_grad}
        for p, name in zip(space.tensors, space.names, strict=True):
            if id(p) not in held:
                raise ArgumentError(
                    f"parameter '{name}' of the operator",
                    "in no group of the optimizer" if p.requires_grad else "frozen since",
                    "trained by this optimizer",
                    "The projection is over all of the operator's parameters together: give it "
                    "only those with `params=`, or add the others to the optimizer.",
                )
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ArgumentError(
                    f"the gradient of '{name}'", p.grad.layout, "dense", "Use sparse=False."
                )
        return {p: i for i, p in enumerate(space.tensors)}

    def _gather(self, space: ParameterSpace, index: dict[Tensor, int]) -> Tensor:
        """Returns the update of ``torch.optim.SGD`` as a vector; buffers are moved on."""
        update = torch.zeros(space.size, dtype=space.dtype, device=space.device)
        views = space.unflatten(update)
        for group in self.param_groups:
            lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
            params = [p for p in group["params"] if p in index and p.grad is not None]
            together = group["foreach"] is None or group["foreach"]
            for some in [params] if together and params else [[p] for p in params]:
                for p, direction in zip(some, self._directions(some, group), strict=True):
                    views[index[p]].copy_(direction).mul_(-lr)
        return update

    def _directions(self, params: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Returns the direction of ``torch.optim.SGD`` for some parameters of one group.

        With gradient g, weight decay w, momentum μ, dampening τ and buffer b: ``d = g + wθ``
        (``−g + wθ`` to maximize), ``b ← μb + (1 − τ)d`` (at first ``b = d``), and the direction
        is b, or ``d + μb`` for Nesterov; d itself without momentum. ``p.grad`` is only read.
        """
        directions = [p.grad for p in params if p.grad is not None]
        momentum, decay = group["momentum"], group["weight_decay"]
        if group["maximize"]:
            directions = list(torch._foreach_neg(directions))
        if decay != 0:
            directions = list(torch._foreach_add(directions, params, alpha=decay))
        if momentum == 0:
            return directions
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        for p, direction, buffer in zip(params, directions, buffers, strict=True):
            if buffer is None:
                self.state[p]["momentum_buffer"] = direction.detach().clone()
        old = [(b, d) for b, d in zip(buffers, directions, strict=True) if b is not None]
        if old:
            running, fresh = [b for b, _ in old], [d for _, d in old]
            torch._foreach_mul_(running, momentum)
            torch._foreach_add_(running, fresh, alpha=1 - group["dampening"])
        current = [self.state[p]["momentum_buffer"] for p in params]
        if group["nesterov"]:
            return list(torch._foreach_add(directions, current, alpha=momentum))
        return current


def _not_a_member(parameter: Tensor, space: ParameterSpace) -> ArgumentError:
    """Returns the error for a parameter of the optimizer that the operator does not have."""
    name = space.name_in_model(parameter)
    if name is None:
        label, remedy = (
            f"parameter of shape {tuple(parameter.shape)}",
            "Build operator and subspace from the model that the optimizer trains.",
        )
    else:
        label, remedy = (
            f"parameter '{name}'",
            "Add it to the `params` of the operator, or leave it out of the optimizer.",
        )
    value = "of another model" if name is None else "not the operator's"
    return ArgumentError(label, value, "one that the operator differentiates by", remedy)


def _check_options(group: dict[str, Any]) -> None:
    """Checks the options of one parameter group.

    Raises:
        ArgumentError: one is out of range, or not supported, with the reason.
    """
    check_number("lr", group["lr"], tensor=True)
    check_number("momentum", group["momentum"])
    check_number("dampening", group["dampening"], minimum=None)
    check_number("weight_decay", group["weight_decay"])
    for name in ("nesterov", "maximize", "differentiable"):
        if not isinstance(group[name], bool):
            raise ArgumentError(name, group[name], "True or False")
    for name in ("foreach", "fused"):
        if not (group[name] is None or isinstance(group[name], bool)):
            raise ArgumentError(name, group[name], "True, False or None")
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        remedy = "Set momentum above 0 and dampening to 0."
        raise ArgumentError("nesterov", True, "False without momentum or with dampening", remedy)
    if group["fused"]:
        remedy = "A fused kernel applies its update inside: there is nothing left to project."
        raise ArgumentError("fused", True, "False or None", remedy)
    if group["differentiable"]:
        remedy = "The eigenbasis is a constant to autograd, so its derivative would be missing."
        raise ArgumentError("differentiable", True, "False", remedy)

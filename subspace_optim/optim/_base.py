"""What the optimizers share: group checks, gather and scatter, and the direction of SGD."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim._validation import ArgumentError, check_number
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.step_hooks import outside_autocast, parameters_of
from subspace_optim.subspaces import Subspace, check_subspace, projector_of

Basis = TypeVar("Basis")
Moves = list[tuple[list[Tensor], list[Tensor], float]]
"""Parameters, what is added to them, and the factor of that."""


class CheckedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose options are checked wherever they are given.

    ``step`` evaluates the closure and then takes the step that ``_descend`` writes. It happens, or
    an exception leaves parameters and state as they were: ``_descend`` computes all that is new in
    other memory, and ``_commit`` puts it in place.
    """

    @staticmethod
    @abstractmethod
    def _check_options(group: dict[str, Any]) -> None:
        """Checks the options of one parameter group.

        Raises:
            ArgumentError: one is out of range, or not supported, with the reason.
        """

    @abstractmethod
    def _descend(self) -> None:
        """Moves the parameters, by the gradients that are there."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Takes one step.

        Args:
            closure: evaluates the loss again and returns it; called first, with gradients on.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._outside_autocast():
            self._descend()
        return loss

    def _commit(self, buffers: dict[Tensor, Tensor], moves: Moves) -> None:
        """Makes the step happen, all of it: an exception in between is raised afterwards.

        Args:
            buffers: the new momentum buffers.
            moves: what is added to the parameters.
        """
        errors = [_add(*move) for move in moves if move[0]]
        torch.clear_autocast_cache()  # its copies of parameters
        for p, buffer in buffers.items():
            self.state[p]["momentum_buffer"] = buffer
        for error in errors:
            if error is not None:
                raise error

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch's optimizers do, after its options and parameters were checked.

        Raises:
            ArgumentError: an option is out of range, or a parameter is none of the subspace's.
        """
        mapping = isinstance(param_group, dict)  # torch writes the defaults into what it is given
        super().add_param_group(dict(param_group) if mapping else param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ArgumentError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_options(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads options and state; those of ``torch.optim.SGD`` too, where the options are its.

        The subspace has a ``state_dict`` of its own. A state that cannot be used is refused before
        anything is changed: options out of range, and momentum buffers that are not finite or not
        of their parameters' shapes.
        """
        super().load_state_dict(state_dict)
        for group in self.param_groups:  # checkpoints of older torch have fewer options
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Of copies and of load_state_dict(), after the hooks that may mend what is loaded.
        defaults = state.get("defaults", getattr(self, "defaults", {}))
        for group in state.get("param_groups", []):
            self._check_options(defaults | group)
        if "defaults" not in state:  # it is loaded: a copy of a run that diverged is none the less
            for p, entries in state.get("state", {}).items():
                check_buffer(p, entries)
        super().__setstate__(state)

    def _check_gradients(self) -> None:
        """Checks that the gradients are dense.

        Raises:
            ArgumentError: one is not.
        """
        for p in parameters_of(self):
            if p.grad is not None and p.grad.layout != torch.strided:
                label = f"the gradient of a parameter of shape {tuple(p.shape)}"
                raise ArgumentError(label, p.grad.layout, "dense", "Use sparse=False.")

    def _outside_autocast(self) -> AbstractContextManager[object]:
        return outside_autocast(self.param_groups[0]["params"][0].device)

    def _moves(self) -> bool:
        """Whether a rate is above 0: steps that prepare a checkpoint have none."""
        return any(float(group["lr"]) != 0 for group in self.param_groups)


class SubspaceOptimizer(CheckedOptimizer, Generic[Basis]):
    """An optimizer whose update is a function of all groups' direction and of a basis."""

    subspace: Subspace | None  # an optimizer that was pickled or copied alone has none
    _memory: Tensor | None = None  # of the update
    _projects = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any], subspace: Subspace) -> None:
        check_subspace(subspace, projects=self._projects)
        self.subspace = subspace
        super().__init__(params, defaults)

    @abstractmethod
    def _update(
        self, index: dict[Tensor, int], basis: Basis | None, buffers: dict[Tensor, Tensor]
    ) -> Tensor:
        """Returns what is added to the parameters, ``(P,)``.

        Args:
            index: where each parameter is among the subspace's.
            basis: at the present parameters; ``None`` where every rate is 0, so that the result
                is not used.
            buffers: takes the new momentum buffers.
        """

    def _descend(self) -> None:
        subspace = self._subspace()
        index = self._coordinates(subspace.parameters)
        if not any(p.grad is not None for p in index):
            return
        # Where every rate is 0, nothing moves: no reason to pay for a basis.
        basis = self._basis(subspace) if self._moves() else None
        buffers: dict[Tensor, Tensor] = {}
        update = self._update(index, basis, buffers)
        added = subspace.parameters.unflatten(update)
        self._commit(buffers, [] if basis is None else [(list(index), added, 1.0)])

    @abstractmethod
    def _basis(self, subspace: Subspace) -> Basis:
        """Returns the basis at the present parameters."""

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_membership(group["params"], self._subspace().parameters)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.setdefault("subspace", None)
        super().__setstate__(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # With `deepcopy((model, subspace, optimizer))` the copies belong together. Alone, a copy
        # would pay for the subspace of another model: it has none, and `step` says what to set.
        optimizer = type(self).__new__(type(self))
        memo[id(self)] = optimizer
        optimizer.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        optimizer.subspace = memo.get(id(self.subspace))
        return optimizer

    def _check_gradients(self) -> None:
        self._coordinates(self._subspace().parameters)

    def _subspace(self) -> Subspace:
        if self.subspace is None:
            remedy = (
                "A copied or unpickled optimizer has none: set `optimizer.subspace`, or copy "
                "them together, the subspace first: `deepcopy((model, subspace, optimizer))`."
            )
            raise ArgumentError("subspace", None, "set before step()", remedy)
        return self.subspace

    def _coordinates(self, space: ParameterSpace) -> dict[Tensor, int]:
        """Returns where each parameter is in ``space``, after a check that both hold the same.

        Raises:
            ArgumentError: a parameter is missing on either side, was frozen since, or has a
                sparse gradient.
        """
        check_same(parameters_of(self), space)
        for p, name in zip(space.tensors, space.names, strict=True):
            if p.grad is not None and p.grad.layout != torch.strided:
                raise ArgumentError(
                    f"the gradient of '{name}'", p.grad.layout, "dense", "Use sparse=False."
                )
        return {p: i for i, p in enumerate(space.tensors)}

    def _direction(self, group: dict[str, Any]) -> dict[str, Any]:
        """Returns those options of a group that make its direction."""
        return group

    def _gather(
        self,
        index: dict[Tensor, int],
        factor: Callable[[dict[str, Any]], float | Tensor],
        buffers: dict[Tensor, Tensor],
    ) -> Tensor:
        """Returns each group's direction times its factor, as one vector, and the new buffers.

        The memory is kept for the next step: fresh memory for millions of numbers would cost as
        much as all of the arithmetic.
        """
        space = self._subspace().parameters
        vector = self._memory
        kind = (space.size,), space.dtype, space.device
        if vector is None or (tuple(vector.shape), vector.dtype, vector.device) != kind:
            vector = torch.empty(space.size, dtype=space.dtype, device=space.device)
            self._memory = vector
        views = space.unflatten(vector)
        for p, i in index.items():
            if p.grad is None:
                views[i].zero_()
        for group in self.param_groups:
            scale = factor(group)
            scale = scale.reshape(()) if isinstance(scale, Tensor) else scale
            params = [p for p in group["params"] if p in index and p.grad is not None]
            options = self._direction(group)
            for p, direction in sgd_directions(params, options, self.state, buffers):
                view = views[index[p]]
                if direction.dtype == view.dtype:
                    torch.mul(direction, scale, out=view)
                else:
                    view.copy_(direction).mul_(scale)
        return vector


class RestrictedSGD(SubspaceOptimizer[EigenBasis]):
    r"""SGD whose whole update passes through a restriction to a subspace or its complement.

    .. math:: \theta_{t+1} = \theta_t + R_t\, u_t

    where :math:`u_t` is the update of ``torch.optim.SGD``, with its momentum, weight decay and
    rates, over all parameter groups together. The momentum buffers see the raw gradients.
    """

    _projects = True

    @staticmethod
    def _check_options(group: dict[str, Any]) -> None:
        check_sgd_options(group)

    @abstractmethod
    def _restrict(self, basis: EigenBasis, update: Tensor) -> Tensor:
        """Returns ``R u`` for the update ``u: (P,)``, whose memory it may use for the result."""

    def _basis(self, subspace: Subspace) -> EigenBasis:
        return projector_of(subspace)

    def _update(
        self, index: dict[Tensor, int], basis: EigenBasis | None, buffers: dict[Tensor, Tensor]
    ) -> Tensor:
        update = self._gather(index, lambda group: -group["lr"], buffers)
        return update if basis is None else self._restrict(basis, update)


def _add(params: list[Tensor], added: list[Tensor], factor: float) -> BaseException | None:
    """Adds in one call of torch, and returns the exception that was raised before or after it."""
    version = params[0]._version  # noqa: SLF001 (counts what is written)
    try:
        torch._foreach_add_(params, added, alpha=factor)
    except BaseException as error:  # noqa: BLE001 (an interrupt is raised after the call)
        if params[0]._version == version:  # noqa: SLF001
            torch._foreach_add_(params, added, alpha=factor)
        return error
    return None


_PLAIN = {
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
}
"""What a group without these options means."""


def sgd_directions(
    params: list[Tensor],
    group: dict[str, Any],
    state: dict[Tensor, Any],
    buffers: dict[Tensor, Tensor],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields each parameter with the direction of ``torch.optim.SGD``.

    With gradient g, weight decay w, momentum μ, dampening τ and buffer b: ``d = g + wθ``
    (``−g + wθ`` to maximize), ``b ← μb + (1 − τ)d`` (at first ``b = d``), and the direction
    is b, or ``d + μb`` for Nesterov; d itself without momentum. ``p.grad`` is only read.

    Args:
        params: of one group, with gradients.
        group: its options.
        state: of the optimizer, where the buffers are; only read.
        buffers: takes the new ones.
    """
    group = _PLAIN | group
    together = group["foreach"] is None or group["foreach"]
    for some in [params] if together and params else [[p] for p in params]:
        yield from zip(some, _directions(some, group, state, buffers), strict=True)


def _directions(
    params: list[Tensor],
    group: dict[str, Any],
    state: dict[Tensor, Any],
    buffers: dict[Tensor, Tensor],
) -> list[Tensor]:
    directions = [p.grad for p in params if p.grad is not None]
    momentum, decay = group["momentum"], group["weight_decay"]
    if group["maximize"]:
        directions = list(torch._foreach_neg(directions))
    if decay != 0:
        directions = list(torch._foreach_add(directions, params, alpha=decay))
    if momentum == 0:
        return directions
    known = dict(zip(params, directions, strict=True))
    old = {p: state[p].get("momentum_buffer") for p in params if p in state}
    running = [p for p in params if old.get(p) is not None]
    if running:
        new = list(torch._foreach_mul([old[p] for p in running], momentum))
        torch._foreach_add_(new, [known[p] for p in running], alpha=1 - group["dampening"])
        buffers |= zip(running, new, strict=True)
    buffers |= {p: d.detach().clone() for p, d in known.items() if p not in buffers}
    current = [buffers[p] for p in params]
    if group["nesterov"]:
        return list(torch._foreach_add(directions, current, alpha=momentum))
    return current


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
    label, shape = "momentum_buffer of the loaded state", tuple(parameter.shape)
    if not isinstance(buffer, Tensor):
        raise ArgumentError(label, type(buffer).__name__, "a tensor", remedy)
    if buffer.layout != torch.strided:
        raise ArgumentError(label, buffer.layout, "dense", remedy)
    if tuple(buffer.shape) != shape:
        raise ArgumentError(label, f"of shape {tuple(buffer.shape)}", f"of shape {shape}", remedy)
    if not bool(buffer.isfinite().all()):
        raise ArgumentError(label, "not finite", "finite", remedy)


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


def check_membership(params: Iterable[Tensor], space: ParameterSpace) -> None:
    """Checks that the operator differentiates by all parameters that are trained.

    Raises:
        ArgumentError: it does not by one.
    """
    members = {id(p) for p in space.tensors}
    for p in params:
        if p.requires_grad and id(p) not in members:
            raise ArgumentError(*_not_a_member(p, space))


def check_same(params: list[Tensor], space: ParameterSpace) -> None:
    """Checks that optimizers train the parameters of the operator, and no others.

    Raises:
        ArgumentError: one is missing on either side, or was frozen since.
    """
    check_membership(params, space)
    held = {id(p) for p in params if p.requires_grad}
    for p, name in zip(space.tensors, space.names, strict=True):
        if id(p) not in held:
            raise ArgumentError(
                f"parameter '{name}' of the operator",
                "in no group of the optimizer" if p.requires_grad else "frozen since",
                "trained by this optimizer",
                "The projection is over all of the operator's parameters together: give it only "
                "those with `params=`, or add the others to the optimizer. Optimizers that share "
                "them are projected together: project_updates([muon, adamw], subspace, onto=...).",
            )


def _not_a_member(parameter: Tensor, space: ParameterSpace) -> tuple[str, str, str, str]:
    """Returns what to say of a parameter of the optimizer that the operator does not have."""
    name = space.name_in_model(parameter)
    allowed = "one that the operator differentiates by"
    if name is None:
        label = f"parameter of shape {tuple(parameter.shape)}"
        remedy = "Build operator and subspace from the model that the optimizer trains."
        return label, "of another model", allowed, remedy
    remedy = "Add it to the `params` of the operator, or leave it out of the optimizer."
    return f"parameter '{name}'", "not the operator's", allowed, remedy

"""What the optimizers share: an all-or-nothing step, SGD's direction, the update as one vector.

``step()`` calls ``_descend()``, which computes all that is new in other memory and then puts it in
place. Optimizers in a subspace write one method, ``_update()``: what is added to the parameters, as
a function of the basis and of the direction.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.dtensors import is_sharded, local
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.linalg.low_rank import LowRankCurvature
from subspace_optim.optim._checks import check_buffer, check_dense, check_membership, check_same
from subspace_optim.step_hooks import moves, outside_autocast, parameters_of
from subspace_optim.subspaces import Subspace, basis_of, check_subspace, projector_of

Group = dict[str, Any]
Loss = TypeVar("Loss", bound=float | Tensor)
"""What a closure returns, and so does ``step``."""
Part = Literal["dominant", "bulk"]
Gather = Callable[[Callable[[Group], float | Tensor]], Tensor]
Moves = list[tuple[list[Tensor], list[Tensor], float]]
"""Parameters, what is added to them, and the factor of that."""


class CheckedOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose options are checked wherever they are given."""

    @staticmethod
    def _check_options(group: Group) -> None:
        """Checks the options of one parameter group.

        Raises:
            ArgumentError: one is out of range, or not supported, with the reason.
        """
        raise NotImplementedError

    def _descend(self) -> None:
        """Moves the parameters, by the gradients that are there, or raises and changes nothing."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one step. An exception leaves parameters and state as they were.

        Args:
            closure: evaluates the loss again and returns it, as a tensor or a number; called
                first, with gradients on.

        Returns:
            What ``closure`` returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with outside_autocast(self._device):
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

    def add_param_group(self, param_group: Group) -> None:
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

    def _check_group(self, group: Group) -> None:
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
        for p in parameters_of(self):
            check_dense(p)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.param_groups[0]["params"][0].device
        return device


class SubspaceOptimizer(CheckedOptimizer):
    """An optimizer whose update is a function of all groups' direction and of a basis.

    All groups together, as one vector: the basis mixes their coordinates.
    """

    subspace: Subspace | None  # an optimizer that was pickled or copied alone has none
    _projects: ClassVar[bool] = True  # whether the basis has to be orthonormal
    _memory: tuple[object, Tensor, list[Tensor]] | None = None  # of the update, and its views

    def __init__(self, params: ParamsT, defaults: dict[str, Any], subspace: Subspace) -> None:
        check_subspace(subspace, projects=self._projects)
        self.subspace = subspace
        super().__init__(params, defaults)

    def __repr__(self) -> str:
        return f"{super().__repr__().removesuffix(')')}subspace: {self.subspace!r}\n)"

    def _update(self, basis: Any, gather: Gather) -> None:
        """Turns the direction ``(P,)`` into the update, in its memory: calls ``gather`` once.

        Args:
            basis: at the present parameters.
            gather: returns the direction, each group's times the factor that a function gives it.
        """
        raise NotImplementedError

    def _descend(self) -> None:
        subspace = self._subspace()
        space = subspace.parameters
        tensors = self._trained(space)
        if all(p.grad is None for p in tensors):
            return
        basis: EigenBasis | LowRankCurvature | None = None
        if moves(self):  # where every rate is 0, nothing moves: no reason to pay for a basis
            basis = projector_of(subspace) if self._projects else basis_of(subspace)
        vector, views = self._vector(space, space if basis is None else basis)
        buffers: dict[Tensor, Tensor] = {}

        def gather(factor: Callable[[Group], float | Tensor]) -> Tensor:
            by_id = dict(zip(map(id, tensors), views, strict=True))
            self._gather(vector, space, by_id, factor, buffers)
            return vector

        if basis is None:
            gather(lambda _: 0.0)  # a step that prepares a checkpoint makes the buffers
            self._commit(buffers, [])
        else:
            self._update(basis, gather)
            added = views if space.layout is None else space.unflatten(vector)
            self._commit(buffers, [(tensors, added, 1.0)])

    def _gather(
        self,
        vector: Tensor,
        space: ParameterSpace,
        views: dict[int, Tensor],
        factor: Callable[[Group], float | Tensor],
        buffers: dict[Tensor, Tensor],
    ) -> None:
        """Writes the directions, each times its group's factor, to their views of the vector."""
        given = {id(p) for p in parameters_of(self) if p.grad is not None}
        for absent in views.keys() - given:
            views[absent].zero_()
        order = {p: index for index, p in enumerate(views)}
        for group in self.param_groups:
            scale = factor(group)
            scale = scale.reshape(()) if isinstance(scale, Tensor) else scale
            params = [p for p in group["params"] if id(p) in given and id(p) in views]
            # Torch takes any entry of a group, and loads those of other optimizers: ignored.
            own = {name: group[name] for name in self.defaults if name in group}
            found = sgd_directions(params, own, self.state, buffers)
            if space.layout is not None:
                found = ((p, space.piece(order[id(p)], d)) for p, d in found)
            if len(params) == len(views) and len(vector) <= _SMALL * len(views):
                pairs = list(found)
                written = [views[id(p)] for p, _ in pairs]
                torch._foreach_copy_(written, [direction for _, direction in pairs])
                vector.mul_(scale)
                continue
            for p, direction in found:
                view = views[id(p)]
                if direction.dtype == view.dtype:
                    torch.mul(direction, scale, out=view)
                else:
                    view.copy_(direction).mul_(scale)

    def _vector(self, space: ParameterSpace, like: Any) -> tuple[Tensor, list[Tensor]]:
        """Returns the memory of the last step: fresh pages cost as much as all the arithmetic.

        Its views, one a parameter, cost as much again where there are hundreds.
        """
        wanted = space.shapes, like.dtype, like.device
        if self._memory is not None and self._memory[0] == wanted:
            return self._memory[1:]
        vector = torch.empty(space.size_here, dtype=like.dtype, device=like.device)
        self._memory = wanted, vector, space.views(vector)
        return self._memory[1:]

    def _trained(self, space: ParameterSpace) -> list[Tensor]:
        """Returns the parameters in the order of ``space``, after a check that both hold the same.

        An ``ArgumentError`` says which is missing on either side, was frozen since, or has a sparse
        gradient.
        """
        tensors = check_same(parameters_of(self), space)
        layouts = {p.grad.layout for p in tensors if p.grad is not None}
        if not layouts <= {torch.strided}:
            for p, name in zip(tensors, space.names, strict=True):
                check_dense(p, name)
        return tensors

    def _check_gradients(self) -> None:
        self._trained(self._subspace().parameters)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_membership(group["params"], self._subspace().parameters)

    def _subspace(self) -> Subspace:
        if self.subspace is None:
            remedy = (
                "A copied or unpickled optimizer has none: set `optimizer.subspace`, or copy "
                "them together, the subspace first: `deepcopy((model, subspace, optimizer))`."
            )
            raise ArgumentError("subspace", None, "set before step()", remedy)
        return self.subspace

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


class RestrictedSGD(SubspaceOptimizer):
    """A step of ``torch.optim.SGD`` of which one part is taken, from whatever gradients are there.

    A subclass names the part, and the options that its constructor takes.
    """

    _part: ClassVar[Part]

    def _update(self, basis: EigenBasis, gather: Gather) -> None:
        restrict_(gather(lambda group: -group["lr"]), basis, self._part)


def restrict_(update: Tensor, basis: EigenBasis, part: Part) -> None:
    """Projects an update ``(P,)`` onto the span of a basis or its complement, in its memory."""
    if part == "dominant":
        basis.project(update, out=update)
    else:
        basis.project_out(update, out=update)


def options(arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the options of an optimizer's groups, out of the arguments of its constructor."""
    others = ("self", "params", "subspace", "__class__")
    return {name: value for name, value in arguments.items() if name not in others}


@torch.no_grad()
def write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies ``values`` to ``tensors``, all of them: an exception in between is raised after."""
    if not tensors:
        return
    tensors, values = list(map(local, tensors)), list(map(local, values))
    try:
        torch._foreach_copy_(tensors, values)
    except BaseException:
        torch._foreach_copy_(tensors, values)
        raise
    finally:
        torch.clear_autocast_cache()  # its copies of parameters


def _add(params: list[Tensor], added: list[Tensor], factor: float) -> BaseException | None:
    """Adds in one call of torch, and returns the exception that was raised before or after it."""
    params, added = list(map(local, params)), list(map(local, added))
    version: int | None = None
    try:
        version = params[0]._version  # noqa: SLF001 (counts what is written)
        torch._foreach_add_(params, added, alpha=factor)
    except BaseException as error:  # noqa: BLE001 (an interrupt is raised after the call)
        if version is None or params[0]._version == version:  # noqa: SLF001
            torch._foreach_add_(params, added, alpha=factor)
        return error
    return None


_SMALL = 4096
"""The most elements, in the mean, of tensors that are scaled as one vector, in a further pass."""
_PLAIN = {
    "dampening": 0,
    "weight_decay": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
}
"""The values of options that a group does not have."""


def sgd_directions(
    params: list[Tensor],
    group: Group,
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
    together = group["foreach"]
    if together is None:
        together = not any(map(is_sharded, params))  # beside plain ones they cannot be
    for some in [params] if together and params else [[p] for p in params]:
        yield from zip(some, _directions(some, group, state, buffers), strict=True)


def _directions(
    params: list[Tensor],
    group: Group,
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

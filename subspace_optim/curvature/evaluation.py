"""A parameter state, and the derivatives of one batch's loss there: the two engines of a product.

What is differentiated is the user's own model: its parameters themselves, or leaves that stand in
their places for the time of an evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.func import grad
from torch.utils.checkpoint import CheckpointFunction

from subspace_optim._validation import SecondDerivativeError
from subspace_optim.curvature.objective import Objective, Places, written_out
from subspace_optim.curvature.parameters import LOW_PRECISION
from subspace_optim.curvature.surroundings import Surroundings, dtype_inside

Slopes = Sequence[Tensor | None]


@dataclass
class Evaluate:
    """The mean loss of a batch, and its weight, at what stands in the model."""

    objective: Objective
    batch: Any
    seed: int

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Evaluates them, inside of ``point.at(seed)``."""
        return self.objective.evaluate(self.batch)


@dataclass
class Point:
    """A parameter state, and what is known of the loss there.

    Attributes:
        own: the user's parameters.
        surroundings: what else the loss can reach.
        in_place: differentiates by the user's parameters themselves, else by leaves that share
            their memory, or are copies of them where the dtype asks for it (``"always"``: even
            then).
        dtype: of everything inside of an evaluation; ``None`` for as it is, and float32 in the
            place of low precision.
        written: tensors that an evaluation is known to write to, beside buffers.
    """

    own: list[Tensor]
    surroundings: Surroundings
    in_place: bool | Literal["always"]
    dtype: torch.dtype | None = None
    written: list[Tensor] = field(default_factory=list)
    key: object = None
    weight: float = 0.0
    loss: float | None = None
    gradient: Tensor | None = None
    kept: dict[int, Linearisation] | None = None
    streamed: int = 0

    def __post_init__(self) -> None:
        self.upcast = any(p.dtype in LOW_PRECISION for p in self.surroundings.parameters())
        low = any(p.dtype in LOW_PRECISION for p in self.own)
        copied = self.dtype is not None or (low and self.in_place != "always")
        self.in_place = bool(self.in_place) and not copied
        self._places = Places(self.surroundings.modules, self.own)
        self.leaves = self.own
        if not self.in_place:
            self.leaves = [p.detach().to(dtype_inside(p, self.dtype)) for p in self.own]
            for leaf in self.leaves:
                leaf.requires_grad_()

    def by(self, leaves: Sequence[Tensor]) -> Point:
        """Returns this point, differentiated by other leaves that stand in the model."""
        point = copy.copy(self)
        point.leaves = list(leaves)
        return point

    @contextmanager
    def at(self, seed: int, *, hooks: bool = False) -> Iterator[None]:
        """Evaluates here: the leaves stand in the model, and all that changes is put back.

        Args:
            seed: of all that draws at random.
            hooks: calls the hooks that the user has registered for gradients.
        """
        written = {id(t) for t in self.written}
        pairs = zip(self.own, self.leaves, strict=True)
        moved = [*self.written, *(leaf for p, leaf in pairs if id(p) in written)]
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(self.surroundings.as_found(seed, moved=moved, dtype=self.dtype))
            enter(written_out())
            if self.in_place:
                enter(_as_leaves(self.own, hooks=hooks))
            else:
                enter(self.holding(self.leaves))
            yield

    @contextmanager
    def learning_writes(self) -> Iterator[None]:
        """Adds to ``written`` what is written to inside, which gets back its data."""
        with self.surroundings.writes() as seen:
            yield
        own = {id(leaf): p for leaf, p in zip(self.leaves, self.own, strict=True)}
        known = {id(t) for t in self.written}
        of_user = (own.get(id(t), t) for t in seen)
        self.written += [t for t in of_user if id(t) not in known]

    def holding(self, leaves: Sequence[Tensor]) -> Any:
        """Puts leaves in the places of the parameters."""
        return self._places.holding(leaves)

    @contextmanager
    def displaced(self, values: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yields leaves that have other values, inside of ``at``; no parameter is written to."""
        if self.written:  # by the forward pass: the values are the caller's
            values = [v.detach().clone() for v in values]
        if not self.in_place:
            leaves = [v.detach().requires_grad_() for v in values]
            with self.holding(leaves):
                yield leaves
            return
        held = [(p, p.data) for p in self.own]
        try:
            for p, value in zip(self.own, values, strict=True):
                p.data = value.detach()
            yield self.own
        finally:
            for p, data in held:
                p.data = data

    def known(self) -> int:
        """Returns a number that tells which of these have been found, 0 for none."""
        found = (self.loss is not None, self.gradient is not None, self.kept is not None)
        return sum(1 << bit for bit, is_known in enumerate(found) if is_known)


@contextmanager
def _as_leaves(parameters: Sequence[Tensor], *, hooks: bool) -> Iterator[None]:
    """Parameters that one can differentiate by, without what hooks would make of the gradient."""
    frozen = [p for p in parameters if not p.requires_grad]
    of_all = [p._backward_hooks for p in parameters]  # noqa: SLF001
    hooked = [(found, dict(found)) for found in of_all if found and not hooks]
    try:
        for p in frozen:
            p.requires_grad_()
        for found, _ in hooked:
            found.clear()
        yield
    finally:
        for found, before in hooked:
            found.update(before)
        for p in frozen:
            p.requires_grad_(False)


def _unknown(v: list[Tensor]) -> Slopes:
    """The product of a loss that has not been differentiated twice."""
    raise NotImplementedError


@dataclass
class Linearisation:
    """The loss of one batch near fixed parameters, as far as it has been differentiated.

    Attributes:
        loss: the mean loss.
        weight: what it is a mean over.
        slopes: its gradient, a tensor or ``None`` (zeros) for each parameter.
        product: the linear map ``v -> Hv``, in tensors of the parameters' shapes.
    """

    loss: Tensor
    weight: Tensor
    slopes: Slopes = ()
    product: Callable[[list[Tensor]], Slopes] = _unknown


def value(evaluate: Evaluate, point: Point) -> Linearisation:  # noqa: ARG001 (one signature)
    """Returns the loss. Gradients are on: there are losses that differentiate by themselves."""
    loss, weight = evaluate()
    return Linearisation(loss.detach(), weight)


def first_order(evaluate: Callable[[], tuple[Tensor, Tensor]], point: Point) -> Linearisation:
    """Returns loss and gradient."""
    return gradient_at(evaluate, point.leaves)


def gradient_at(
    evaluate: Callable[[], tuple[Tensor, Tensor]], leaves: Sequence[Tensor]
) -> Linearisation:
    """Returns loss and gradient by leaves that stand in the model."""
    loss, weight = evaluate()
    refuse_reentrant_checkpoints(loss)
    return Linearisation(loss.detach(), weight, _gradient(loss, leaves))


def double_backward(evaluate: Evaluate, point: Point) -> Linearisation:
    """Returns loss, gradient, and products by a second backward pass through the first one."""
    with explained():
        loss, weight = evaluate()
        refuse_functions_of_one_pass(loss)
        slopes = _gradient(loss, point.leaves, create_graph=True)
    return _twice(loss, weight, slopes, point.leaves)


def func(evaluate: Evaluate, point: Point) -> Linearisation:
    """Returns the same: products are the ``vjp`` of ``torch.func.grad`` of the loss."""

    def valued(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        with point.holding(leaves), point.surroundings.buffers_of_this_level():
            loss, weight = evaluate()
        return loss, (loss, weight)

    with explained():
        slopes, (loss, weight) = grad(valued, has_aux=True)(tuple(point.leaves))
        refuse_functions_of_one_pass(loss)
    return _twice(loss, weight, slopes, point.leaves)


ENGINES = {"double_backward": double_backward, "func": func}


def _gradient(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> Slopes:
    if not loss.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)


def _twice(loss: Tensor, weight: Tensor, slopes: Slopes, leaves: Sequence[Tensor]) -> Linearisation:
    """Completes a gradient that carries a graph by the products with its Jacobian.

    H is symmetric: the transposed product of the gradient's Jacobian is the product. The map
    holds the ends of the graph, not the gradient: a kept graph has no P-sized tensor of its own.
    """
    curved = [i for i, s in enumerate(slopes) if s is not None and s.requires_grad]
    ends = [get_gradient_edge(s) for s in slopes if s is not None and s.requires_grad]
    dtypes = [s.dtype for s in slopes if s is not None and s.requires_grad]

    def product(v: list[Tensor]) -> Slopes:
        if not ends:
            return (None,) * len(leaves)
        directions = [v[i].to(dtype) for i, dtype in zip(curved, dtypes, strict=True)]
        with explained():
            return torch.autograd.grad(
                ends, leaves, directions, retain_graph=True, allow_unused=True
            )

    held = [None if s is None else s.detach() for s in slopes]
    return Linearisation(loss.detach(), weight, held, product)


@contextmanager
def explained() -> Iterator[None]:
    """Tells of the way out where torch tells that it has no second derivative.

    Raises:
        SecondDerivativeError: an operation of the model has none.
        RuntimeError: as it was, for any other reason.
    """
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        if "derivative for" in str(error) and "not implemented" in str(error):
            raise SecondDerivativeError(_no_second_derivative(str(error))) from error
        raise


def refuse_functions_of_one_pass(loss: Tensor) -> None:
    """Looks for functions marked ``once_differentiable`` among those that made the loss.

    Torch's own error for them is lost: it lies beside the path from gradient to parameters, so
    the second pass goes around it and leaves their part of the Hessian out without a word.

    Raises:
        SecondDerivativeError: there is one.
    """
    for node in _nodes(loss):
        function: Any = getattr(node, "_forward_cls", None)
        if function is CheckpointFunction:
            raise SecondDerivativeError(_REENTRANT)
        backward = getattr(function, "backward", None)
        while backward is not None:
            if getattr(backward, "__code__", None) is _ONCE:
                cause = f"the backward pass of {function.__name__} is once_differentiable"
                raise SecondDerivativeError(_no_second_derivative(cause))
            backward = getattr(backward, "__wrapped__", None)


def has_functions(loss: Tensor) -> bool:
    """Whether functions of the user's own are among those that made the loss."""
    return any(hasattr(node, "_forward_cls") for node in _nodes(loss))


def refuse_reentrant_checkpoints(output: Tensor) -> None:
    """Looks for checkpointed parts whose backward pass leads to no parameter but by ``.grad``.

    Raises:
        SecondDerivativeError: there is one: derivatives by its parameters would be missing.
    """
    if any(getattr(node, "_forward_cls", None) is CheckpointFunction for node in _nodes(output)):
        raise SecondDerivativeError(_REENTRANT)


_REENTRANT = (
    "A part of the model is checkpointed with use_reentrant=True, which gives no derivatives but "
    "in loss.backward(): those by its parameters would be missing. Use use_reentrant=False."
)
_ONCE: Any = once_differentiable(lambda ctx: ctx).__code__  # that of the wrapper it returns


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """Yields the nodes of the graph that made ``tensor``, each once."""
    pending: list[Any] = [tensor.grad_fn]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            yield node


def _no_second_derivative(cause: str) -> str:
    return (
        f"A part of the model has no second derivative: {cause}. FiniteDifferenceHessian takes "
        "the same arguments and needs gradients only."
    )

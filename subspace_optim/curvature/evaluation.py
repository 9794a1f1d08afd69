"""What is known at one parameter state: loss, gradient, and what is kept for products.

What is differentiated is the user's own model: by its parameters themselves, or by leaves that
stand in their places while it is evaluated.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, DataChangedError
from subspace_optim.curvature.dtensors import local
from subspace_optim.curvature.gathered_places import GatheredPlaces
from subspace_optim.curvature.objective import BatchLoss, Places
from subspace_optim.curvature.parameters import LOW_PRECISION
from subspace_optim.curvature.second_derivatives import refuse_reentrant_checkpoints, written_out
from subspace_optim.curvature.sharding import Layout
from subspace_optim.curvature.surroundings import Surroundings, dtype_inside

PerParameter = Sequence[Tensor | None]
"""One tensor a parameter, of its shape; ``None`` stands for zeros."""


@dataclass
class Point:
    """A parameter state, and what is known of the loss there.

    Attributes:
        own: the user's parameters.
        surroundings: what else the loss can reach.
        in_place: differentiates by the user's parameters themselves; otherwise by leaves that
            share their memory. Where another dtype is needed the leaves are copies all the same,
            but for ``"always"``. Those of a sharded model are always leaves.
        dtype: of everything inside of an evaluation (default: as it is, with float32 in the place
            of low precision).
        written: tensors that an evaluation is known to write to, beside buffers.
        layout: of a model that is sharded: the leaves are what lies on this rank.
        keep_gathered: whether parameters that were gathered stay for backward passes.
        key: tells this state from others.
        weight: N, what the loss of all data is a mean over.
        loss: of all data, once it is known.
        gradient: of all data, once it is known.
        kept: what products need, by the index of the batch, once there has been one.
        streamed: how many batches are not kept.
    """

    own: list[Tensor]
    surroundings: Surroundings
    in_place: bool | Literal["always"]
    dtype: torch.dtype | None = None
    written: list[Tensor] = field(default_factory=list)
    layout: Layout | None = None
    keep_gathered: bool = False
    key: object = None
    weight: float = 0.0
    loss: float | None = None
    gradient: Tensor | None = None
    kept: dict[int, Derivatives] | None = None
    streamed: int = 0

    def __post_init__(self) -> None:
        self.upcast = any(p.dtype in LOW_PRECISION for p in self.surroundings.parameters())
        low = any(p.dtype in LOW_PRECISION for p in self.own)
        copied = self.dtype is not None or (low and self.in_place != "always")
        sharded = self.layout is not None
        self.in_place = bool(self.in_place) and not copied and not sharded
        self._places = self._find_places()
        self.leaves = self.own
        if not self.in_place:
            self.leaves = [local(p).detach().to(dtype_inside(p, self.dtype)) for p in self.own]
            for leaf in self.leaves:
                leaf.requires_grad_()

    def _find_places(self) -> Places | GatheredPlaces:
        modules = self.surroundings.modules
        if self.layout is None:
            return Places(modules, self.own)
        return GatheredPlaces(self.layout, modules, self.own, self.dtype, keep=self.keep_gathered)

    @contextmanager
    def at(self, seed: int, *, hooks: bool = False, forward: bool = True) -> Iterator[None]:
        """Enters the state: the leaves stand in the model, and all that changes is put back.

        Args:
            seed: of all that draws at random.
            hooks: calls the hooks that the user has registered for gradients.
            forward: whether the model is called inside, or at most runs again in backward passes.
        """
        written = {id(t) for t in self.written}
        pairs = zip(self.own, self.leaves, strict=True)
        moved = [*self.written, *(leaf for p, leaf in pairs if id(p) in written)]
        with ExitStack() as stack:
            enter = stack.enter_context
            enter(self.surroundings.as_found(seed, moved=moved, dtype=self.dtype))
            enter(written_out(forward=forward))
            if self.in_place:
                enter(_as_leaves(self.own, hooks=hooks))
            else:
                enter(self.holding(self.leaves))
            if self.upcast:
                enter(_dtypes_explained())
            yield

    @contextmanager
    def learning_writes(self) -> Iterator[None]:
        """Notes in ``written`` which tensors are written to inside, and restores their data."""
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
    def displaced(self, values: Sequence[Tensor]) -> Iterator[Point]:
        """Yields the point of other parameter values, inside of ``at``; no memory is written to."""
        there = copy.copy(self)
        if self.written:  # the forward pass writes to parameters, and the values are the caller's
            values = [v.detach().clone() for v in values]
        if not self.in_place:
            there.leaves = [v.detach().requires_grad_() for v in values]
            with self.holding(there.leaves):
                yield there
            return
        there.leaves = self.own
        held = [(p, p.data) for p in self.own]
        try:
            for p, value in zip(self.own, values, strict=True):
                p.data = value.detach()
            yield there
        finally:
            for p, data in held:
                p.data = data

    def take(self, other: Point) -> None:
        """Takes over loss and gradient of the same state, as they were found in other memory."""
        self.weight, self.loss, self.gradient = other.weight, other.loss, other.gradient

    def check_loss(self, loss: float) -> None:
        """Compares the loss of a pass with that of an earlier one at this state.

        Raises:
            DataChangedError: they differ: by something that the operator does not see.
        """
        double = any(p.dtype == torch.float64 for p in self.own)
        epsilon = torch.finfo(torch.float64 if double else torch.float32).eps
        if self.loss is None or math.isclose(
            loss, self.loss, rel_tol=epsilon**0.5, abs_tol=epsilon
        ):
            return
        raise DataChangedError(
            f"The mean loss over the data is {loss:.8g}, and was {self.loss:.8g} in an earlier "
            "pass at the same parameters: it depends on something that the operator cannot see, "
            "such as another model in the closure of the loss, or data that were written in place. "
            "Make that a part of the model, or of the loss as a module, or make the operator anew."
        )

    def known(self) -> int:
        """Returns a number with one bit each for loss, gradient and what is kept, if known."""
        found = (self.loss is not None, self.gradient is not None, self.kept is not None)
        return sum(1 << bit for bit, is_known in enumerate(found) if is_known)


@contextmanager
def _dtypes_explained() -> Iterator[None]:
    """Adds the way out to torch's own error for a model that names its low precision itself.

    Raises:
        ArgumentError: two dtypes meet in one operation.
        RuntimeError: as it was, for any other reason.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search("BFloat16|Half|dtype", str(error)):
            raise
        found = f"one that does not follow its parameters ({error})"
        allowed = "float32 where the parameters are: low precision is differentiated so"
        remedy = (
            "In the forward pass, write x.to(self.weight.dtype) where a dtype is named; or "
            "measure a float32 copy of the model."
        )
        raise ArgumentError("a dtype inside of the model", found, allowed, remedy) from error


@contextmanager
def _as_leaves(parameters: Sequence[Tensor], *, hooks: bool) -> Iterator[None]:
    """Lets frozen parameters require a gradient, and switches the hooks of gradients off."""
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


def _no_product(v: list[Tensor]) -> PerParameter:
    raise NotImplementedError  # the loss has not been differentiated twice


@dataclass
class Derivatives:
    """The mean loss of one batch at fixed parameters, and its derivatives as far as asked for.

    Attributes:
        loss: the mean loss.
        weight: what it is a mean over.
        gradient: of the mean loss.
        product: the linear map ``v -> A v`` of the batch's curvature matrix.
    """

    loss: Tensor
    weight: Tensor
    gradient: PerParameter = ()
    product: Callable[[list[Tensor]], PerParameter] = _no_product


def loss_alone(batch_loss: BatchLoss, point: Point) -> Derivatives:  # noqa: ARG001 (one signature)
    """Returns the loss. Gradients are on: there are losses that differentiate by themselves."""
    loss, weight = batch_loss()
    return Derivatives(loss.detach(), weight)


def loss_and_gradient(batch_loss: Callable[[], tuple[Tensor, Tensor]], point: Point) -> Derivatives:
    """Returns loss and gradient, by one backward pass."""
    loss, weight = batch_loss()
    refuse_reentrant_checkpoints(loss)
    return Derivatives(loss.detach(), weight, backward(loss, point.leaves))


def backward(loss: Tensor, leaves: Sequence[Tensor], *, create_graph: bool = False) -> PerParameter:
    """Returns the gradient of ``loss`` by ``leaves``."""
    if not loss.requires_grad:
        return (None,) * len(leaves)
    return torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)

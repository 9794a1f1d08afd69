"""``CurrentBatch``: data that are the minibatch which a training is at."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.forwards import Call, Taking
from subspace_optim.curvature.structure import detached

_LOOKED_AT = 1024
"""The elements of each gradient that are looked at, where all may be zero."""


class CurrentBatch:
    """Data that are the last minibatch: the curvature of what a training is at.

    .. code-block:: python

        batch = so.CurrentBatch()
        hessian = so.HessianOperator(model, loss_fn, batch)
        for x, y in loader:
            batch.set(x, y)
            ...

    For an operator each batch is other data: loss, gradient and basis are found anew. Nothing is
    copied: the tensors are held until they are replaced or cleared, and what is written to them
    meanwhile is an error, as with any data that are stored.

    With gradient accumulation the micro-batches of one step are the data together. A step has
    ended once an optimizer has stepped that holds a parameter of the model, and where gradients
    that were there are gone, as after a step that a ``GradScaler`` has skipped.

    Copies, pickled ones too, hold nothing. Each rank of a process group has a batch of its own.
    """

    def __init__(self) -> None:
        self._held: list[_Held] = []
        self._is_over = False  # the step that they are of
        self._is_let_go = False  # once that step is over, and ...
        self._holders = 0  # ... nobody is left who needs it
        self._accumulates = False  # gradients were there when the latest was added
        self._mark: object = None  # tells whether gradients have changed since
        self._models: list[weakref.ref[nn.Module]] = []
        self._parameters: list[weakref.ref[Tensor]] = []  # theirs: a walk takes long at each call
        self._number = 0
        self._had_idle = False  # when the number was last asked for
        self._removals: list[Callable[[], None]] = []
        self._follows = False
        self._listen(register_optimizer_step_post_hook(_Ended(self._step_ended)).remove)

    @classmethod
    def from_forward(cls, model: nn.Module) -> Self:
        """Makes one that takes what ``model`` is called with, from a hook.

        The batches are ``Call(args, kwargs)``, for an operator of a loss of your own:

        .. code-block:: python

            batch = so.CurrentBatch.from_forward(model)

            def batch_loss(model, call):
                return call(model).loss, call.kwargs["input_ids"].numel()

            hessian = so.HessianOperator.from_loss(model, batch_loss, batch)

        Taken are calls with gradients enabled, but for those of the package itself and those
        with which checkpointed parts are computed again. Of calls between two backward passes
        the last one counts, and one after the last backward pass of a step, such as one of
        a validation, does not. A call while no parameter has a gradient begins a step.

        Args:
            model: as it is called in training: with its wrappers, of ``DistributedDataParallel``
                or ``torch.compile``.

        Returns:
            The batch. ``remove()`` takes its hook off.

        Raises:
            ArgumentError: it is no module, or one that was compiled in place.
        """
        if not isinstance(model, nn.Module):
            raise ArgumentError("model", type(model).__name__, "a torch.nn.Module")
        if getattr(model, "_compiled_call_impl", None) is not None:
            remedy = "Use torch.compile(model), or CurrentBatch() and `batch.set(...)`."
            raise ArgumentError("model", "compiled in place", "one whose hooks are called", remedy)
        batch = cls()
        batch.follow(model)
        batch._follows = True
        hook = Taking(batch._take)
        batch._listen(model.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return batch

    # --- for the training loop ------------------------------------------------------------------

    def set(self, *batch: Any) -> None:
        """Replaces what is held.

        Args:
            *batch: ``x, y``, or one batch of any form, such as a mapping.

        ``ArgumentError`` where there is none, or it is an iterator.
        """
        self._replace(_one(batch))

    def add(self, *batch: Any) -> None:
        """Adds a micro-batch of the same step; the first one of a step replaces what is held.

        Args:
            *batch: as of ``set``.

        ``ArgumentError`` as from ``set``.
        """
        added, gradients = _one(batch), self._gradients()
        if not self._held or self._is_over or (self._accumulates and not gradients):
            self._replace(added)
        else:
            self._append(added, gradients)
        self._note(gradients)

    def clear(self) -> None:
        """Drops what is held, and refers to it no longer."""
        self._is_let_go = False
        if self._held:
            self._held = []
            self._number += 1

    def hold(self) -> None:
        """Keeps what is held until ``let_go``, which has to be called once for each ``hold``."""
        self._holders += 1

    def let_go(self, *, drop: bool = True) -> None:
        """Ends a ``hold``.

        What is held is dropped when an optimizer's step is over, and all who follow it have seen
        it: torch calls the hook of all optimizers after those of the one that has stepped.

        Args:
            drop: whether it is; not after a step that has not been taken.
        """
        self._holders = max(0, self._holders - 1)
        self._is_let_go = self._is_let_go or drop

    def remove(self) -> None:
        """Drops what is held, and takes all hooks off: no step and no call is followed any more."""
        self.clear()
        for remove in self._removals:
            remove()

    # --- for operators --------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Another one whenever ``held`` returns other batches."""
        if self._has_idle() != self._had_idle:
            self._had_idle = not self._had_idle
            self._number += 1
        return self._number

    @property
    def of_calls(self) -> bool:
        """Whether the batches are calls of a model."""
        return self._follows

    def follow(self, model: nn.Module) -> None:
        """Takes the steps of optimizers that hold a parameter of ``model`` for its steps.

        Until it has a model, it takes those of all optimizers.
        """
        if all(known() is not model for known in self._models):
            self._models.append(weakref.ref(model))
        self._parameters = []  # to be looked up: some may have been added

    def held(self) -> list[Any]:
        """Returns the batches of the present step."""
        self._settle()
        return [held.batch for held in self._held[: len(self._held) - self._has_idle()]]

    def __iter__(self) -> Iterator[Any]:
        """Iterates over the batches of the present step.

        Raises:
            ArgumentError: there are none.
        """
        batches = self.held()
        if not batches:
            remedy = "Call `batch.set(x, y)` in the loop, before `optimizer.step()`."
            if self._follows:
                remedy = (
                    "Call the model with gradients enabled: the one that from_forward was given, "
                    "with the wrappers that it has in training. Or use CurrentBatch() and "
                    "`batch.set(...)`."
                )
            raise ArgumentError("the CurrentBatch", "empty", "of at least one batch", remedy)
        return iter(batches)

    def __reduce__(self) -> Any:
        return type(self), ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._held)} held)"

    # --- steps ----------------------------------------------------------------------------------

    def _take(self, call: Call) -> None:
        """Takes a call of the model."""
        gradients = self._gradients()
        if not self._held or self._is_over or not gradients:
            self._replace(detached(call))
        elif _mark(gradients) == self._mark:  # no backward pass was of the latest
            self._held[-1] = _Held(detached(call), self._held[-1].gradients)
            self._number += 1
        else:
            self._append(detached(call), gradients)
        self._note(gradients)

    def _replace(self, batch: Any) -> None:
        self._held = [_Held(batch)]
        self._is_over = self._accumulates = self._is_let_go = False
        self._mark = None
        self._number += 1

    def _append(self, batch: Any, gradients: list[Tensor]) -> None:
        began = _mark(gradients) != self._mark  # or they are as they were before a backward pass
        self._held.append(_Held(batch, _norms(gradients) if began else []))
        self._number += 1

    def _note(self, gradients: list[Tensor]) -> None:
        self._accumulates = self._accumulates or bool(gradients)
        self._mark = _mark(gradients)

    def _settle(self) -> None:
        """Finds where the step begins: with the last one at which all gradients were zero.

        ``zero_grad(set_to_none=False)`` after a step that was skipped leaves no other trace. It is
        found out here, since a device has to be waited for, and nobody may ever ask.
        """
        for index in range(len(self._held) - 1, 0, -1):
            norms = self._held[index].gradients
            if norms and not any(map(bool, norms)):
                del self._held[:index]
                break
        self._held = [_Held(held.batch) for held in self._held]

    def _has_idle(self) -> bool:
        """Whether the latest call was of no backward pass, where earlier ones were."""
        several = self._follows and not self._is_over and len(self._held) > 1
        return several and _mark(self._gradients()) == self._mark

    def _gradients(self) -> list[Tensor]:
        parameters = [known() for known in self._parameters]
        if not parameters or any(p is None for p in parameters):  # they have been replaced
            parameters = [p for model in self._models_alive() for p in model.parameters()]
            self._parameters = [weakref.ref(p) for p in parameters if p is not None]
        return [p.grad for p in parameters if p is not None and p.grad is not None]

    def _models_alive(self) -> list[nn.Module]:
        return [model for model in (known() for known in self._models) if model is not None]

    def _step_ended(self, optimizer: Optimizer) -> None:
        if self._is_let_go and not self._holders:
            self.clear()
        if not self._held or self._is_over:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not self._models or any(
            id(p) in stepped for model in self._models_alive() for p in model.parameters()
        ):
            if self._has_idle():  # gradients tell no more of it once they are set to zero
                del self._held[-1]
            self._is_over = True

    def _listen(self, remove: Callable[[], None]) -> None:
        self._removals.append(remove)
        weakref.finalize(self, remove).atexit = False


class _Held(NamedTuple):
    """A batch, and norms of the gradients when it came, if they may all have been zero."""

    batch: Any
    gradients: list[Tensor] = []  # noqa: RUF012 (never written to)


class _Ended:
    """A hook of all optimizers, called when a step has ended.

    Args:
        tell: a bound method, called with the optimizer; it is held weakly.
    """

    def __init__(self, tell: Callable[[Optimizer], None]) -> None:
        self._tell = weakref.WeakMethod(tell)

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        tell = self._tell()
        if tell is not None:
            tell(optimizer)


def _one(batch: tuple[Any, ...]) -> Any:
    """Returns the batch that is meant by the arguments of ``set``.

    Raises:
        ArgumentError: there is none, or it is an iterator.
    """
    if not batch:
        raise ArgumentError("batch", "empty", "`x, y`, or one batch of any form")
    one = batch[0] if len(batch) == 1 else batch
    if isinstance(one, Iterator):
        remedy = "Pass what it yields: `batch.set(*next(iterator))`."
        raise ArgumentError("batch", type(one).__name__, "one batch", remedy)
    return one


def _mark(gradients: list[Tensor]) -> object:
    """Returns what is another one once a backward pass has added to gradients."""
    return [(id(g), g._version) for g in gradients]  # noqa: SLF001 (it has no public name)


@torch.no_grad()
def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """Returns norms of parts of the gradients, on their devices: zero where the parts are."""
    local = (getattr(g, "_local_tensor", g).detach() for g in gradients)
    dense = (g.coalesce().values() if g.is_sparse else g for g in local)
    parts = [part for g in dense if (part := g.flatten()[:_LOOKED_AT]).numel()]
    return list(torch._foreach_norm(parts, torch.inf)) if parts else []  # noqa: SLF001 (as torch's own clip_grad_norm_)

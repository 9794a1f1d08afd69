"""How an evaluation leaves everything as it was found, whatever the loss reads, writes and draws.

What ``reachable`` finds is noted before an evaluation and put back after it. So one parameter
state has one loss, and training does not change because somebody measured it.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspace_optim.curvature.contexts import (
    interrupts_wait,
    no_autocast_inside,
    states_kept,
)
from subspace_optim.curvature.dtensors import is_sharded
from subspace_optim.curvature.parameters import LOW_PRECISION
from subspace_optim.curvature.reachable import MISSING, Reachable, contents_of, once


class _Alone:
    """A lock that one thread holds, as often as it likes, and that knows whether this one does."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holder: int | None = None
        self._depth = 0

    @property
    def held_here(self) -> bool:
        """Whether this thread holds it."""
        return self._holder == threading.get_ident()

    def __enter__(self) -> None:
        self._lock.acquire()
        self._holder = threading.get_ident()
        self._depth += 1

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._holder = None
        self._lock.release()


ALONE = _Alone()
"""A lock that is held while a model is looked at or evaluated, since leaves may then stand in the
places of its parameters."""


class Surroundings(Reachable):
    """What can be reached from a model and its loss at this moment, and how it is put back.

    Args:
        model: its parameters and buffers are part of what the loss depends on.
        loss: anything callable: a function with its closure and globals, a module, an object.
        device: where the parameters live, whose own generator is drawn from too.

    Attributes:
        moved_names: names of the attributes and keys that evaluations have changed.
    """

    def __init__(self, model: nn.Module, loss: Any, device: torch.device) -> None:
        super().__init__(model, loss, device)
        self.moved_names: set[Any] = set()

    @contextmanager
    def as_found(
        self,
        seed: int,
        *,
        moved: Iterable[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> Iterator[None]:
        """Seeds all generators, and puts back at the end whatever was changed inside.

        An interrupt waits for the end of the block.

        Args:
            seed: of the generators.
            moved: tensors that are known to be written to, beside the buffers.
            dtype: of floating numbers inside (default: low precision becomes float32).
        """
        with ALONE, interrupts_wait(), ExitStack() as stack:
            # Put back in reverse: tensors first, by assignments that cannot fail, and last what
            # needs memory or an operation.
            stack.enter_context(states_kept(self._generators, seed))
            stack.callback(self._python_state())
            # A loss may call backward() itself. Gradients come back after dtypes have.
            stack.callback(_assign, "grad", [(p, p.grad) for p in self.parameters()])
            held: list[tuple[Tensor, Tensor]] = []
            stack.callback(_assign, "data", held)
            swapped: list[tuple[Tensor, Tensor]] = []
            stack.callback(_swap, swapped)
            for p in self.parameters():
                p.grad = None
            stack.enter_context(no_autocast_inside())
            stack.callback(setattr, parametrize, "_cache_enabled", parametrize._cache_enabled)  # noqa: SLF001
            parametrize._cache_enabled = 0  # noqa: SLF001 (its weights belong to the user's graph)
            moved = list(moved)
            buffers, written = self.buffers(), {id(t) for t in moved}
            copied = {id(b) for b in buffers} | written
            copied |= {id(t) for t in self.plain_tensors()}
            for t in once([*self.parameters(), *buffers, *self._loose, *moved]):
                if is_sharded(t):
                    continue  # the model computes with others in their places
                wanted = dtype_inside(t, dtype)
                if wanted != t.dtype and t.requires_grad and t.is_leaf:
                    other = t.detach().to(wanted).requires_grad_()
                    _swap([(t, other)])
                    swapped.append((t, other))
                elif id(t) in copied or wanted != t.dtype:
                    held.append((t, t.data))
                    t.data = t.detach().to(wanted, copy=True)
            yield

    @contextmanager
    def writes(self) -> Iterator[list[Tensor]]:
        """Yields a list of the tensors that are written to inside, and restores their data.

        The list is filled at the end. It has no buffers: each evaluation copies them in any case.
        """
        watched = [t for t in self.parameters() + self._loose if not is_sharded(t)]
        watch = _Writes([t for t in watched if t.layout == torch.strided])
        written: list[Tensor] = []
        try:
            with watch:
                yield written
        finally:
            with torch.no_grad():
                for t, value in watch.before.values():
                    written.append(t)
                    t.detach().copy_(value)

    @contextmanager
    def buffers_of_this_level(self) -> Iterator[None]:
        """Puts clones in the places of the buffers.

        Inside of a transform of ``torch.func`` only tensors made there may be written to.
        """
        places = [
            (m._buffers, name, b)  # noqa: SLF001
            for m in self.modules
            for name, b in m._buffers.items()  # noqa: SLF001
            if b is not None
        ]
        clones = {id(b): b.clone() for _, _, b in places}
        try:
            for owner, name, b in places:
                owner[name] = clones[id(b)]
            yield
        finally:
            for owner, name, b in places:
                owner[name] = b

    def _python_state(self) -> Callable[[], None]:
        """Returns a function that puts back namespaces, containers, cells, globals and arrays."""
        namespaces = [(n, dict(n)) for n in [*self._owners, *self._namespaces]]
        sequences = [(s, list(s)) for s in self._sequences]
        cells = [(c, contents_of(c)) for c in self._cells]
        named = [(s, put, {n: s.get(n, MISSING) for n in names}) for s, put, names in self._named]
        arrays = [(a, a.copy()) for a in self._arrays]

        def restore() -> None:
            for namespace, held in namespaces:
                if not _same(namespace, held):
                    self.moved_names |= _put_entries_back(namespace, held)
            for sequence, items in sequences:
                if len(sequence) != len(items) or any(map(operator.is_not, sequence, items)):
                    sequence.clear()
                    add = sequence.update if isinstance(sequence, set) else sequence.extend
                    add(items)
            for cell, contents in cells:
                if contents is not MISSING and contents_of(cell) is not contents:
                    cell.cell_contents = contents
            for space, put, values in named:
                for name, value in values.items():
                    if value is not MISSING and space.get(name, MISSING) is not value:
                        put(name, value)
            for array, numbers in arrays:
                if array.flags.writeable:
                    array[...] = numbers

        return restore


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return (
        len(now) == len(before)
        and all(map(operator.is_, now.values(), before.values()))
        and list(now) == list(before)
    )


def _put_entries_back(now: dict[Any, Any], before: dict[Any, Any]) -> set[Any]:
    """Puts entries back, and returns their keys.

    One by one where the order allows it, since another thread may be reading the dict.
    """
    added = [key for key in now if key not in before]
    changed = [key for key, value in before.items() if now.get(key, MISSING) is not value]
    for key in added:
        del now[key]
    for key in changed:
        now[key] = before[key]
    if list(now) != list(before):  # in another order, as a cache has them after a look-up
        now.clear()
        now.update(before)
    return {*added, *changed}


def _assign(name: str, held: Sequence[tuple[Tensor, Tensor | None]]) -> None:
    for tensor, value in held:
        setattr(tensor, name, value)


def _swap(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Exchanges what two tensors are, and keeps each with what accumulates its gradient.

    To assign data of another dtype makes torch forget that node, with the hooks by which
    ``DistributedDataParallel`` sums gradients over ranks, without a word.
    """
    for tensor, other in pairs:
        torch._C._swap_tensor_impl(tensor, other)  # noqa: SLF001


def dtype_inside(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a tensor inside of an evaluation: low precision becomes float32."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if dtype is not None:
        return dtype
    return torch.float32 if tensor.dtype in LOW_PRECISION else tensor.dtype


class _Writes(TorchDispatchMode):
    """Keeps what some tensors held before they were first written to."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watched = {t.untyped_storage().data_ptr(): t for t in tensors if t.numel()}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema  # noqa: SLF001 (there is no public way to ask)
        if schema.is_mutable:
            named = dict(zip((a.name for a in schema.arguments), args, strict=False))
            named |= kwargs or {}
            for argument in schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    self._note(named.get(argument.name))
        return func(*args, **(kwargs or {}))

    def _note(self, written: Any) -> None:
        for t in tree_leaves(written):
            if isinstance(t, Tensor) and t.layout == torch.strided:
                key = t.untyped_storage().data_ptr()
                if key in self._watched and key not in self.before:
                    watched = self._watched[key]
                    self.before[key] = watched, watched.detach().clone()

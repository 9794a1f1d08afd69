"""What a loss can reach beside its parameters, and how an evaluation leaves it as it was found.

A forward pass may read and write more than parameters and buffers: running statistics, a hidden
state, a counter, a queue, a generator of its own, the critic in a closure. All of that is looked up
once for each look at the model, noted before an evaluation, and put back after it, so that one
parameter state has one loss, and training does not change because somebody measured it.
"""

from __future__ import annotations

import dis
import operator
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from subspace_optim.curvature.contexts import (
    Generator,
    global_generators,
    seed_generator,
    states_kept,
)
from subspace_optim.curvature.parameters import LOW_PRECISION

_MOST = 50_000
"""Objects that are looked at, at most: what is further away is seen by the proof alone."""
_LONG = 1_000
"""Elements of a container that is looked into: a longer one holds data ..."""
_LONGER = 100_000
"""... and is noted up to this length."""
_SMALL = 1 << 20
"""Bytes of a plain tensor that is copied for each evaluation; of a larger one it is learned first
whether it is written to."""
_LARGE = 1 << 24
"""Bytes of a NumPy array that is noted."""
_APART = {
    "torch", "subspace_optim", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate",
    "transformers", "wandb", "mlflow", "tensorboard", "tqdm", "rich", "logging", "threading",
    "multiprocessing", "concurrent", "asyncio",
}  # fmt: skip
"""Packages whose objects have threads of their own, or are not part of a loss."""
_NUMBERS = (bool, int, float, complex)
_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}
_INTERNAL = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
"""What every module has, and few fill: the dicts of hooks."""
_MISSING = object()
ALONE = threading.RLock()
"""Held by whoever looks at a model or evaluates it: in between, others would find its leaves."""


class Surroundings:
    """What can be reached from a model and its loss, at this moment.

    Args:
        model: its parameters and buffers are part of what the loss depends on.
        loss: anything callable: a function with its closure and globals, a module, an object.
        device: where the parameters live, whose own generator is drawn from too.

    Attributes:
        modules: all that were found, those of the model first.
        moved_names: of attributes and keys that evaluations have changed.
    """

    def __init__(self, model: nn.Module, loss: Any, device: torch.device) -> None:
        self.modules: list[nn.Module] = []
        self._owners: list[dict[str, Any]] = []  # attributes of modules and objects
        self._classes: list[tuple[type, dict[str, Any]]] = []
        self._namespaces: list[dict[Any, Any]] = []
        self._sequences: list[Any] = []
        self._cells: list[CellType] = []
        self._globals: list[tuple[dict[str, Any], set[str]]] = []
        self._generators: list[Generator] = global_generators(device)
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._loose: list[Tensor] = []
        self.moved_names: set[Any] = set()
        self._walk([model, loss])
        registered = {id(t) for t in self.parameters() + self.buffers()}
        self._loose = [t for t in self._loose if id(t) not in registered]

    def parameters(self) -> list[Tensor]:
        """Returns the parameters of all modules, each once."""
        return _once(p for m in self.modules for p in m._parameters.values())  # noqa: SLF001

    def buffers(self) -> list[Tensor]:
        """Returns the buffers of all modules, each once."""
        return _once(b for m in self.modules for b in m._buffers.values())  # noqa: SLF001

    def tensors(self) -> list[Tensor]:
        """Returns all of both on which the loss depends.

        Running statistics of layers that normalise by those of the batch are written, not read.
        """
        written = {
            id(b)
            for m in self.modules
            if isinstance(m, _BatchNorm | _InstanceNorm) and _by_batch(m)
            for b in m._buffers.values()  # noqa: SLF001
        }
        return [t for t in self.parameters() + self.buffers() if id(t) not in written]

    def modes(self) -> tuple[bool, ...]:
        """Returns whether each module is in train mode."""
        return tuple(module.training for module in self.modules)

    def numbers(self, moved_names: set[Any]) -> int:
        """Returns a number that tells of those among the attributes of modules and objects.

        Args:
            moved_names: of counters and the like, which evaluations themselves change.
        """
        found = [
            value
            for owner in self._owners
            for name, value in owner.items()
            if type(value) in _NUMBERS and name not in moved_names
        ]
        found += [c for c in map(_contents, self._cells) if type(c) in _NUMBERS]
        return hash(tuple(found))

    def plain_tensors(self) -> list[Tensor]:
        """Returns those of the tensors that are neither parameters nor buffers that are small."""
        return [t for t in self._loose if t.layout == torch.strided and t.nbytes <= _SMALL]

    # --- the walk -------------------------------------------------------------------------------

    def _walk(self, roots: list[Any]) -> None:
        seen: dict[int, Any] = {}  # holds what it has seen, so that no address is used again
        pending = roots[::-1]
        while pending and len(seen) < _MOST:
            thing = pending.pop()
            if type(thing) in _ATOMS or id(thing) in seen or isinstance(thing, type):
                continue
            seen[id(thing)] = thing
            pending += list(self._enter(thing))[::-1]

    def _enter(self, thing: Any) -> Iterator[Any]:
        """Notes one object, and yields those that it refers to."""
        if isinstance(thing, Tensor):
            self._loose.append(thing)
            yield from (thing._backward_hooks or {}).values()  # noqa: SLF001
        elif isinstance(thing, nn.Module):
            self.modules.append(thing)
            self._owners.append(thing.__dict__)
            yield from (v for name, v in thing.__dict__.items() if name not in _INTERNAL or v)
            yield from self._enter_class(type(thing))
        elif isinstance(thing, dict):
            if len(thing) <= _LONGER:
                self._namespaces.append(thing)
            yield from thing.values() if len(thing) <= _LONG else ()
        elif isinstance(thing, list | set | deque):
            if len(thing) <= _LONGER:
                self._sequences.append(thing)
            yield from thing if len(thing) <= _LONG else ()
        elif isinstance(thing, tuple | frozenset):
            yield from thing if len(thing) <= _LONG else ()
        elif isinstance(thing, MethodType):
            yield from (thing.__self__, thing.__func__)
        elif isinstance(thing, partial):
            yield from (thing.func, thing.args, thing.keywords)
        elif isinstance(thing, FunctionType):
            yield from self._enter_function(thing)
        elif isinstance(thing, property):
            yield thing.fget
        elif isinstance(thing, staticmethod | classmethod):
            yield thing.__func__
        elif isinstance(thing, Generator):
            if not isinstance(thing, random.SystemRandom):  # it has no state
                self._generators.append(thing)
        elif isinstance(thing, np.ndarray):
            if thing.nbytes <= _LARGE and thing.dtype != object:
                self._arrays.append(thing)
        elif isinstance(getattr(thing, "__dict__", None), dict) and _keeps_state(thing.__class__):
            self._owners.append(thing.__dict__)
            if not _is_installed(_file_of(thing.__class__)):
                yield from thing.__dict__.values()
                yield from self._enter_class(type(thing))

    def _enter_class(self, kind: type) -> Iterator[Any]:
        """Notes the attributes of the user's own classes, and yields them and all methods."""
        for base in kind.__mro__:
            if base is not object and not _is_installed(_file_of(base)):
                held = {n: v for n, v in vars(base).items() if not n.startswith("__")}
                self._classes.append((base, {n: v for n, v in held.items() if not callable(v)}))
                yield from held.values()
                yield vars(base).get("__call__")

    def _enter_function(self, function: FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            self._cells.append(cell)
            yield _contents(cell)
        yield function.__defaults__
        yield function.__kwdefaults__
        yield getattr(function, "__wrapped__", None)
        if _is_installed(function.__code__.co_filename):
            return
        self._namespaces.append(function.__dict__)
        names, attributes = _names(function.__code__)
        space = function.__globals__
        self._globals.append((space, names & space.keys()))
        for name in names & space.keys():
            value = space[name]
            if isinstance(value, ModuleType):
                if not _is_installed(getattr(value, "__file__", None) or "<frozen"):
                    found = attributes & vars(value).keys()
                    self._globals.append((vars(value), found))
                    yield from (vars(value)[attribute] for attribute in found)
            else:
                yield value

    # --- an evaluation --------------------------------------------------------------------------

    @contextmanager
    def as_found(
        self,
        seed: int,
        *,
        moved: Iterable[Tensor] = (),
        dtype: torch.dtype | None = None,
    ) -> Iterator[None]:
        """What is changed inside is put back, and what draws at random draws from ``seed``.

        An interrupt waits until it is over.

        Args:
            seed: of all generators that can be reached.
            moved: tensors that are known to be written to, beside the buffers.
            dtype: of floating numbers inside (default: low precision becomes float32).
        """
        with ALONE, _interrupts_wait(), ExitStack() as stack:
            # What needs no memory and no operation comes back first: an error changes nothing.
            for restore in (states_kept(self._generators), self._python_state()):
                stack.callback(restore)
            # A loss may call backward() itself. Gradients come back after dtypes have.
            stack.callback(_give_back, [(p, p.grad) for p in self.parameters()])
            held: list[tuple[Tensor, Tensor]] = []
            stack.callback(_put_back, held)
            for p in self.parameters():
                p.grad = None
            stack.enter_context(_no_autocast())
            stack.callback(setattr, parametrize, "_cache_enabled", parametrize._cache_enabled)  # noqa: SLF001
            parametrize._cache_enabled = 0  # noqa: SLF001 (its weights belong to the user's graph)
            moved = list(moved)
            buffers, written = self.buffers(), {id(t) for t in moved}
            copied = {id(b) for b in buffers} | written
            copied |= {id(t) for t in self.plain_tensors()}
            for t in _once([*self.parameters(), *buffers, *self._loose, *moved]):
                wanted = dtype_inside(t, dtype)
                if id(t) in copied or wanted != t.dtype:
                    held.append((t, t.data))
                    t.data = t.detach().to(wanted, copy=True)
            for generator in self._generators:
                seed_generator(generator, seed)
            yield

    @contextmanager
    def writes(self) -> Iterator[list[Tensor]]:
        """Yields a list that fills with the tensors that are written to, which get back their data.

        Buffers are not among them: an evaluation has copies of those in any case.
        """
        watch = _Writes([t for t in self.parameters() + self._loose if t.layout == torch.strided])
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
        """Puts clones in the places of the buffers: a transform may write only to what it made."""
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
        """Returns what puts namespaces, containers, cells, globals and arrays back."""
        namespaces = [(n, dict(n)) for n in [*self._owners, *self._namespaces]]
        classes = [(c, dict(held)) for c, held in self._classes]
        sequences = [(s, list(s)) for s in self._sequences]
        cells = [(c, _contents(c)) for c in self._cells]
        variables = [(g, {n: g.get(n, _MISSING) for n in names}) for g, names in self._globals]
        arrays = [(a, a.copy()) for a in self._arrays]

        def restore() -> None:
            for namespace, held in namespaces:
                if not _same(namespace, held):
                    self.moved_names |= _put_entries_back(namespace, held)
            for kind, attributes in classes:
                for name, value in attributes.items():
                    if vars(kind).get(name, _MISSING) is not value:
                        setattr(kind, name, value)
            for sequence, items in sequences:
                if len(sequence) != len(items) or any(map(operator.is_not, sequence, items)):
                    sequence.clear()
                    add = sequence.update if isinstance(sequence, set) else sequence.extend
                    add(items)
            for cell, contents in cells:
                if contents is not _MISSING and _contents(cell) is not contents:
                    cell.cell_contents = contents
            for space, values in variables:
                for name, value in values.items():
                    if value is not _MISSING and space.get(name, _MISSING) is not value:
                        space[name] = value
            for array, numbers in arrays:
                if array.flags.writeable:
                    array[...] = numbers

        return restore


def _once(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return list({id(t): t for t in tensors if t is not None}.values())


def _by_batch(module: Any) -> bool:
    """Whether a layer normalises by the statistics of the batch."""
    by_batch: bool = module.training or not module.track_running_stats
    return by_batch


@lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[set[str], set[str]]:
    """Returns the globals that code and the functions inside of it name, and the attributes."""
    names = {
        i.argval for i in dis.get_instructions(code) if i.opname.endswith(("_GLOBAL", "_NAME"))
    }
    attributes = set(code.co_names)
    for inner in (_names(c) for c in code.co_consts if isinstance(c, CodeType)):
        names, attributes = names | inner[0], attributes | inner[1]
    return names, attributes


@lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    """Whether code is the standard library's or an installed package's: it is not looked into."""
    return "site-packages" in file or "dist-packages" in file or file.startswith(_STANDARD)


_STANDARD = (str(getattr(sys, "base_prefix", sys.prefix)) + "/lib", "<frozen")


@lru_cache(maxsize=4096)
def _file_of(kind: type) -> str:
    """Returns where a class is defined, as far as its module tells."""
    if kind.__module__.partition(".")[0] in sys.builtin_module_names:
        return "<frozen"
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or ""


@lru_cache(maxsize=4096)
def _keeps_state(kind: type) -> bool:
    """Whether the attributes of objects of a class may be part of what a loss reads and writes."""
    if issubclass(kind, ModuleType | Optimizer | threading.Thread):
        return False
    package = kind.__module__.partition(".")[0]
    return package not in _APART and package not in sys.builtin_module_names


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return (
        len(now) == len(before)
        and all(map(operator.is_, now.values(), before.values()))
        and list(now) == list(before)
    )


def _put_entries_back(now: dict[Any, Any], before: dict[Any, Any]) -> set[Any]:
    """Puts entries back, one by one: others may look at the dict meanwhile. Returns their keys."""
    added = [key for key in now if key not in before]
    changed = [key for key, value in before.items() if now.get(key, _MISSING) is not value]
    for key in added:
        del now[key]
    for key in changed:
        now[key] = before[key]
    if list(now) != list(before):  # moved to the end, as the entries of a cache are
        now.clear()
        now.update(before)
    return {*added, *changed}


def _put_back(held: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, data in held:
        tensor.data = data


def _give_back(held: list[tuple[Tensor, Tensor | None]]) -> None:
    for parameter, gradient in held:
        parameter.grad = gradient


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Autocast that the model enters itself stays off, for this thread."""
    switch, own = torch.set_autocast_enabled, threading.get_ident()

    def only_off(*arguments: Any) -> None:
        on = arguments[-1] and threading.get_ident() != own
        switch(*arguments[:-1], on)  # type: ignore[call-overload]

    torch.set_autocast_enabled = only_off  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.set_autocast_enabled = switch


def dtype_inside(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a tensor inside of an evaluation: low precision becomes float32."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if dtype is not None:
        return dtype
    return torch.float32 if tensor.dtype in LOW_PRECISION else tensor.dtype


# --- interrupts and writes -----------------------------------------------------------------------


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C and SIGTERM come after what is inside; a second one comes at once.

    Between two instructions of a ``finally`` an interrupt would leave things half put back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    handlers: dict[int, Any] = {}
    for waiting in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(waiting)
        if callable(handler):
            handlers[int(waiting)] = handler

    def wait(number: int, frame: Any) -> None:
        if came:
            handlers[number](number, frame)
        came.append((number, frame))

    for number in handlers:
        signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if came:
            handlers[came[0][0]](*came[0])


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

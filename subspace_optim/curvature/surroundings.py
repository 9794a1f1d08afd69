"""What a loss can reach beside its parameters, and how an evaluation leaves it as it was found.

A forward pass may read and write more than parameters and buffers: running statistics, a hidden
state, a counter, a queue, a generator of its own, the critic in a closure. All of that is looked up
once for each look at the model, noted before an evaluation, and put back after it, so that one
parameter state has one loss, and training does not change because somebody measured it.
"""

from __future__ import annotations

import operator
import random
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
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

from subspace_optim.curvature.parameters import LOW_PRECISION

_MOST = 50_000
"""Objects that are looked at, at most: what is further away is seen by the proof alone."""
_LONG = 1_000
"""Elements of a container that is looked into: a longer one holds data."""
_LARGE = 1 << 20
"""Bytes of a NumPy array that is noted: a larger one holds data."""
_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}
_INTERNAL = set(vars(nn.Module())) - {"_parameters", "_buffers", "_modules"}
"""What every module has, and few fill: the dicts of hooks."""
_MISSING = object()
ALONE = threading.RLock()
"""Held by whoever looks at a model or evaluates it: in between, others would find its leaves."""
_Generator = torch.Generator | np.random.Generator | np.random.RandomState | random.Random


class Surroundings:
    """What can be reached from a model and its loss, at this moment.

    Args:
        model: its parameters and buffers are part of what the loss depends on.
        loss: anything callable: a function with its closure and globals, a module, an object.
        device: where the parameters live, whose own generator is drawn from too.

    Attributes:
        modules: all that were found, those of the model first.
    """

    def __init__(self, model: nn.Module, loss: Any, device: torch.device) -> None:
        self.modules: list[nn.Module] = []
        self._namespaces: list[dict[Any, Any]] = []
        self._sequences: list[Any] = []
        self._cells: list[CellType] = []
        self._globals: list[tuple[dict[str, Any], set[str]]] = []
        self._generators: list[_Generator] = global_generators(device)
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._loose: list[Tensor] = []
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
        elif isinstance(thing, nn.Module):
            self.modules.append(thing)
            self._namespaces.append(thing.__dict__)
            yield from (v for name, v in thing.__dict__.items() if name not in _INTERNAL or v)
            yield getattr(type(thing), "forward", None)
        elif isinstance(thing, dict):
            if len(thing) <= _LONG:
                self._namespaces.append(thing)
                yield from thing.values()
        elif isinstance(thing, list | set | deque):
            if len(thing) <= _LONG:
                self._sequences.append(thing)
                yield from thing
        elif isinstance(thing, tuple | frozenset):
            yield from thing if len(thing) <= _LONG else ()
        elif isinstance(thing, MethodType):
            yield from (thing.__self__, thing.__func__)
        elif isinstance(thing, partial):
            yield from (thing.func, thing.args, thing.keywords)
        elif isinstance(thing, FunctionType):
            yield from self._enter_function(thing)
        elif isinstance(thing, _Generator):
            self._generators.append(thing)
        elif isinstance(thing, np.ndarray):
            if thing.nbytes <= _LARGE and thing.dtype != object:
                self._arrays.append(thing)
        elif _keeps_state(thing.__class__) and isinstance(getattr(thing, "__dict__", None), dict):
            self._namespaces.append(thing.__dict__)
            yield from thing.__dict__.values()
            yield vars(type(thing)).get("__call__")

    def _enter_function(self, function: FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            self._cells.append(cell)
            try:
                yield cell.cell_contents
            except ValueError:  # it has no contents yet
                continue
        yield function.__defaults__
        yield function.__kwdefaults__
        yield getattr(function, "__wrapped__", None)
        if not _is_installed(function.__code__.co_filename):
            names = _names(function.__code__) & function.__globals__.keys()
            self._globals.append((function.__globals__, names))
            yield from (function.__globals__[name] for name in names)

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
            for restore in (self._generator_states(), self._python_state()):
                stack.callback(restore)
            held: list[tuple[Tensor, Tensor]] = []
            stack.callback(_put_back, held)
            stack.callback(setattr, parametrize, "_cache_enabled", parametrize._cache_enabled)  # noqa: SLF001
            parametrize._cache_enabled = 0  # noqa: SLF001 (its weights belong to the user's graph)
            buffers, written = self.buffers(), {id(t) for t in moved}
            copied = {id(b) for b in buffers} | written
            for t in self.parameters() + buffers + self._loose:
                wanted = dtype_inside(t, dtype)
                if id(t) in copied or wanted != t.dtype:
                    held.append((t, t.data))
                    t.data = t.detach().to(wanted, copy=True)
            for generator in self._generators:
                _seed(generator, seed)
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
        namespaces = [(n, dict(n)) for n in self._namespaces]
        sequences = [(s, list(s)) for s in self._sequences]
        cells = [(c, _contents(c)) for c in self._cells]
        variables = [(g, {n: g.get(n, _MISSING) for n in names}) for g, names in self._globals]
        arrays = [(a, a.copy()) for a in self._arrays]

        def restore() -> None:
            for namespace, held in namespaces:
                if not _same(namespace, held):
                    namespace.clear()
                    namespace.update(held)
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

    def _generator_states(self) -> Callable[[], None]:
        states = [(g, _state(g)) for g in self._generators]

        def restore() -> None:
            for generator, state in states:
                _set_state(generator, state)

        return restore


def _once(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return list({id(t): t for t in tensors if t is not None}.values())


def _by_batch(module: Any) -> bool:
    """Whether a layer normalises by the statistics of the batch."""
    by_batch: bool = module.training or not module.track_running_stats
    return by_batch


def _names(code: CodeType) -> set[str]:
    """Returns the names that code refers to, with those of the functions inside of it."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inner)


@lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    """Whether code is the standard library's or an installed package's, which keeps no state."""
    return "site-packages" in file or "dist-packages" in file or file.startswith(_STANDARD)


_STANDARD = (str(getattr(sys, "base_prefix", sys.prefix)) + "/lib", "<frozen")


@lru_cache(maxsize=4096)
def _keeps_state(kind: type) -> bool:
    """Whether objects of a class are the user's own, or plain namespaces."""
    if issubclass(kind, SimpleNamespace):
        return True
    if issubclass(kind, ModuleType | Optimizer | threading.Thread):
        return False
    package = kind.__module__.partition(".")[0]
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    builtin = package in sys.builtin_module_names
    return not builtin and package not in ("torch", "subspace_optim") and not _is_installed(file)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING


def _same(now: dict[Any, Any], before: dict[Any, Any]) -> bool:
    return now.keys() == before.keys() and all(map(operator.is_, now.values(), before.values()))


def _put_back(held: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, data in held:
        tensor.data = data


def dtype_inside(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Returns the dtype of a tensor inside of an evaluation: low precision becomes float32."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if dtype is not None:
        return dtype
    return torch.float32 if tensor.dtype in LOW_PRECISION else tensor.dtype


# --- generators ----------------------------------------------------------------------------------


def global_generators(device: torch.device) -> list[_Generator]:
    """Returns those that code draws from where it names none: torch's, NumPy's and Python's."""
    python: Any = random.seed  # a method of the one that is shared
    legacy: Any = np.random.mtrand._rand  # noqa: SLF001 (np.random.seed is a method of it)
    found: list[Any] = [torch.default_generator, legacy, python.__self__]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    return found


def _state(generator: _Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return generator.get_state()
    return generator.getstate()


def _set_state(generator: _Generator, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, torch.Generator | np.random.RandomState):
        generator.set_state(state)
    else:
        generator.setstate(state)


def _seed(generator: _Generator, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    else:
        generator.seed(seed)


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

"""What a loss can reach: modules, tensors, generators, and Python state, by a walk from its roots.

A forward pass may read and write more than parameters and buffers: running statistics, a hidden
state, a counter, a queue, a generator of its own, the critic in a closure.
"""

from __future__ import annotations

import dis
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from itertools import islice
from operator import itemgetter
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from subspace_optim.curvature.contexts import Generator, global_generators

_MOST = 50_000
"""The most objects that a walk visits. State beyond them is not put back; if the loss reads any of
it, the proof finds that the loss is not one function."""
_LONG = 1_000
"""The most elements of a container that are visited: a longer one holds data."""
_LONGER = 100_000
"""The most elements of a container that are put back."""
_SMALL = 1 << 20
"""The most bytes of a plain tensor that is copied before each evaluation. Whether a larger one is
written to is learned once, by watching an evaluation."""
_LARGE = 1 << 24
"""The most bytes of a NumPy array that is put back."""
_APART = {
    "torch", "subspace_optim", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate",
    "transformers", "wandb", "mlflow", "tensorboard", "tqdm", "rich", "logging", "threading",
    "multiprocessing", "concurrent", "asyncio",
}  # fmt: skip
"""Packages whose objects are left alone: they run threads, or have no part in a loss."""
_NUMBERS = {bool, int, float, complex}
_ATOMS = {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}
_REGISTERED = ("_parameters", "_buffers", "_modules")
_FIRST = tuple(vars(nn.Module()))
"""What torch gives every module, in this order, before it has anything else."""
_HOOKS = tuple(name for name in _FIRST if name not in (*_REGISTERED, "training"))
"""The dicts of hooks and the like that every module has; they are looked at where not empty."""
_hooks = itemgetter(*_HOOKS)
MISSING = object()
"""Stands for the contents of an empty cell, and for a name that a namespace does not have."""


class Reachable:
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
        self._owners: list[dict[str, Any]] = []  # attributes of modules and objects
        self._namespaces: list[dict[Any, Any]] = []
        self._sequences: list[Any] = []
        self._cells: list[CellType] = []
        # Attributes of classes and modules: where they are read, what writes one, and their names.
        self._named: list[tuple[Mapping[str, Any], Callable[[str, Any], None], set[str]]] = []
        self._generators: list[Generator] = global_generators(device)
        self._arrays: list[np.ndarray[Any, Any]] = []
        self._loose: list[Tensor] = []  # tensors that no module has registered
        self._numbers: list[tuple[str, Any]] = []  # among the attributes, by their names
        self._classes: set[type] = {object}
        self._walk([model, loss])
        if self._loose:
            registered = {id(t) for t in self.parameters() + self.buffers()}
            self._loose = [t for t in self._loose if id(t) not in registered]

    def parameters(self) -> list[Tensor]:
        """Returns the parameters of all modules, each once."""
        return once(p for m in self.modules for p in m._parameters.values())  # noqa: SLF001

    def buffers(self) -> list[Tensor]:
        """Returns the buffers of all modules, each once."""
        return once(b for m in self.modules for b in m._buffers.values())  # noqa: SLF001

    def tensors(self) -> list[Tensor]:
        """Returns the parameters and buffers that the loss depends on.

        The running statistics of layers that normalise by the batch are left out: such layers
        write them, and do not read them.
        """
        written = {
            id(b)
            for m in self.modules
            if m._buffers  # noqa: SLF001
            and isinstance(m, _BatchNorm | _InstanceNorm)
            and (m.training or not m.track_running_stats)  # so it normalises by the batch
            for b in m._buffers.values()  # noqa: SLF001
        }
        return [t for t in self.parameters() + self.buffers() if id(t) not in written]

    def modes(self) -> tuple[bool, ...]:
        """Returns whether each module is in train mode."""
        return tuple(module.training for module in self.modules)

    def numbers(self, moved_names: set[Any]) -> int:
        """Returns a hash of the numbers that were found, in attributes of modules and objects.

        Args:
            moved_names: attributes to leave out: counters and the like, which evaluations change.
        """
        found = [value for name, value in self._numbers if name not in moved_names]
        found += [c for c in map(contents_of, self._cells) if type(c) in _NUMBERS]
        return hash(tuple(found))

    def plain_tensors(self) -> list[Tensor]:
        """Returns the small tensors that are neither parameters nor buffers."""
        return [t for t in self._loose if t.layout == torch.strided and t.nbytes <= _SMALL]

    # --- the walk -------------------------------------------------------------------------------

    def _walk(self, roots: list[Any]) -> None:
        seen: dict[int, Any] = {}  # alive: new objects could get their addresses
        pending = roots[::-1]
        while pending and len(seen) < _MOST:
            thing = pending.pop()
            if type(thing) in _ATOMS or id(thing) in seen or isinstance(thing, type):
                continue
            if isinstance(thing, nn.Module):
                pending += list(self._enter_modules(thing, seen))[::-1]
            else:
                seen[id(thing)] = thing
                pending += list(self._enter(thing))[::-1]

    def _enter_modules(self, root: nn.Module, seen: dict[int, Any]) -> Iterator[Any]:
        """Notes a module and those inside of it, and yields what else they refer to.

        All at once: a model may have thousands, and an optimizer asks at each step.
        """
        found, below = list[nn.Module](), [root]
        while below:
            module = below.pop()
            if id(module) not in seen:
                seen[id(module)] = module
                found.append(module)
                inside = module._modules  # noqa: SLF001
                if inside and isinstance(inside, dict):  # that of a ScriptModule is none
                    below += [m for m in reversed(inside.values()) if isinstance(m, nn.Module)]
        self.modules += found
        owners = [vars(module) for module in found]
        self._owners += owners
        registered = [
            d
            for m in found
            for d in (m._parameters, m._buffers, m._modules)  # noqa: SLF001
            if isinstance(d, dict)
        ]
        self._namespaces += [d for d in registered if len(d) <= _LONGER]
        entries = [entry for d in registered if d for entry in d.values() if entry is not None]
        for entry in entries:
            if isinstance(entry, Tensor):
                if entry._backward_hooks:  # noqa: SLF001
                    yield from entry._backward_hooks.values()  # noqa: SLF001
            elif not isinstance(entry, nn.Module):
                yield entry
        others = [each for owner in owners for each in _others(owner)]
        self._note_numbers(others)
        yield from (value for _, value in others if type(value) not in _ATOMS)
        for kind in dict.fromkeys(map(type, found)):
            yield from self._enter_class(kind)

    def _note_numbers(self, attributes: Iterable[tuple[str, Any]]) -> None:
        self._numbers += [each for each in attributes if type(each[1]) in _NUMBERS]

    def _enter(self, thing: Any) -> Iterator[Any]:
        """Notes one object, and yields those that it refers to."""
        if isinstance(thing, Tensor):
            self._loose.append(thing)
            yield from (thing._backward_hooks or {}).values()  # noqa: SLF001
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
            self._note_numbers(thing.__dict__.items())
            if not _is_installed(_file_of(thing.__class__)):
                yield from thing.__dict__.values()
                yield from self._enter_class(type(thing))

    def _enter_class(self, kind: type) -> Iterator[Any]:
        """Notes the attributes of the user's own classes, and yields them and their methods."""
        for base in kind.__mro__:
            if base in self._classes:
                continue
            self._classes.add(base)
            if not _is_installed(_file_of(base)):
                held = {n: v for n, v in vars(base).items() if not n.startswith("__")}
                names = {n for n, v in held.items() if not callable(v)}
                self._named.append((vars(base), partial(setattr, base), names))
                yield from held.values()
                yield vars(base).get("__call__")

    def _enter_function(self, function: FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            self._cells.append(cell)
            yield contents_of(cell)
        yield function.__defaults__
        yield function.__kwdefaults__
        yield getattr(function, "__wrapped__", None)
        if _is_installed(function.__code__.co_filename):
            return
        self._namespaces.append(function.__dict__)
        names, attributes = _names(function.__code__)
        space = function.__globals__
        self._named.append((space, space.__setitem__, names & space.keys()))
        for name in names & space.keys():
            value = space[name]
            if isinstance(value, ModuleType):
                if not _is_installed(getattr(value, "__file__", None) or "<frozen"):
                    held = vars(value)
                    found = attributes & held.keys()
                    self._named.append((held, held.__setitem__, found))
                    yield from (held[attribute] for attribute in found)
            else:
                yield value


def _others(attributes: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    """Returns the attributes of a module but for its mode, its registers and empty hooks."""
    first = len(_FIRST)
    if tuple(islice(attributes, first)) == _FIRST and not any(_hooks(attributes)):
        return islice(attributes.items(), first, None)
    return [
        (name, value)
        for name, value in attributes.items()
        if name not in _FIRST or (name in _HOOKS and value)
    ]


def once(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    """Returns tensors without repetition."""
    return list({id(t): t for t in tensors if t is not None}.values())


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
    """Whether a file is the standard library's or an installed package's: not walked into."""
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


def contents_of(cell: CellType) -> Any:
    """Returns what a cell of a closure holds, or ``MISSING``."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING

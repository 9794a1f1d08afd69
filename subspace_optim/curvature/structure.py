"""Batches of any form: the tensors inside, and the same batch on another device.

A batch is made of tensors, sequences, mappings, and objects that hold such things in their fields:
dataclasses, graphs, packed sequences, what a tokenizer returns.
"""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from subspace_optim._validation import ArgumentError

_UNDECIDED = object()
_PLAIN = (str, bytes, int, float, complex)
# Objects with fields that are leaves all the same, or hold no data.
_NO_FIELDS = (Tensor, np.ndarray, nn.Module, type, *_PLAIN)


def tensors(batch: Any) -> Iterator[Tensor]:
    """Yields the tensors of a batch, in order, those in the fields of its objects too."""
    return (leaf for leaf in _leaves(batch) if isinstance(leaf, Tensor))


def contents(batch: Any) -> list[Tensor]:
    """Returns the tensors of a batch, and a checksum of what else it holds.

    The checksum, of arrays, numbers and texts, is a tensor and comes first, if there are any.
    """
    checksum, found = 0, []
    for leaf in _leaves(batch):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, np.ndarray):
            checksum = zlib.crc32(leaf.tobytes(), checksum)
        elif isinstance(leaf, _PLAIN):
            checksum = zlib.crc32(repr(leaf).encode(), checksum)
    return [torch.tensor(checksum, device="cpu"), *found] if checksum else found


def moved(batch: Any, device: torch.device, cast: Callable[[torch.dtype], torch.dtype]) -> Any:
    """Returns a batch on ``device``, its tensors of the dtypes that ``cast`` says.

    An object with a method ``to`` is moved by that method, which knows what has to stay: a packed
    sequence keeps its batch sizes on the CPU. What changes is copied first, since the batch belongs
    to the user; a batch that need not change is returned as it is.
    """

    def elsewhere(tensor: Tensor) -> Tensor:
        return tensor.to(device, cast(tensor.dtype))

    def as_cast(tensor: Tensor) -> Tensor:
        return tensor.to(cast(tensor.dtype))

    def moved_by_itself(item: Any) -> Any:
        own = _own(item)
        result = own.to(device)
        return _replaced(own if result is None else result, as_cast)

    return _replaced(batch, elsewhere, moved_by_itself)


def detached(batch: Any) -> Any:
    """Returns a batch without the graphs that its tensors come from; no memory is copied."""

    def alone(tensor: Tensor) -> Tensor:
        return tensor if tensor.grad_fn is None else tensor.detach()

    return _replaced(batch, alone)


def moves_itself(item: Any) -> bool:
    """Whether an object is no tensor and has a method ``to``."""
    return not isinstance(item, Tensor | type) and callable(getattr(item, "to", None))


def _children(node: Any) -> Iterable[Any] | None:
    """The parts of a node of a batch; ``None`` for a leaf."""
    if node is None or isinstance(node, _NO_FIELDS):
        return None
    if isinstance(node, Mapping):
        return node.values()
    if isinstance(node, list | tuple | set | frozenset | deque):
        return node
    slots = [name for kind in type(node).__mro__ for name in _slots(kind)]
    fields = [getattr(node, name) for name in slots if hasattr(node, name)]
    fields.extend(getattr(node, "__dict__", {}).values())
    return fields or None


def _slots(kind: type) -> Iterable[str]:
    names = vars(kind).get("__slots__", ())
    names = (names,) if isinstance(names, str) else names
    return (name for name in names if name not in ("__dict__", "__weakref__"))


def _leaves(batch: Any) -> Iterator[Any]:
    """Yields the leaves of a batch; a container that occurs twice is walked through once."""
    seen: dict[int, Any] = {}  # alive, so that no other part gets the same id

    def walk(node: Any) -> Iterator[Any]:
        children = _children(node)
        if children is None:
            yield node
        elif id(node) not in seen:  # parts may refer to the whole, as nodes do to their graph
            seen[id(node)] = node
            for child in children:
                yield from walk(child)

    return walk(batch)


def _own(item: Any) -> Any:
    """Returns a copy of an object that shares its tensors, for a method that writes into it."""
    leaves = list(_leaves(item))
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        return item  # what it holds is not visible, and a copy may be expensive
    try:
        return copy.deepcopy(item, {id(leaf): leaf for leaf in leaves})
    except Exception:  # noqa: BLE001 (parts that cannot be copied raise anything)
        return copy.copy(item)


def _replaced(
    batch: Any,
    replace: Callable[[Tensor], Tensor],
    replace_object: Callable[[Any], Any] | None = None,
) -> Any:
    """Returns a batch with ``replace(tensor)`` for each tensor: a copy, if one of them differs.

    Args:
        batch: is not changed.
        replace: what stands for a tensor.
        replace_object: what stands for an object with a method ``to`` (default: its copy, in
            which its tensors are replaced).

    Raises:
        ArgumentError: a part that holds tensors cannot be copied.
    """
    # `deepcopy` takes what it finds here: the new tensors, and parts that stay as they are.
    memo: dict[int, Any] = {}
    visited: list[Any] = []  # alive, so that no other part gets the same id
    anything = False

    def differs(node: Any) -> bool:
        nonlocal anything
        if id(node) not in memo:
            visited.append(node)
            memo[id(node)] = _UNDECIDED
            if isinstance(node, Tensor):
                memo[id(node)] = replace(node)
            elif replace_object is not None and moves_itself(node):
                memo[id(node)] = replace_object(node)
            else:
                parts = [differs(child) for child in _children(node) or ()]
                if any(parts):
                    del memo[id(node)]
                    return True
                memo[id(node)] = node
            anything |= memo[id(node)] is not node
        return memo[id(node)] is not node  # undecided, of a whole that a part refers to, counts

    differs(batch)
    if not anything:
        return batch
    try:
        return copy.deepcopy(batch, memo)
    except Exception as error:
        raise ArgumentError(
            "a batch of data",
            type(batch).__name__,
            "made of parts that can be copied, or that have a method `to(device)`",
            f"Copying it, to move its tensors, failed ({type(error).__name__}: {error}).",
        ) from error

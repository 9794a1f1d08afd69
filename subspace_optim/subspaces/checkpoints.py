"""Saved states: every entry is looked at before one is used, so that all are taken or none.

Each entry has the same type and shape in every state of one object, whatever is known of it: zeros
stand for a tensor that is not there, and a flag says so. ``torch.distributed.checkpoint``, which
reads into the state of the object that is to be loaded, needs that.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, check_flag, check_integer, check_number
from subspace_optim.curvature.by_name import by_name, from_names
from subspace_optim.curvature.digests import digest
from subspace_optim.curvature.dtensors import digest_of_sharded, is_sharded
from subspace_optim.curvature.parameters import ParameterSpace

VERSION = 1
"""Of the states that are written, and the only one that is read."""
_PIECE = 1 << 20
_ENDS = 2**63


class SavedState:
    """The entries of a state dict, each checked as it is taken. The first that is wrong is named.

    Args:
        state: what is to be loaded.
        names: the entries that it must have; others are not looked at.
        remedy: the way out where one is missing, for the message.
        path: of a state inside of another, with a dot at the end.

    Raises:
        ArgumentError: it is no mapping, of another version, or an entry is missing.
    """

    def __init__(self, state: Any, names: Collection[str], remedy: str, path: str = "") -> None:
        self._path, self._remedy = path, remedy
        label = f"the loaded {path[:-1] or 'state'}"
        if not isinstance(state, Mapping):
            raise ArgumentError(label, type(state).__name__, "a dict", remedy)
        version = state.get("version", VERSION)
        if not path and (type(version) is not int or version != VERSION):
            remedy = "Another version of subspace_optim has saved it: load it with that one."
            raise ArgumentError("the version of the loaded state", version, f"{VERSION}", remedy)
        missing = names - state.keys()
        if missing:
            found = f"without {', '.join(sorted(missing))}"
            raise ArgumentError(label, found, "that of a subspace", remedy)
        self._state = {name: state[name] for name in names}

    def inside(self, name: str, names: Collection[str]) -> SavedState:
        """Returns a state that is an entry of this one."""
        return SavedState(self._state[name], names, self._remedy, f"{self._path}{name}.")

    def text(self, name: str) -> str:
        """Returns an entry that is a string.

        Raises:
            ArgumentError: it is none.
        """
        value = self._state[name]
        if not isinstance(value, str):
            raise ArgumentError(self.label(name), value, "a string")
        return value

    def flag(self, name: str) -> bool:
        """Returns an entry that is True or False."""
        check_flag(self.label(name), self._state[name])
        return bool(self._state[name])

    def count(self, name: str, *, maximum: int | None = None, remedy: str = "") -> int:
        """Returns an entry that is an integer of at least 0."""
        value = self._state[name]
        return check_integer(self.label(name), value, minimum=0, maximum=maximum, remedy=remedy)

    def digest(self, name: str) -> int | None:
        """Returns an entry that is a 64-bit integer, or ``None``."""
        value = self._state[name]
        return None if value is None else _digest(self.label(name), value)

    def digests(self, name: str, length: int) -> list[int]:
        """Returns an entry that is a list of so many 64-bit integers."""
        items = _items(self.label(name), self._state[name], length)
        return [_digest(label, item) for label, item in items]

    def number(self, name: str, **limits: Any) -> float:
        """Returns an entry that is a number; ``limits`` are those of ``check_number``."""
        return _number(self.label(name), self._state[name], limits)

    def optional(self, name: str, **limits: Any) -> float | None:
        """Returns an entry that is a number, or ``None``."""
        return None if self._state[name] is None else self.number(name, **limits)

    def numbers(self, name: str, length: int | None = None, **limits: Any) -> list[float]:
        """Returns an entry that is a list of numbers, of a given length."""
        items = _items(self.label(name), self._state[name], length)
        return [_number(label, item, limits) for label, item in items]

    def lists(self, name: str, length: int, **limits: Any) -> list[list[float]]:
        """Returns an entry that is a list of lists of so many numbers."""
        rows = _items(self.label(name), self._state[name], None)
        return [
            [_number(label, item, limits) for label, item in _items(of_row, row, length)]
            for of_row, row in rows
        ]

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        minimum: float | None = None,
        remedy: str = "",
    ) -> Tensor:
        """Returns a copy of an entry that is a tensor, in this dtype and on this device.

        Raises:
            ArgumentError: it is none, of another kind or shape, not finite or below ``minimum``.
        """
        value, label = self._state[name], self.label(name)
        kind = "real" if dtype.is_floating_point else "integer"
        if not isinstance(value, Tensor):
            raise ArgumentError(label, type(value).__name__, f"a tensor of {kind} numbers")
        real = value.is_floating_point()
        if real != dtype.is_floating_point or value.is_complex() or value.dtype == torch.bool:
            raise ArgumentError(f"the dtype of {label}", value.dtype, f"{kind}, as {dtype} is")
        if value.layout != torch.strided or value.is_meta:
            found = "on the meta device" if value.is_meta else value.layout
            raise ArgumentError(label, found, "a dense tensor of numbers")
        if (own := tuple(value.shape)) != shape:
            raise ArgumentError(f"the shape of {label}", own, f"{shape}", remedy)
        taken = value.detach().to(device, dtype, copy=True).contiguous()
        if not bool(taken.isfinite().all()):
            raise ArgumentError(label, "not finite", "finite")
        if minimum is not None and taken.numel() and (lowest := taken.min().item()) < minimum:
            raise ArgumentError(f"the smallest of {label}", lowest, f"at least {minimum:g}")
        return taken

    def rows(
        self, name: str, lead: tuple[int, ...], space: ParameterSpace, *, remedy: str = ""
    ) -> Tensor:
        """Returns what lies here of an entry that ``saved_rows`` has made, of shape ``(*lead, P)``.

        Raises:
            ArgumentError: it is none, of another kind or shape, or not finite.
        """
        if space.layout is None:
            shape = (*lead, space.size_here)
            return self.tensor(name, shape, space.dtype, space.device, remedy=remedy)
        found = from_names(space, self._state[name], lead, self.label(name), remedy)
        if space.ranks.any(lambda: not bool(found.isfinite().all())):
            raise ArgumentError(self.label(name), "not finite", "finite")
        return found

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype that a tensor was saved in."""
        value = self._state[name]
        dtype: torch.dtype = next(
            iter(value.values() if isinstance(value, dict) else [value])
        ).dtype
        return dtype

    def check_sum(self, found: int) -> None:
        """Checks the entry ``checksum``, which shows changes that no other check can see.

        Args:
            found: the checksum of the other entries.

        Raises:
            ArgumentError: it is another.
        """
        if self.digest("checksum") != found:
            remedy = (
                "An entry was changed after the state was saved, or the file is damaged. Pass what "
                "`state_dict()` returned."
            )
            allowed = f"{found}, as its other entries have it"
            raise ArgumentError(self.label("checksum"), self._state["checksum"], allowed, remedy)

    def label(self, name: str) -> str:
        """Returns what an entry is called in messages."""
        return f"the loaded {self._path}{name}"


def saved_rows(space: ParameterSpace, rows: Tensor) -> Any:
    """Returns ``rows: (…, P)`` as they are; of a sharded model, one tensor a parameter."""
    return rows if space.layout is None else by_name(space, rows)


def checksum(entries: Mapping[str, Any]) -> int:
    """Returns a number that differs when any entry does (but by 1 in 2³²), whatever its device.

    Real tensors count as float64: those of a state that was loaded into another dtype, which is
    wider, have the same.
    """
    total = hashlib.blake2b(digest_size=8)
    for piece in _bytes_of(entries):
        total.update(piece)
    return int.from_bytes(total.digest(), "little", signed=True)


def _bytes_of(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for name in sorted(value):
            yield f"{name}:".encode()
            yield from _bytes_of(value[name])
    elif isinstance(value, list | tuple):
        yield f"{len(value)} items".encode()
        for item in value:
            yield from _bytes_of(item)
    elif is_sharded(value):
        yield f"{tuple(value.shape)} {digest_of_sharded(value)}".encode()
    elif isinstance(value, Tensor):
        pieces = value.detach().reshape(-1).split(_PIECE)
        whole = digest(p.double() if p.is_floating_point() else p for p in pieces)
        yield f"{tuple(value.shape)} {int(whole)}".encode()
    elif isinstance(value, float):
        yield struct.pack("<d", value)
    else:
        yield f"{type(value).__name__} {value!r}".encode()


def _items(label: str, value: Any, length: int | None) -> list[tuple[str, Any]]:
    """Returns the items of a list of a given length, each with its label.

    Raises:
        ArgumentError: it is no such list.
    """
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
        allowed = "a list" if length is None else f"a list of {length} items"
        raise ArgumentError(label, value, allowed)
    return [(f"{label}[{i}]", item) for i, item in enumerate(value)]


def _number(label: str, value: Any, limits: dict[str, Any]) -> float:
    return check_number(label, value, **({"minimum": None} | limits))


def _digest(label: str, value: Any) -> int:
    return check_integer(label, value, minimum=-_ENDS, maximum=_ENDS - 1)

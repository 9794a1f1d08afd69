"""``DTensor``s and the local tensors that they are made of: what the rest needs of both.

Nothing here asks another rank, but for ``placed_like``, ``whole`` and ``total_norm``.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError


def _tensors() -> Any:
    """Returns torch's module, imported when it is needed: it takes others with it."""
    return importlib.import_module("torch.distributed.tensor")


def local(tensor: Any) -> Tensor:
    """Returns the part of a tensor that lies on this rank, in its memory; a plain one itself."""
    # to_local() would be differentiable.
    found: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # noqa: SLF001
    return found


def is_sharded(tensor: object) -> bool:
    """Whether it is a ``DTensor``: nobody who has not imported their module has any."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def placed_like(tensor: Any, placements: Any) -> Tensor:
    """Returns a ``DTensor`` in other placements on its mesh; a plain tensor as it is."""
    if not is_sharded(tensor) or tensor.placements == placements:
        return tensor  # type: ignore[no-any-return]
    result: Tensor = tensor.redistribute(placements=placements)
    return result


def check_placements(label: str, p: Any) -> None:
    """Checks that a parameter that is sharded lies in a way that can be followed.

    Raises:
        ArgumentError: it is a partial sum, or offloaded to another device.
    """
    if not is_sharded(p):
        return
    if any(placement.is_partial() for placement in p.placements):
        raise ArgumentError(label, p.placements, "sharded or replicated: no partial sums")
    if p.device_mesh.device_type != p.device.type:
        found = f"on {p.device.type}, of a mesh on {p.device_mesh.device_type}"
        remedy = "Leave CPUOffloadPolicy out."
        raise ArgumentError(label, found, "on the device that computes with it", remedy)


def total_norm(tensors: Sequence[Any]) -> float:
    """Returns the norm of all tensors together, whatever of them lies on other ranks."""
    kinds: dict[Any, list[Tensor]] = {}
    for t in tensors:
        kind = (t.device_mesh, t.placements) if is_sharded(t) else None
        kinds.setdefault(kind, []).append(t)
    norms = [whole(torch.nn.utils.get_total_norm(some)) for some in kinds.values()]
    return math.hypot(*map(float, norms))


@contextmanager
def holding_memory(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Lets tensors have the memory of ``values``, local ones, inside."""
    held = [(t, local(t) if is_sharded(t) else t.data) for t in tensors]
    try:
        for t, value in zip(tensors, values, strict=True):
            _take_memory(t, value)
        yield
    finally:
        for t, value in held:
            _take_memory(t, value)


def _take_memory(tensor: Any, value: Tensor) -> None:
    if is_sharded(tensor):
        tensor._local_tensor = value  # noqa: SLF001
    else:
        tensor.data = value


# --- rows of several, in one tensor --------------------------------------------------------------


def stacked(tensor: Tensor, like: Any, lead: int) -> Tensor:
    """Returns local tensors that were stacked, as a ``DTensor`` if the one that they are of is.

    Args:
        tensor: of shape ``(…, *shape)``.
        like: of shape ``shape``, the parameter.
        lead: how many dimensions come first.
    """
    if not is_sharded(like):
        return tensor
    size = torch.Size([*tensor.shape[:lead], *like.shape])
    stride = torch.empty(size, device="meta").stride()
    found: Tensor = _tensors().DTensor.from_local(
        tensor, like.device_mesh, _moved(like, lead), run_check=False, shape=size, stride=stride
    )
    return found


def part_of(tensor: Any, like: Any, lead: int) -> Tensor:
    """Returns the local part of a tensor of several, which may be whole, or laid out otherwise.

    Args:
        tensor: of shape ``(…, *shape)``.
        like: of shape ``shape``, the parameter.
        lead: how many dimensions come first.
    """
    if not is_sharded(like):
        return whole(tensor)
    mesh = like.device_mesh
    if is_sharded(tensor) and tensor.device_mesh != mesh:
        tensor = tensor.full_tensor()
    if not is_sharded(tensor):
        tensor = _tensors().DTensor.from_local(
            tensor.to(like.device), mesh, [_tensors().Replicate()] * mesh.ndim, run_check=False
        )
    return local(tensor.redistribute(mesh, _moved(like, lead)))


def _moved(like: Any, lead: int) -> list[Any]:
    """Returns the placements of a parameter, for a tensor with more dimensions before its own."""
    moved = []
    for placement in like.placements:
        if placement.is_replicate():
            moved.append(placement)
        else:
            strided = {"split_factor": placement.split_factor} if _is_strided(placement) else {}
            moved.append(type(placement)(placement.dim + lead, **strided))
    return moved


def _is_strided(placement: Any) -> bool:
    """Whether another dimension of the mesh has divided it first: tensor parallel, then FSDP."""
    return hasattr(placement, "split_factor")


def digest_of_sharded(tensor: Any) -> int:
    """Returns a number that differs when any element does, however the tensor is sharded.

    The sum, modulo 2⁶⁴, of the mixed bits of all elements, each times its row's number where rows
    are not divided: elements that were exchanged inside of a row are not told. All ranks of its
    mesh call it.
    """
    held = local(tensor)
    bits = held.detach().double().contiguous().view(torch.int64)
    mixed = (bits ^ (bits >> 31)) * 0x2545F4914F6CDD1D
    mixed = mixed ^ (mixed >> 29)
    if all(p.is_replicate() or p.dim > 0 for p in tensor.placements) and mixed.dim() > 1:
        numbers = torch.arange(1, len(mixed) + 1, device=mixed.device)
        mixed = mixed * (2 * numbers + 1).view(-1, *[1] * (mixed.dim() - 1))
    kinds = _tensors()
    parts = [kinds.Replicate() if p.is_replicate() else kinds.Partial() for p in tensor.placements]
    total = kinds.DTensor.from_local(mixed.sum(), tensor.device_mesh, parts, run_check=False)
    return int(total.full_tensor())


# --- in a graph: torch's own from_local() and to_local() have no second derivative ----------------


class _AsDTensor(torch.autograd.Function):
    """A local tensor as the ``DTensor`` that it is a part of."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, spec: Any) -> Any:
        ctx.spec = spec
        return _tensors().DTensor(tensor.view_as(tensor), spec, requires_grad=tensor.requires_grad)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        placed = gradient.redistribute(ctx.spec.mesh, ctx.spec.placements)
        return _AsLocal.apply(placed), None  # type: ignore[no-untyped-call]


class _AsLocal(torch.autograd.Function):
    """The local tensor of a ``DTensor``."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.spec = tensor._spec  # noqa: SLF001
        held = local(tensor)
        return held.view_as(held)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _AsDTensor.apply(gradient, ctx.spec)  # type: ignore[no-untyped-call]


def as_dtensor(tensor: Tensor, like: Any) -> Any:
    """Returns a local tensor as a ``DTensor`` laid out as another, or as its specification says."""
    spec = like._spec if is_sharded(like) else like  # noqa: SLF001
    return _AsDTensor.apply(tensor, spec)  # type: ignore[no-untyped-call]


def whole(tensor: Any) -> Tensor:
    """Returns all of a ``DTensor``; a plain tensor as it is."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found

"""Vectors in checkpoints: one tensor a parameter, under its name, and sharded as the parameter is.

So ``torch.distributed.checkpoint`` saves of each rank what it holds, and loads it on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.dtensors import part_of, stacked
from subspace_optim.curvature.parameters import ParameterSpace


def by_name(space: ParameterSpace, rows: Tensor) -> dict[str, Tensor]:
    """Returns copies of ``rows: (…, P)``, of the shape ``(…, *shape)`` for each parameter.

    Args:
        space: of a model that is sharded.
        rows: what lies here of them.
    """
    lead = rows.shape[:-1]
    each = [space.unflatten(row) for row in rows.reshape(lead.numel(), space.size_here)]
    pieces = zip(*each, strict=True) if each else [()] * len(space.names)
    found = {}
    for name, p, shape, of_rows in zip(
        space.names, space.tensors, space.shapes, pieces, strict=True
    ):
        together = torch.stack(of_rows) if of_rows else rows.new_empty(0, *shape)
        found[name] = stacked(together.view(*lead, *shape), p, len(lead))
    return found


def from_names(
    space: ParameterSpace, entries: Any, lead: tuple[int, ...], label: str, remedy: str = ""
) -> Tensor:
    """Returns the rows ``(*lead, P)`` of which ``by_name`` made ``entries``.

    Args:
        space: may be sharded in another way.
        entries: one tensor a parameter, a ``DTensor`` or all of it.
        lead: the shape before the coordinates.
        label: of them, for messages.
        remedy: the way out where they are of other shapes.

    Raises:
        ArgumentError: they are not of these parameters, of other shapes, or no real numbers.
    """
    if not isinstance(entries, Mapping):
        raise ArgumentError(label, type(entries).__name__, "a dict of tensors by name")
    if set(entries) != set(space.names):
        odd = sorted(set(entries) ^ set(space.names))
        raise ArgumentError(f"the names in {label}", odd, "those of the parameters", remedy)
    tensors = []
    for name, p in zip(space.names, space.tensors, strict=True):
        value, of = entries[name], f"{label}['{name}']"
        _check(of, value, (*lead, *p.shape), remedy)
        tensors.append(part_of(value.detach(), p, len(lead)))
    count = torch.Size(lead).numel()
    rows = torch.empty(count, space.size_here, dtype=space.dtype, device=space.device)
    for i, row in enumerate(rows):
        parts = [t.reshape(count, *t.shape[len(lead) :])[i] for t in tensors]
        row.copy_(space.flatten(parts, space.dtype))
    return rows.view(*lead, space.size_here)


def _check(label: str, value: Any, shape: tuple[int, ...], remedy: str) -> None:
    if not isinstance(value, Tensor):
        raise ArgumentError(label, type(value).__name__, "a tensor of real numbers")
    if not value.is_floating_point():
        raise ArgumentError(f"the dtype of {label}", value.dtype, "real")
    if tuple(value.shape) != shape:
        raise ArgumentError(f"the shape of {label}", tuple(value.shape), f"{shape}", remedy)

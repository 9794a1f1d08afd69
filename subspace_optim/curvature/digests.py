"""``digest``: a number that tells what tensors hold, and all elements of them in few vectors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from subspace_optim.curvature.dtensors import local

PLAIN = (Tensor, nn.Parameter)
"""The classes of tensors that are torch's own."""
_PIECE = 1 << 20
_CONTIGUOUS = torch.contiguous_format
_KIND = attrgetter("__class__", "layout", "is_nested", "dtype", "device")
_SMALL = 1 << 12
"""The most elements of a tensor that is digested together with others."""
_TOGETHER = 1 << 18
"""About how many elements are copied for that at once."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


def one_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the elements of dense tensors of one dtype and device, as a new vector."""
    if len(tensors) == 1:  # of a single one it would be a view
        return torch.empty_like(tensors[0], memory_format=_CONTIGUOUS).copy_(tensors[0]).view(-1)
    joined: Tensor = torch._utils._flatten_dense_tensors(tensors)  # noqa: SLF001 (one call)
    return joined


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Returns the strided tensors that hold what ``tensor`` holds.

    They are itself, or the indices and values of a sparse one, or those inside of a nested one.
    """
    if tensor.is_nested:
        return [part for inner in tensor.unbind() for part in dense_parts(inner)]
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        unique = tensor.coalesce()
        return [unique.indices(), unique.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


@lru_cache(maxsize=8)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    bounds = -(2**62), 2**62
    odd = torch.randint(*bounds, (_PIECE,), generator=generator, device="cpu") * 2 + 1
    return odd.to(device)


def in_few_vectors(tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, int]]:
    """Yields all elements, in vectors, and the number of tensors that each vector is of.

    Small tensors of one kind come in one vector: a model may have hundreds, and each call of torch
    costs more than their elements. Vectors of large ones are views where they can be.
    """
    small: dict[Any, list[Tensor]] = defaultdict(list)
    for tensor in map(local, tensors):
        if tensor.numel() <= _SMALL:
            small[_KIND(tensor)].append(tensor)
        else:
            yield from _alone(tensor)
    for (cls, layout, nested, *_), some in small.items():
        if cls in PLAIN and layout == torch.strided and not nested:
            for pieces in _pieces(some):
                yield one_vector(pieces), len(pieces)
        else:
            yield from chain.from_iterable(map(_alone, some))


def _alone(tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
    for part in dense_parts(tensor.detach()):
        yield part.resolve_conj().resolve_neg().contiguous().view(-1), 1


def _pieces(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts a list of small tensors where their elements become many."""
    start, elements = 0, 0
    for end, size in enumerate(map(Tensor.numel, tensors), 1):
        elements += size
        if elements >= _TOGETHER:
            yield tensors[start:end]
            start, elements = end, 0
    if start < len(tensors):
        yield tensors[start:]


def _bits(elements: Tensor) -> Tensor:
    if elements.dtype == torch.bool:
        return elements.to(torch.uint8)
    if elements.is_complex():
        elements = torch.view_as_real(elements).view(-1)
    return elements.view(_INTEGERS[elements.element_size()])


@torch.no_grad()
def digest(tensors: Iterable[Tensor]) -> Tensor:
    """Returns the weighted sum, modulo 2⁶⁴, of the bits of all elements: one pass, one scalar.

    The weights are fixed, random and odd. So one element that changes always changes the sum, and
    elements that are exchanged leave it as it was by chance alone (1 in 2³²). 8 bytes are
    read as two integers: read as one, an even number of flipped signs, 2⁶³ each, would add up to 0.
    Sparse tensors count with their indices and their values.
    """
    total: Tensor | None = None
    for elements, count in in_few_vectors(tensors):
        bits = _bits(elements)
        weights = _weights(bits.device)
        total = torch.zeros((), dtype=torch.int64, device=bits.device) if total is None else total
        total = total.to(bits.device) * 3 + count
        for piece in bits.split(_PIECE):
            total = total * 5 + (piece * weights[: len(piece)]).sum()
    return torch.zeros((), dtype=torch.int64, device="cpu") if total is None else total

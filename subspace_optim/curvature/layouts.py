"""Tensors of any layout, seen as the strided tensors that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor


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

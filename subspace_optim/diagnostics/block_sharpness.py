"""The sharpness of parts of a model: of the diagonal blocks of the Hessian, one a layer, say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from subspace_optim._validation import ArgumentError, check_integer, check_number
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.diagnostics.spectrum import multiplying, solve

Blocks = str | Mapping[str, str | Iterable[str]]


def block_sharpness(
    operator: CurvatureOperator, blocks: Blocks, *, tol: float = 1e-3, seed: int = 0
) -> dict[str, float]:
    r"""Returns the largest eigenvalue of the diagonal block of the Hessian of each part.

    .. math:: \lambda_1(H_{bb}), \qquad
              H_{bb} = \frac{\partial^2 L}{\partial\theta_b\, \partial\theta_b}

    the sharpness that a training of these parameters alone would have. None is above λ_1 of all
    (Cauchy's interlacing theorem); ``block_diagonal_share`` tells how near they come.

    Each block costs a solve for one eigenvalue, whose products are those of the whole operator:
    zeros outside of the block, and what is inside taken. Memory: the vectors of a solve, of the
    length of the block, and two of P for each product. A pattern without parameters raises
    ``ArgumentError``, and so does a ``tol`` or ``seed`` out of range.

    Args:
        operator: the Hessian.
        blocks: a pattern of names such as ``"transformer.h.*"``: the parameters whose names begin
            alike with what fits are a block, here ``transformer.h.0``, ``transformer.h.1``, … (a
            ``*`` stands for one part of the name, between dots). Or a mapping of names of one's
            own to patterns, or to several, as ``params`` of the operator takes them
            (``{"attention": "*.attn.*"}``), or to beginnings of names; these may overlap.
        tol: ``‖H_bb u − λu‖ ≤ tol · |λ|``.
        seed: of the random vectors.

    Returns:
        One number for each block, in the order of the parameters, or of the mapping.
    """
    check_number("tol", tol)
    check_integer("seed", seed, minimum=0)
    found = blocks_of(operator.parameters, blocks)
    with multiplying(operator):
        return {name: _largest(operator, parts, tol, seed) for name, parts in found.items()}


def block_diagonal_share(sharpness_of_blocks: Mapping[str, float], sharpness: float) -> float:
    r"""Returns how much of the sharpness the block-diagonal of the Hessian has.

    .. math:: \frac{\max_b \lambda_1(H_{bb})}{\lambda_1(H)}
              = \frac{\lambda_1(\mathrm{diag}(H_{11}, \dots, H_{BB}))}{\lambda_1(H)}

    1 where the sharpest direction lies in a block, so that what is between blocks does not matter
    to it. For a positive semidefinite H, where the B blocks are all of the parameters, it is 1/B at
    least, since λ_1 is at most the sum of those of the blocks: then the blocks are sharp together
    only. (A share of ``‖H‖²`` would be that of all of the spectrum, of which the bulk is most, and
    takes hundreds of products to be estimated. This one costs nothing beside what is there.)

    Args:
        sharpness_of_blocks: of ``block_sharpness``.
        sharpness: λ_1 of the same operator.

    Returns:
        The share, at most 1 but for the tolerance of the solves; NaN where λ_1 is not above 0.

    Raises:
        ArgumentError: there is no block.
    """
    if not sharpness_of_blocks:
        raise ArgumentError("sharpness_of_blocks", {}, "of at least one block")
    largest = max(sharpness_of_blocks.values())
    return largest / sharpness if sharpness > 0 else math.nan


def blocks_of(space: ParameterSpace, blocks: Blocks) -> dict[str, list[slice]]:
    """Returns the coordinates of each block.

    Raises:
        ArgumentError: a block has no parameters.
    """
    found: dict[str, list[slice]] = {}
    start = 0
    if not isinstance(blocks, str):
        found = {name: [] for name in blocks}
    for name, shape in zip(space.names, space.shapes, strict=True):
        part = slice(start, start + shape.numel())
        start = part.stop
        for block in _blocks_of(name, blocks):
            found.setdefault(block, []).append(part)
    empty = next((name for name, parts in found.items() if not parts), None)
    if not found or empty is not None:
        label = "blocks" if empty is None else f"blocks[{empty!r}]"
        pattern = blocks if isinstance(blocks, str) or empty is None else blocks[empty]
        some = ", ".join(map(repr, space.names[:3]))
        remedy = f"The parameters have names such as {some}."
        raise ArgumentError(label, pattern, "a pattern of at least one parameter", remedy)
    return found


def _blocks_of(name: str, blocks: Blocks) -> list[str]:
    """Returns the names of the blocks that a parameter is in."""
    if not isinstance(blocks, str):
        return [
            block
            for block, patterns in blocks.items()
            for each in [[patterns] if isinstance(patterns, str) else patterns]
            if any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in each)
        ]
    wanted = blocks.split(".")
    beginning = name.split(".")[: len(wanted)]
    fits = len(beginning) == len(wanted) and all(map(fnmatchcase, beginning, wanted))
    return [".".join(beginning)] if fits else []


def _largest(operator: CurvatureOperator, parts: list[slice], tol: float, seed: int) -> float:
    """Returns the largest eigenvalue of a block."""

    def product(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), operator.size)
        start = 0
        for part in parts:
            width = part.stop - part.start
            whole[:, part] = rows[:, start : start + width]
            start += width
        products = operator.matmat(whole)
        return torch.cat([products[:, part] for part in parts], dim=1)

    size = sum(part.stop - part.start for part in parts)
    return float(solve(operator, product, 1, tol=tol, seed=seed, size=size).eigenvalues[0])

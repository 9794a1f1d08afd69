"""The sharpness of parts of a model: of the diagonal blocks of the Hessian, one a layer, say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from subspace_optim._inner_product import InnerProduct
from subspace_optim._progress import Progress, ProgressOption
from subspace_optim._validation import ArgumentError, check_integer, check_number
from subspace_optim.curvature.names import Params, chosen, near_misses
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.diagnostics.spectrum import multiplying, solve

Blocks = str | Mapping[str, Params]


def block_sharpness(
    operator: CurvatureOperator,
    blocks: Blocks,
    *,
    tol: float = 1e-3,
    seed: int = 0,
    progress: ProgressOption = False,
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
            own to what ``params`` of the operator takes: a pattern (``{"attention": "*.attn.*"}``),
            several, a predicate, or tensors; these may overlap.
        tol: ``‖H_bb u − λu‖ ≤ tol · |λ|``.
        seed: of the random vectors.
        progress: shows how far it is: True for a bar, or a function of each ``ProgressReport``.

    Returns:
        One number for each block, in the order of the parameters, or of the mapping.
    """
    check_number("tol", tol)
    check_integer("seed", seed, minimum=0)
    found = blocks_of(operator.parameters, blocks)
    sharpness = {}
    with (
        multiplying(operator, progress),
        Progress("sharpness of blocks", "blocks", len(found)) as solving,
    ):
        for number, (name, parts) in enumerate(found.items(), 1):
            sharpness[name] = _largest(operator, parts, tol, seed)
            solving.tick(number)
    return sharpness


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
    """Returns the coordinates of each block, as far as they lie here.

    Raises:
        ArgumentError: a block has no parameters, or some that are not of the space.
    """
    here = space.views(torch.empty(space.size_here, device="meta"))
    ends = list(accumulate(of_one.numel() for of_one in here))
    parts = [slice(*bounds) for bounds in pairwise([0, *ends])]
    found: dict[str, list[slice]] = {}
    if isinstance(blocks, str):
        for name, part in zip(space.names, parts, strict=True):
            if (beginning := _beginning(name, blocks)) is not None:
                found.setdefault(beginning, []).append(part)
        if not found:
            allowed = "a pattern of at least one parameter's name"
            raise ArgumentError("blocks", blocks, allowed, near_misses(blocks, space.names))
        return found
    named = list(zip(space.names, space.tensors, strict=True))
    own = {id(p) for _, p in named}
    if not blocks:
        raise ArgumentError("blocks", blocks, "a pattern, or a mapping of names to patterns")
    for block, params in blocks.items():
        label = f"blocks[{block!r}]"
        those, remedy = chosen(params, named, label)
        wanted = {id(p) for p in those}
        if not wanted or not wanted <= own:
            count = f"of {len(wanted)} parameters, of which the operator has {len(wanted & own)}"
            raise ArgumentError(label, count, "of at least one, all of them the operator's", remedy)
        pairs = zip(named, parts, strict=True)
        found[block] = [part for (_, p), part in pairs if id(p) in wanted]
    return found


def _beginning(name: str, pattern: str) -> str | None:
    """Returns as many parts of a name as the pattern has, if they fit it."""
    wanted = pattern.split(".")
    beginning = name.split(".")[: len(wanted)]
    fit = len(beginning) == len(wanted) and all(map(fnmatchcase, beginning, wanted))
    return ".".join(beginning) if fit else None


class _Block(InnerProduct):
    """That of vectors whose coordinates are some of another's.

    Args:
        inner: the other's.
        here: the coordinates that lie here.
        device: of the vectors.
    """

    def __init__(self, inner: InnerProduct, here: int, device: torch.device) -> None:
        self._inner, self._here = inner, here
        everywhere = torch.tensor(here, dtype=torch.float64, device=device)
        self.whole = int(inner.sum(everywhere))

    def sum(self, partial: Tensor) -> Tensor:
        return self._inner.sum(partial)

    def size(self, here: int) -> int:  # noqa: ARG002 (there are no other vectors)
        return self.whole

    def here(self, size: int) -> int:  # noqa: ARG002 (as above)
        return self._here

    def seed(self, seed: int) -> int:
        return self._inner.seed(seed)


def _largest(operator: CurvatureOperator, parts: list[slice], tol: float, seed: int) -> float:
    """Returns the largest eigenvalue of a block."""

    def product(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), operator.parameters.size_here)
        start = 0
        for part in parts:
            width = part.stop - part.start
            whole[:, part] = rows[:, start : start + width]
            start += width
        products = operator.matmat(whole)
        return torch.cat([products[:, part] for part in parts], dim=1)

    here = sum(part.stop - part.start for part in parts)
    inner = _Block(operator.inner, here, operator.device)
    options: Any = {"tol": tol, "seed": seed, "size": inner.whole, "inner": inner}
    return float(solve(operator, product, 1, **options).eigenvalues[0])

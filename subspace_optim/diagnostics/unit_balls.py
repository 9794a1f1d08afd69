"""The unit ball of the norm in which an optimizer descends: what in it is best, or nearest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspace_optim._inner_product import InnerProduct
from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.dtensors import part_of, stacked, whole
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.step_hooks import optimizers_of

NormName = Literal["euclidean", "sign", "spectral"]
Norm = NormName | Mapping[str, NormName]

_NAMES = get_args(NormName)
_OF_CLASS: dict[str, NormName] = {
    "SGD": "euclidean",
    "SignSGD": "sign",
    "Signum": "sign",
    "Lion": "sign",
    "Adam": "sign",  # AdamW is one
    "Muon": "spectral",
}
_SGD_OPTIONS = ("momentum", "nesterov", "dampening", "weight_decay")


@dataclass(frozen=True)
class UnitBall:
    """The directions of length at most 1, in a norm that is the largest of those of its parts.

    A direction is ``d = R e``, R the radius of each parameter; all methods are about ``e``, whose
    balls have radius 1.

    Attributes:
        space: the coordinates.
        norms: of each parameter. Those that are Euclidean are so all together, each matrix has a
            spectral norm of its own, and for signs every coordinate is a part.
        radii: of each parameter, 0 for those that do not move.

    Raises:
        ArgumentError: matrices that have a spectral norm cannot be made whole.
    """

    space: ParameterSpace
    norms: list[NormName]
    radii: list[float]

    def __post_init__(self) -> None:
        space = self.space
        split = space.layout is None and type(space.inner) is not InnerProduct
        if "spectral" in self.norms and split:
            found = "'spectral', of vectors that are split"
            remedy = "Take another norm, or a model that torch has sharded."
            raise ArgumentError("norm", found, "that of matrices that are whole on a rank", remedy)

    def radius(self) -> Tensor:
        """Returns R as a vector, ``(P,)``."""
        pieces = [
            torch.full_like(p, radius, dtype=self.space.dtype)
            for p, radius in zip(self.space.tensors, self.radii, strict=True)
        ]
        return self.space.flatten(pieces)

    def best(self, rows: Tensor) -> Tensor:
        """Returns ``argmax ⟨row, e⟩`` over the ball for each row, ``(j, P)``."""
        found = torch.where(rows < 0, -1.0, 1.0).to(rows)
        self._put_matrices(rows, found, _polar_factors)
        lengths = self._lengths(rows)
        for own, out in self._euclidean(rows, found):
            out.copy_(own / torch.where(lengths > 0, lengths, 1.0)[:, None])
        return found

    def nearest(self, rows: Tensor) -> Tensor:
        """Returns the point of the ball that is nearest to each row, ``(j, P)``."""
        found = rows.clamp(-1.0, 1.0)
        self._put_matrices(rows, found, _shortened)
        lengths = self._lengths(rows)
        for own, out in self._euclidean(rows, found):
            out.copy_(own / lengths.clamp(min=1.0)[:, None])
        return found

    def _lengths(self, rows: Tensor) -> Tensor:
        """Returns the length of the Euclidean part of each row, ``(j,)``."""
        squares = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for own, _ in self._euclidean(rows, rows):
            squares += own.square().sum(dim=1, dtype=torch.float64)
        return self.space.inner.sum(squares).sqrt().to(rows)

    def _euclidean(self, rows: Tensor, out: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        return ((rows[:, part], out[:, part]) for part, _ in self._parts("euclidean"))

    def _put_matrices(self, rows: Tensor, out: Tensor, of: Callable[[Tensor], Tensor]) -> None:
        """Writes what ``of`` returns for each matrix to its place, in all rows.

        Of a sharded model each matrix is gathered for it, one at a time, and all ranks do the same.

        Args:
            rows: ``(j, P)``.
            out: the same.
            of: of matrices, ``(j, m, n)``; of a kernel's dimensions n is all but the first.
        """
        if self.space.layout is None:
            for part, shape in self._parts("spectral"):
                matrices = rows[:, part].reshape(len(rows), shape[0] if shape else 1, -1)
                out[:, part] = of(matrices).reshape(len(rows), -1)
        elif "spectral" in self.norms:
            for row, result in zip(rows, out, strict=True):
                self._put_gathered(row, result, of)

    def _put_gathered(self, row: Tensor, out: Tensor, of: Callable[[Tensor], Tensor]) -> None:
        """Does so for the matrices of one row of which other ranks have parts."""
        space = self.space
        each = zip(space.tensors, space.unflatten(row), space.views(out), strict=True)
        for i, (p, here, view) in enumerate(each):
            if self.norms[i] == "spectral":
                matrix = whole(stacked(here, p, 0)).reshape(1, p.shape[0] if p.shape else 1, -1)
                view.copy_(space.piece(i, part_of(of(matrix).view(p.shape), p, 0)))

    def _parts(self, norm: NormName) -> Iterable[tuple[slice, torch.Size]]:
        """Yields the coordinates of each parameter of this norm."""
        start = 0
        views = self.space.views(torch.empty(self.space.size_here, device="meta"))
        for name, of_one in zip(self.norms, views, strict=True):
            end = start + of_one.numel()
            if name == norm:
                yield slice(start, end), of_one.shape
            start = end


def _polar_factors(matrices: Tensor) -> Tensor:
    """Returns the nearest orthogonal matrices: those with all singular values at 1."""
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    found: Tensor = U @ V
    return found


def _shortened(matrices: Tensor) -> Tensor:
    """Returns the matrices with singular values of at most 1."""
    U, S, V = torch.linalg.svd(matrices, full_matrices=False)
    found: Tensor = (U * S.clamp(max=1.0)[..., None, :]) @ V
    return found


def ball_of_norm(norm: Norm, space: ParameterSpace) -> UnitBall:
    """Returns the unit ball of a norm.

    Raises:
        ArgumentError: there is no such norm, or a parameter has none.
    """
    allowed = f"one of {', '.join(map(repr, _NAMES))}, or a mapping of name patterns to these"
    by_pattern: Mapping[str, Any] = norm if isinstance(norm, Mapping) else {"*": norm}
    for named in by_pattern.values():
        if named not in _NAMES:
            raise ArgumentError("norm", named, allowed)
    norms: list[NormName] = []
    for name in space.names:
        found = next((by_pattern[p] for p in by_pattern if fnmatchcase(name, p)), None)
        if found is None:
            remedy = "The first pattern that fits counts; '*' at the end fits the others."
            raise ArgumentError("norm", f"without a pattern for '{name}'", allowed, remedy)
        norms.append(found)
    return UnitBall(space, norms, [1.0] * len(norms))


def ball_of_optimizer(
    optimizer: Optimizer | Iterable[Optimizer], space: ParameterSpace
) -> UnitBall:
    """Returns the unit ball of the norm in which optimizers descend.

    Where they have several rates, that of a parameter at the rate η is ``η / max η`` as large, and
    those of Muon's matrices are as large as it makes its updates.

    Raises:
        ArgumentError: an optimizer has no such norm, or no rate is above 0.
    """
    norms: dict[int, NormName] = {}
    rates: dict[int, float] = {}
    largest = 0.0
    for each in optimizers_of(optimizer, space):
        for group in each.optimizer.param_groups:
            norm = _norm_of(each.optimizer, group)
            rate = float(group["lr"])
            largest = max(largest, rate)
            for p in group["params"]:
                norms[id(p)] = norm
                rates[id(p)] = rate * (_muon_scale(group, p) if norm == "spectral" else 1.0)
    if largest == 0:
        raise ArgumentError("lr", 0.0, "above 0 in a group", "Give a norm instead.")
    own = space.tensors
    radii = [rates.get(id(p), 0.0) / largest for p in own]
    return UnitBall(space, [norms.get(id(p), "euclidean") for p in own], radii)


def _norm_of(optimizer: Optimizer, group: dict[str, Any]) -> NormName:
    """Returns the norm of a group.

    Raises:
        ArgumentError: it is not known.
    """
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _OF_CLASS:
            return _OF_CLASS[kind.__name__]
    if all(name in group for name in _SGD_OPTIONS):
        return "euclidean"
    allowed = f"{', '.join(_OF_CLASS)}, or with the options of SGD"
    remedy = "Give the norm in which it descends: norm='euclidean', 'sign' or 'spectral'."
    raise ArgumentError("optimizer", type(optimizer).__name__, allowed, remedy)


def _muon_scale(group: dict[str, Any], p: Tensor) -> float:
    """Returns the spectral norm of Muon's update of a matrix, relative to its rate."""
    rows, columns = p.shape[0], p.shape[1:].numel()
    adjustment = group.get("adjust_lr_fn")
    if adjustment == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if adjustment in (None, "original"):
        return math.sqrt(max(1.0, rows / columns))
    return 1.0

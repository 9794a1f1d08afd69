"""``Measure``: what a row of a monitor can tell, and ``Training``: whom it is told of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError
from subspace_optim.curvature.operator import CurvatureOperator
from subspace_optim.curvature.parameters import ParameterSpace
from subspace_optim.diagnostics.measures.gradients import Gradients
from subspace_optim.step_hooks import Followed
from subspace_optim.subspaces import Subspace

if TYPE_CHECKING:
    from subspace_optim.diagnostics.measures.step import Step

Row = Mapping[str, Any]
"""Columns and what is in them: numbers, scalar tensors, or lists of numbers."""


@dataclass
class Training:
    """What a monitor watches.

    Attributes:
        parameters: the coordinates of updates, gradients and bases.
        followed: the optimizers that step in turn, with those inside of them.
        subspace: in which updates are seen; ``None`` where the source is an operator.
        operator: of the loss; ``None`` for a subspace that has none.
        start: ``θ`` at the attachment, ``(P,)``.
        in_basis: whether a measure sees gradients in the subspace's basis. It is refreshed first
            then, since the graph that a refresh builds has the gradient too.
    """

    parameters: ParameterSpace
    followed: Sequence[Followed]
    subspace: Subspace | None
    operator: CurvatureOperator | None
    start: Tensor
    in_basis: bool = False
    _gradients: dict[Any, Gradients] = field(default_factory=dict)

    @property
    def optimizers(self) -> list[Optimizer]:
        """The optimizers that step in turn, each the outermost of its own."""
        return [each.optimizer for each in self.followed]

    def moving_groups(self) -> list[dict[str, Any]]:
        """Returns the parameter groups that move any of the parameters at present."""
        known = set(map(id, self.parameters.tensors))
        groups = [group for each in self.optimizers for group in each.param_groups]
        return [
            group
            for group in groups
            if any(id(p) in known and p.requires_grad for p in group["params"])
            and (group.get("lr") is None or float(group["lr"]) != 0)
        ]

    @property
    def k(self) -> int:
        """The number of the subspace's eigenpairs; 0 where it has none."""
        return 0 if self.operator is None else getattr(self.subspace, "k", 0)

    def solver_options(self) -> dict[str, Any]:
        """Returns the options of solves beside the subspace: its own, where it has them."""
        names = ("tol", "seed")
        return {n: getattr(self.subspace, n) for n in names if hasattr(self.subspace, n)}

    def gradients(self, sample: int | Literal["auto"] | None) -> Gradients:
        """Returns what measures loss and gradient on so many examples, the same for all who ask."""
        if sample not in self._gradients:
            self._gradients[sample] = Gradients(self.subspace, self.operator, sample)
        return self._gradients[sample]


class Measure:
    """Something that a ``Monitor`` records, in columns of its own.

    A measure of your own names its columns and overrides ``before`` or ``after``, which get the
    ``Step`` and return what they found: numbers, scalar tensors, or lists of numbers. What two
    measures ask a step for is computed once. A column that is not in what is returned is NaN in
    that row, and so are all of a measure that raises: the other measures of the row stay.

    Each monitor attaches a copy of the measure that it was given.

    Attributes:
        columns: their names.
        lists: of the columns with a list in each row, how long it is; set by ``attach``.
        refines: columns of another measure that it tells more exactly, if that is there too.
    """

    columns: Sequence[str] = ()
    lists: Mapping[str, int] = MappingProxyType({})
    refines: Sequence[str] = ()

    @property
    def key(self) -> tuple[object, ...]:
        """Class, options and columns, which tell one from another."""
        return type(self), repr(self) if is_dataclass(self) else "", tuple(self.columns)

    def attach(self, training: Training) -> None:
        """Checks that it can be measured of this training. Nothing else is known yet."""

    def before(self, step: Step) -> Row:  # noqa: ARG002 (one signature)
        """Returns what has to be read before anything moves."""
        return {}

    def after(self, step: Step) -> Row:  # noqa: ARG002 (one signature)
        """Returns what is known when the step has been taken."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns what the next row needs of the last one, for a resumed run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what ``state_dict`` returned."""


def operator_for(measure: str, training: Training) -> CurvatureOperator:
    """Returns the operator of a training.

    Raises:
        ArgumentError: it has none.
    """
    if training.operator is None:
        found = f"{measure}() of a subspace without an operator"
        remedy = "Pass the monitor a HessianOperator or a DominantSubspace."
        raise ArgumentError("measures", found, "a measure of the update alone", remedy)
    return training.operator


def subspace_for(measure: str, training: Training) -> Subspace:
    """Returns the subspace of a training.

    Raises:
        ArgumentError: it has none.
    """
    if training.subspace is None:
        found = f"{measure}() of an operator"
        remedy = "Pass the monitor a DominantSubspace(operator, k=10) in its place."
        raise ArgumentError("measures", found, "a measure that needs no subspace", remedy)
    return training.subspace

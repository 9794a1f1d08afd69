"""``eigenvectors()``: what the top eigenvectors look like, and how fast they turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from subspace_optim.curvature.by_name import by_name, from_names
from subspace_optim.diagnostics.eigenvectors import (
    displacement,
    localization,
    lowest_eigenvalue,
)
from subspace_optim.diagnostics.measures.base import (
    Measure,
    Row,
    Training,
    operator_for,
    subspace_for,
)
from subspace_optim.diagnostics.measures.step import Step
from subspace_optim.linalg.eigenbasis import EigenBasis


def eigenvectors() -> Measure:
    r"""Records the lowest eigenvalue, and what the eigenvectors of the basis are like.

    ===================== ====================================================================
    ``lowest_eigenvalue`` the smallest of the Hessian at ``θ_t``: negative curvature, where < 0
    ``localization``      :math:`\sum_i v_i^4` of each eigenvector, a list (``localization_1`` …
                          in files): 3/(P + 2) by chance
    ``displacement``      :math:`1 - |\langle v_t, v_{t'} \rangle|` of each, from the row before,
                          a list: near 1 by chance
    ===================== ====================================================================

    They are ``diagnostics.lowest_eigenvalue``, ``localization`` and ``displacement``. Of a
    ``CurrentBatch`` the displacement is mostly that of one minibatch to another. It costs a
    solve for the lower end of the spectrum, and holds the eigenvectors of the row before, which
    are in checkpoints too.

    Returns:
        The measure.

    Reference:
        `sagun_2017`, Figures 4-8, of the negative eigenvalues; `gur_ari_2018`, of how little the
        top eigenvectors turn.
    """
    return Eigenvectors()


@dataclass
class Eigenvectors(Measure):
    """See ``eigenvectors``."""

    columns = ("lowest_eigenvalue", "localization", "displacement")

    def attach(self, training: Training) -> None:
        """Looks how many there are."""
        operator_for("eigenvectors", training)
        subspace_for("eigenvectors", training)
        self.lists = {"localization": training.k, "displacement": training.k}
        self._before: EigenBasis | Tensor | None = None
        self._loaded: Any = None
        self._space = training.parameters

    def before(self, step: Step) -> Row:
        """Looks at the basis, and solves for the other end."""
        basis, row = step.basis, {}
        if self._loaded is not None:
            of = "the loaded eigenvectors"
            self._before = from_names(self._space, self._loaded, (basis.k,), of)
            self._loaded = None
        if self._before is not None:
            row["displacement"] = displacement(basis, self._before)
        self._before = basis
        value = lowest_eigenvalue(step.operator, **step.training.solver_options())
        return row | {"localization": localization(basis), "lowest_eigenvalue": value}

    def state_dict(self) -> dict[str, Any]:
        """Returns the eigenvectors of the last row."""
        before = self._before
        vectors = before.vectors if isinstance(before, EigenBasis) else before
        if vectors is None or self._space.layout is None:
            return {"vectors": vectors}
        return {"vectors": by_name(self._space, vectors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them."""
        sharded = isinstance(state["vectors"], dict)  # one tensor a parameter
        self._before = None if sharded else state["vectors"]
        self._loaded = state["vectors"] if sharded else None

"""``Monitor``: reads where the updates of any optimizer go, through torch's step hooks."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from subspace_optim._validation import ArgumentError, check_integer
from subspace_optim.diagnostics.alignment import alignment
from subspace_optim.diagnostics.effective_lr import bulk_lr, dom_lr
from subspace_optim.joint_steps import JointSteps, optimizers_of
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.subspace import DominantSubspace

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "step",
    "loss",
    "gradient_norm",
    "update_norm",
    "chi_gradient",
    "chi_update",
    "dom_lr",
    "bulk_lr",
    "distance",
    "sharpness",
    "eigenvalues",
    "products",
)


@dataclass
class _Before:
    """What a row needs of ``θ_t``, from before the step."""

    theta: Tensor
    basis: EigenBasis
    gradient: Tensor
    loss: float


class Monitor:
    r"""Records the diagnostics of any ``torch.optim.Optimizer``, one row a recorded step.

    A row of step t tells of the update :math:`\theta_{t+1} - \theta_t` and of loss, gradient and
    Hessian at :math:`\theta_t`, over all data of the subspace's operator:

    ================  =====================================================================
    ``step``          t, counted from the attachment
    ``loss``          ``L(θ_t)``
    ``gradient_norm`` ``‖∇L(θ_t)‖``
    ``update_norm``   ``‖θ_{t+1} − θ_t‖``
    ``chi_gradient``  χ_k of the gradient: the fraction in the dominant subspace
    ``chi_update``    χ_k of the update
    ``dom_lr``        effective learning rate in the dominant subspace (`song_2024`, Def. 4)
    ``bulk_lr``       the same in the bulk
    ``distance``      ``‖θ_t − θ_0‖``, from the parameters at the attachment
    ``sharpness``     λ_1
    ``eigenvalues``   λ_1 … λ_k, a list
    ``products``      curvature products of the subspace so far
    ================  =====================================================================

    Training does not change by a bit: nothing is written to parameters, gradients, buffers or
    random states. A step that is not recorded costs a counter; steps with all rates zero, such as
    those with which checkpoints are prepared, are no steps.

    Args:
        optimizer: any optimizer, or a sequence of optimizers that step in turn: one row for one
            step of each.
        subspace: the subspace to measure in; its basis is refreshed as it is due, at most once
            for each parameter state, whether an optimizer or a monitor asks first.
        every: record one step in so many.

    Attributes:
        history: a list for each column.

    Raises:
        ArgumentError: an argument is of the wrong type, or an optimizer is of another model.
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        subspace: DominantSubspace,
        *,
        every: int = 1,
    ) -> None:
        if not isinstance(subspace, DominantSubspace):
            raise ArgumentError("subspace", type(subspace).__name__, "a DominantSubspace")
        optimizers = optimizers_of(optimizer, subspace.parameters)
        self.every = check_integer("every", every, minimum=1)
        space = subspace.parameters
        self.subspace = subspace
        self.history: dict[str, list[Any]] = {column: [] for column in COLUMNS}
        self._start = space.flatten(space.tensors)
        self._steps = 0
        self._clock: int | None = None  # the subspace's, at the last step
        self._seen = False  # whether that was recorded
        self._before: _Before | None = None
        # Last: a projection that was attached later must have been applied.
        self._joint = JointSteps(optimizers, self._begin, self._end, last=True)

    def detach(self) -> None:
        """Removes the monitor from its optimizers. The history stays."""
        self._joint.remove()
        self._before = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    @torch.no_grad()
    def _begin(self) -> None:
        self._before = None
        recorded = self._steps % self.every == 0
        # From one row to the next step's the subspace itself sees whether the parameters changed.
        if self._clock is not None and not (recorded and self._seen):
            # The lower one, if an earlier state was loaded since.
            self.subspace.advance(min(self._clock, self.subspace.clock) + 1)
        if recorded:
            self._before = self._look()
        self._clock, self._seen = self.subspace.clock, recorded

    def _look(self) -> _Before:
        """Measures what a row needs before the step."""
        basis = self.subspace.update()
        space, operator = self.subspace.parameters, self.subspace.operator
        gradient = operator.gradient()
        return _Before(space.flatten(space.tensors), basis, gradient, operator.loss())

    @torch.no_grad()
    def _end(self) -> None:
        if self._before is not None:
            self._record(self._before)
            self._before = None
        self._steps += 1

    def _record(self, before: _Before) -> None:
        space, basis, gradient = self.subspace.parameters, before.basis, before.gradient
        update = space.flatten(space.tensors) - before.theta
        measured = {
            "gradient_norm": torch.linalg.vector_norm(gradient),
            "update_norm": torch.linalg.vector_norm(update),
            "chi_gradient": alignment(gradient, basis),
            "chi_update": alignment(update, basis),
            "dom_lr": dom_lr(update, gradient, basis),
            "bulk_lr": bulk_lr(update, gradient, basis),
            "distance": torch.linalg.vector_norm(before.theta - self._start),
        }
        # One synchronisation for the row.
        values = torch.cat([torch.stack(list(measured.values())), basis.eigenvalues]).tolist()
        row = dict(zip(measured, values, strict=False)) | {
            "step": self._steps,
            "loss": before.loss,
            "sharpness": values[len(measured)],
            "eigenvalues": values[len(measured) :],
            "products": self.subspace.stats.products,
        }
        for column in COLUMNS:
            self.history[column].append(row[column])

    def state_dict(self) -> dict[str, Any]:
        """Returns history and counters, for ``torch.save``: a resumed run goes on with them."""
        return {
            "history": {column: list(values) for column, values in self.history.items()},
            "start": self._start,
            "steps": self._steps,
            "clock": self._clock,
            "seen": self._seen,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history and the counters of ``state_dict``.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ArgumentError: it is of another model.
        """
        start = state_dict["start"]
        if start.shape != self._start.shape:
            raise ArgumentError(
                "the loaded state", f"of {start.numel()} parameters", f"of {len(self._start)}"
            )
        self.history = {column: list(state_dict["history"][column]) for column in COLUMNS}
        self._start = start.to(self._start, copy=True)
        self._steps = state_dict["steps"]
        self._clock = state_dict["clock"]
        self._seen = state_dict.get("seen", False)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the history row by row, with a column for each eigenvalue."""
        table = []
        for values in zip(*(self.history[column] for column in COLUMNS), strict=True):
            row = dict(zip(COLUMNS, values, strict=True))
            eigenvalues = row.pop("eigenvalues")
            table.append(row | {f"eigenvalue_{i + 1}": v for i, v in enumerate(eigenvalues)})
        return table

    def to_frame(self) -> pd.DataFrame:
        """Returns the history as a ``pandas.DataFrame``, one row a recorded step.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # noqa: PLC0415 (an extra)
        except ImportError as error:
            message = "to_frame() needs pandas: pip install 'subspace_optim[plots]'"
            raise ImportError(message) from error
        return pd.DataFrame(self.rows())

    def to_csv(self, path: str | Path) -> None:
        """Writes the history as a table, one row a recorded step."""
        rows = self.rows()
        names = list(rows[0]) if rows else [c for c in COLUMNS if c != "eigenvalues"]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws loss, alignment, eigenvalues and effective rates.

        Args:
            path: where to write the picture; its ending chooses the format.

        Returns:
            The matplotlib figure.
        """
        from subspace_optim.diagnostics.plots import dashboard  # noqa: PLC0415 (needs an extra)

        figure = dashboard(self.history)
        if path is not None:
            figure.savefig(path)
        return figure

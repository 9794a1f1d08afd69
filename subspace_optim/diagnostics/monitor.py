"""``Monitor``: reads where the updates of any optimizer go, through torch's step hooks."""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from subspace_optim._validation import (
    ArgumentError,
    AttachedTwiceWarning,
    LogWarning,
    check_integer,
)
from subspace_optim.diagnostics.alignment import alignment
from subspace_optim.diagnostics.effective_lr import bulk_lr, distance, dom_lr
from subspace_optim.diagnostics.logs import logs
from subspace_optim.diagnostics.stability import preconditioned_sharpness, thresholds
from subspace_optim.linalg.eigenbasis import EigenBasis
from subspace_optim.step_count import StepTeller
from subspace_optim.step_hooks import JointSteps, attached, optimizers_of
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
    "next_eigenvalues",
    "gap",
    "threshold",
    "sam_edge",
    "adam_threshold",
    "preconditioned_sharpness",
    "angle_estimate",
    "gradients",
    "products",
)
_STATE = {"history", "start", "steps"}
_LISTS = {"eigenvalues": "eigenvalue", "next_eigenvalues": "next_eigenvalue"}


@dataclass
class _Before:
    """What a row needs of ``θ_t``, from before the step."""

    theta: Tensor
    basis: EigenBasis
    gradient: Tensor
    row: dict[str, Any]  # what is known already


class Monitor:
    r"""Records the diagnostics of any ``torch.optim.Optimizer``, one row a recorded step.

    A row of step t tells of the update :math:`\theta_{t+1} - \theta_t` and of loss, gradient and
    Hessian at :math:`\theta_t`, over all data of the subspace's operator:

    ============================ ===================================================================
    ``step``                     t, counted from the attachment
    ``loss``                     ``L(θ_t)``
    ``gradient_norm``            ``‖∇L(θ_t)‖``
    ``update_norm``              ``‖θ_{t+1} − θ_t‖``
    ``chi_gradient``             χ_k of the gradient: the fraction in the dominant subspace
    ``chi_update``               χ_k of the update
    ``dom_lr``                   effective learning rate in the dominant subspace
                                 (`song_2024`, Def. 4)
    ``bulk_lr``                  the same in the bulk
    ``distance``                 ``‖θ_t − θ_0‖``, from the parameters at the attachment
    ``sharpness``                λ_1 of the last refresh; with ``next_k``, of θ_t
    ``eigenvalues``              λ_1 … λ_k, a list, of the same
    ``next_eigenvalues``         λ_{k+1} …, as many as ``next_k``
    ``gap``                      λ_k − λ_{k+1}; without ``next_k`` from the last refresh, which has
                                 λ_{k+1} from below
    ``threshold``                sharpness above which gradient descent with SGD's options diverges
                                 (``stability_threshold``): 2/η for plain steps
    ``sam_edge``                 the same of SAM, at this gradient
    ``adam_threshold``           the same of Adam, for ``preconditioned_sharpness``
    ``preconditioned_sharpness`` λ_1 of Adam's preconditioned Hessian, if it was asked for
    ``angle_estimate``           of the sine of the largest angle between the basis and the true
                                 subspace, with ``refresh="auto"``
    ``gradients``                what the row took: gradients over all data, one of them a forward
                                 and a backward pass ...
    ``products``                 ... and curvature products, each a backward pass through the
                                 gradient's graph
    ============================ ===================================================================

    What does not apply is NaN. The cost is of the row alone, with the refresh of a shared basis
    if the monitor was the first to ask for it.

    Training does not change by a bit: nothing is written to parameters, gradients, buffers or
    random states. A step that is not recorded costs a counter; steps with all rates zero, such as
    those with which checkpoints are prepared, are no steps. What cannot be measured, for a loss
    that is not finite or for want of memory, is a row of NaN and one warning: training goes on.

    Wrappers such as Accelerate's, Lightning's and Fabric's are followed to the optimizer inside; of
    an optimizer that steps another one, such as Lookahead, a row is of the whole displacement.

    Args:
        optimizer: any optimizer, wrapped or not, or a sequence of optimizers that step in turn:
            one row for one step of each. A monitor of the same rows that is attached already, as
            where a cell of a notebook is run again, is detached with a warning.
        subspace: the subspace to measure in; its basis is refreshed as it is due, at most once
            for each parameter state, whether an optimizer or a monitor asks first.
        every: record one step in so many, or those at which ``every(step)`` is true.
        next_k: further eigenvalues to record. They take a solve of their own at each row, for
            ``k + next_k`` pairs, which leaves the subspace's basis as it is.
        preconditioned: record ``preconditioned_sharpness``, a solve for one eigenvalue at each
            row, for Adam and AdamW.
        log: where rows go as they come: a path that ends in .csv or .jsonl, an object with
            ``add_scalar`` such as TensorBoard's ``SummaryWriter``, or a callable that takes a row
            as a dict, such as ``wandb.log``; or a sequence of these. A row is in its file before
            the next step, and outlives a kill. What a log does not take is a ``LogWarning``,
            never an end of the training. With a ``process_group`` files are written by rank 0.
        append: adds to files that are there already, of a run that is taken up again. A step that
            was recorded after the checkpoint is then in the file twice.

    Raises:
        ArgumentError: an argument is of the wrong type or out of range, an optimizer is of
            another model, or a file cannot be written or is there already.
    """

    def __init__(
        self,
        optimizer: Optimizer | Iterable[Optimizer],
        subspace: DominantSubspace,
        *,
        every: int | Callable[[int], bool] = 1,
        next_k: int = 0,
        preconditioned: bool = False,
        log: Any = None,
        append: bool = False,
    ) -> None:
        if not isinstance(subspace, DominantSubspace):
            raise ArgumentError("subspace", type(subspace).__name__, "a DominantSubspace")
        optimizers = optimizers_of(optimizer, subspace.parameters)
        if not callable(every):
            remedy = "Or a function of the step that tells whether it is recorded."
            every = check_integer("every", every, minimum=1, remedy=remedy)
        space, k = subspace.parameters, subspace.k
        next_k = check_integer("next_k", next_k, minimum=0, maximum=space.size - k)
        adam = all(isinstance(each.optimizer, Adam | AdamW) for each in optimizers)
        if preconditioned and not adam:
            remedy = "The thresholds of other optimizers are for the sharpness itself."
            raise ArgumentError("preconditioned", True, "False, but for Adam and AdamW", remedy)
        self.every = every
        self.subspace = subspace
        self._history: dict[str, list[Any]] = {column: [] for column in COLUMNS}
        self._preconditioned = preconditioned
        self._next = (
            DominantSubspace(
                subspace.operator, k + next_k, refresh=1, tol=subspace.tol, seed=subspace.seed
            )
            if next_k
            else None
        )
        self._counts = {"eigenvalues": k, "next_eigenvalues": next_k}
        self._start = space.flatten(space.tensors)
        self._steps = 0
        self._teller = StepTeller(subspace.steps, [each.optimizer for each in optimizers])
        self._unmeasured: dict[str, Any] | None = None
        self._before: _Before | None = None
        self._failing = False
        # A step that goes on after the one inside, as Lookahead's, has another threshold; SAM's
        # is told by its radius.
        self._with_thresholds = [
            each.optimizer
            for each in optimizers
            if len(each.members) == 1 or "rho" in each.optimizer.param_groups[0]
        ]
        files = subspace.operator.ranks.rank == 0  # of the ranks, which have the same rows, one
        columns = list(self._flat(self._empty_row()))
        self._logs = logs(log, columns, append=append, files=files)
        owners = [steps.owner for steps in attached(optimizers)]
        twins = [each for each in owners if isinstance(each, Monitor) and each.kind == self.kind]
        for twin in twins:
            twin.detach()
        # Last: a projection that was attached later must have been applied.
        self._joint = JointSteps(
            optimizers,
            space,
            owner=self,
            begin=self._begin,
            end=self._end,
            undo=self._forget,
            last=True,
        )
        if twins:
            message = (
                "A monitor of the same rows was attached to the optimizer. It is detached, as by "
                "its detach(), and keeps its history; the new one takes its place."
            )
            warnings.warn(message, AttachedTwiceWarning, stacklevel=2)

    @property
    def history(self) -> dict[str, list[Any]]:
        """A list for each column, with an entry for each row."""
        self._joint.check()
        return self._history

    @property
    def kind(self) -> tuple[Any, ...]:
        """What the rows depend on, beside the optimizer."""
        return id(self.subspace), self.every, self._counts["next_eigenvalues"], self._preconditioned

    def detach(self) -> None:
        """Removes the monitor from its optimizers. The history stays."""
        self._joint.check()
        self._joint.finish()
        self._joint.remove()
        self._before = None
        for log in self._logs:
            log.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _begin(self) -> None:
        self._before = self._unmeasured = None
        recorded = self._is_recorded()
        self._joint.watchful = recorded
        self._teller.begin(looks=recorded)
        if recorded:
            try:
                self._before = self._look()
            except Exception as error:  # noqa: BLE001 (training is worth more than its record)
                self._unmeasured = self._failed(error)

    def _is_recorded(self) -> bool:
        every, step = self.every, self._steps
        return bool(every(step)) if callable(every) else step % every == 0

    @torch.no_grad()
    def _look(self) -> _Before:
        """Measures what a row needs before the step."""
        subspace = self.subspace
        space, operator = subspace.parameters, subspace.operator
        gradients, products = operator.stats.gradients, operator.stats.products
        basis = subspace.update()
        gradient = operator.gradient()
        row = self._empty_row() | {"loss": operator.loss()}
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        # Now: a scheduler may change the rate before several optimizers have all stepped.
        row |= {"gradient_norm": norm} | thresholds(self._with_thresholds, norm)
        eigenvalues = basis.eigenvalues.tolist()
        if subspace.gap is not None:
            row["gap"] = subspace.gap
        if subspace.stats.estimate is not None:
            row["angle_estimate"] = subspace.stats.estimate
        if self._next is not None:
            every = self._next.update().eigenvalues.tolist()
            eigenvalues, following = every[: subspace.k], every[subspace.k :]
            row |= {"next_eigenvalues": following, "gap": eigenvalues[-1] - following[0]}
        row |= {"eigenvalues": eigenvalues, "sharpness": eigenvalues[0]}
        if self._preconditioned:
            with suppress(ArgumentError):  # before the first step there are no moments
                row["preconditioned_sharpness"] = preconditioned_sharpness(
                    operator, self._joint.optimizers, tol=subspace.tol, seed=subspace.seed
                )
        row["gradients"] = operator.stats.gradients - gradients
        row["products"] = operator.stats.products - products
        return _Before(space.flatten(space.tensors), basis, gradient, row)

    def _end(self) -> None:
        row, before = self._unmeasured, self._before
        self._forget()
        if before is not None:
            try:
                row = self._row(before)
                self._failing = False
            except Exception as error:  # noqa: BLE001 (training is worth more than its record)
                row = self._failed(error)
        measured = row is not None and not math.isnan(row["update_norm"])
        self._teller.end(row["update_norm"] != 0 if measured else None)
        self._steps += 1
        if row is not None:
            self._add(row)

    def _forget(self) -> None:
        """Of a step that raised there is no row."""
        self._before = self._unmeasured = None

    def _failed(self, error: Exception) -> dict[str, Any]:
        """Returns the row of what could not be measured. One warning, until a row can be again."""
        with suppress(Exception):
            self.subspace.operator.release()
        if not self._failing:
            self._failing = True
            kind = type(error).__name__
            message = f"The row of step {self._steps} is NaN: {error} ({kind}) Training goes on."
            warnings.warn(message, LogWarning, stacklevel=2)
        return self._empty_row()

    @torch.no_grad()
    def _row(self, before: _Before) -> dict[str, Any]:
        space, basis, gradient = self.subspace.parameters, before.basis, before.gradient
        update = space.flatten(space.tensors) - before.theta
        measured = {
            "update_norm": distance(update, torch.zeros_like(update)),
            "chi_gradient": alignment(gradient, basis),
            "chi_update": alignment(update, basis),
            "dom_lr": dom_lr(update, gradient, basis),
            "bulk_lr": bulk_lr(update, gradient, basis),
            "distance": distance(before.theta, self._start),
        }
        values = torch.stack(list(measured.values())).tolist()
        return before.row | dict(zip(measured, values, strict=True))

    def _empty_row(self) -> dict[str, Any]:
        """A row of which nothing is known but the step."""
        row: dict[str, Any] = dict.fromkeys(COLUMNS, math.nan) | {"step": self._steps}
        return row | {name: [math.nan] * count for name, count in self._counts.items()}

    def _add(self, row: dict[str, Any]) -> None:
        for column in COLUMNS:
            self._history[column].append(row[column])
        for log in self._logs:
            log(self._flat(row))

    def _flat(self, row: dict[str, Any]) -> dict[str, Any]:
        """Returns the row with a column for each eigenvalue, at the end."""
        flat = {column: value for column, value in row.items() if column not in _LISTS}
        for column, name in _LISTS.items():
            flat |= {f"{name}_{i + 1}": value for i, value in enumerate(row[column])}
        return flat

    def state_dict(self) -> dict[str, Any]:
        """Returns history and counters, for ``torch.save``: a resumed run goes on with them."""
        return {
            "history": {column: list(values) for column, values in self.history.items()},
            "start": self._start,
            "steps": self._steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the history and the counters of ``state_dict``.

        Args:
            state_dict: what ``state_dict()`` returned.

        Raises:
            ArgumentError: it is of another model, or no monitor's.
        """
        missing = _STATE - state_dict.keys()
        missing |= self._history.keys() - state_dict.get("history", {}).keys()
        if missing:
            found = f"without {', '.join(sorted(missing))}"
            raise ArgumentError("the loaded state", found, "that of a monitor of this version")
        start = state_dict["start"]
        if start.shape != self._start.shape:
            raise ArgumentError(
                "the loaded state", f"of {start.numel()} parameters", f"of {len(self._start)}"
            )
        for column, count in self._counts.items():
            if any(len(values) != count for values in state_dict["history"][column]):
                allowed = f"{count} in each row"
                remedy = "It is of another k or next_k."
                raise ArgumentError("the loaded state", f"of other {column}", allowed, remedy)
        self._joint.forget()
        self._history = {column: list(state_dict["history"][column]) for column in COLUMNS}
        self._start = start.to(self._start, copy=True)
        self._steps = state_dict["steps"]

    def rows(self) -> list[dict[str, Any]]:
        """Returns the history row by row, with a column for each eigenvalue."""
        columns = (self.history[column] for column in COLUMNS)
        return [
            self._flat(dict(zip(COLUMNS, values, strict=True)))
            for values in zip(*columns, strict=True)
        ]

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
        return pd.DataFrame(self.rows(), columns=list(self._flat(self._empty_row())))

    def to_csv(self, path: str | Path) -> None:
        """Writes the history as a table, one row a recorded step."""
        rows, names = self.rows(), list(self._flat(self._empty_row()))
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draws the training dashboard: loss, sharpness, alignment, rates and distance.

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
